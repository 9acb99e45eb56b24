"""Quantised denoisers and attention backends."""

import importlib.util

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from tests.zoo.case import thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report, remove_tgate

NAMES = ["sd", thorough("sdxl"), "pixart_alpha"]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize("name", NAMES)
def test_int8_weights_of_torchao_before_and_after(name):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    case = BY_NAME[name]
    pipe = case.build()
    exact = case.plain()
    denoiser = getattr(pipe, case.denoiser)
    quantize_(denoiser, Int8WeightOnlyConfig())
    plain = case.run(pipe)
    assert not torch.equal(plain, exact)
    apply_tgate(pipe, 99)
    assert torch.equal(case.run(pipe), plain)
    gated = case.run(apply_tgate(pipe, 3))
    assert get_tgate_report(pipe).half_batch_forwards == 3
    assert not torch.equal(gated, plain)
    assert torch.equal(case.run(pipe), gated)
    assert torch.equal(case.run(remove_tgate(pipe)), plain)
    later = apply_tgate(case.build(), 3)
    quantize_(getattr(later, case.denoiser), Int8WeightOnlyConfig())
    assert torch.equal(case.run(later), gated)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize("name", ["sd", "pixart_alpha"])
def test_a_denoiser_that_is_quantised_as_it_is_loaded(name, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    case = BY_NAME[name]
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    denoiser.save_pretrained(tmp_path)
    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    loaded = type(denoiser).from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    setattr(pipe, case.denoiser, loaded)
    inputs = {key: _to_bfloat16(value) for key, value in case.inputs([0]).items()}
    pipe.vae.to(torch.bfloat16)

    def run():
        return pipe(**inputs | {"generator": torch.Generator().manual_seed(0)}).images

    plain = run()
    gated = (apply_tgate(pipe, 3), run())[1]
    assert gated.isfinite().all()
    assert not torch.equal(gated, plain)
    assert torch.equal((remove_tgate(pipe), run())[1], plain)


def _to_bfloat16(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(torch.bfloat16)
    return value


class Dispatching(AttnProcessor2_0):
    """A processor that reads its backend, as those of newer models do."""

    _attention_backend = None

    def __init__(self):
        super().__init__()
        self.read = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        self.read.append(self._attention_backend)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@pytest.mark.skipif(not hasattr(diffusers.ModelMixin, "set_attention_backend"), reason="this diffusers has no backends")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_attention_backend_reaches_the_processor_behind(name, when):
    case = BY_NAME[name]
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    own = {key: Dispatching() for key in denoiser.attn_processors}
    denoiser.set_attn_processor(dict(own))
    plain = case.run(pipe)
    if when == "before":
        denoiser.set_attention_backend("native")
    apply_tgate(pipe, 3, custom_processors="gate")
    if when == "after":
        denoiser.set_attention_backend("native")
    for processor in own.values():
        processor.read.clear()
    assert not torch.equal(case.run(pipe), plain)
    read = [backend for processor in own.values() for backend in processor.read]
    assert set(map(str, read)) <= {"native", "AttentionBackendName.NATIVE"}
    remove_tgate(pipe)
    assert denoiser.attn_processors == own
    denoiser.reset_attention_backend()
    assert torch.equal(case.run(pipe), plain)
    assert own[next(iter(own))].read[-1] is None


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_of_torch_before_and_after(name):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case = BY_NAME[name]
    pipe = case.build()
    plain, gated = case.plain(), case.gated(3)
    apply_tgate(pipe, 3)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(case.run(pipe), gated, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(case.run(remove_tgate(pipe)), plain, rtol=1e-4, atol=1e-4)
