"""diffusers' own features on denoisers beyond UNets and PixArt, put in before and after T-GATE."""

import copy

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.offload import group_offload_by_blocks, group_offload_by_leaves, model_offload, skip_if_missing
from tests.support.settings import apply_settings
from tests.zoo.addons import lora
from tests.zoo.catalogue import BY_NAME
from tgate_processors import get_tgate_report, remove_tgate
from tgate_processors._internal.families import attention_modules

pytestmark = pytest.mark.slow
# CI has the rows of one.
NAMES = ("ltx", *[pytest.param(name, marks=pytest.mark.thorough) for name in ("sana", "wan")])
GATE = 2
WAYS = [{"gate_step": GATE}, {"gate_step": GATE, "guidance": "predict", "cfg_interval": 3}]


def compiled_blocks(pipe, kind, folder):
    denoiser = pipe.transformer
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        for block in denoiser.transformer_blocks:
            block.compile(fullgraph=True, backend="eager")


def load_lora(pipe, kind, folder):
    weights = lora(pipe.transformer)
    assert weights
    pipe.load_lora_weights({name.replace("unet.", "transformer.", 1): value for name, value in weights.items()})


@pytest.fixture(params=NAMES)
def kind(request):
    found = BY_NAME[request.param]
    if not found.is_there:
        pytest.skip(f"this diffusers has no {found.pipeline}")
    return found


@pytest.mark.parametrize(
    "way", [pytest.param(WAYS[0], id="drop"), pytest.param(WAYS[1], id="predict", marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize(
    "put", [compiled_blocks, load_lora, model_offload, group_offload_by_blocks, group_offload_by_leaves]
)
def test_features_put_in_before_and_after_give_the_same(kind, put, way):
    skip_if_missing(put)
    torch.compiler.reset()
    before, after = kind.build(), kind.build()
    put(before, kind, None)
    plain = kind.run(before)
    apply_settings(before, **way)
    first = kind.run(before)
    halves = get_tgate_report(before).half_batch_forwards
    assert halves > 0
    put(apply_settings(after, **way), kind, None)
    torch.testing.assert_close(kind.run(after), first)
    assert get_tgate_report(after).half_batch_forwards == halves
    torch.testing.assert_close(kind.run(after), first)
    if put is load_lora:
        assert not torch.equal(first, kind.gated(**way))
    else:
        torch.testing.assert_close(first, kind.gated(**way))
    for pipe in (before, after):
        torch.testing.assert_close(kind.run(remove_tgate(pipe)), plain)


# LTX does not repeat embeddings that it is given, without T-GATE either.
@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["sana", "wan"], indirect=True)
def test_several_pictures_of_a_prompt_equal_that_prompt_several_times(kind):
    pipe = apply_settings(kind.build(), **WAYS[1])
    together = kind.run(pipe, [0, 0])
    inputs = kind.inputs([0])
    name = "num_images_per_prompt" if kind.name == "sana" else "num_videos_per_prompt"
    inputs |= {name: 2, "generator": copy.deepcopy(kind.inputs([0, 0])["generator"])}
    output = pipe(**inputs)
    torch.testing.assert_close(output.images if kind.name == "sana" else output.frames, together, rtol=1e-4, atol=1e-4)


def test_a_callback_sees_every_step_and_the_latents_of_both(kind):
    pipe = apply_settings(kind.build(), **WAYS[1])
    expected, seen = kind.run(pipe), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return tensors

    assert torch.equal(kind.run(pipe, callback_on_step_end=callback), expected)
    assert [step for step, _ in seen] == list(range(get_tgate_report(pipe).num_inference_steps))
    assert len({shape for _, shape in seen}) == 1


class Kernels(TorchDispatchMode):
    """Notes whether the CPU's own kernel of attention runs."""

    def __init__(self):
        super().__init__()
        self.fused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += "flash_attention_for_cpu" in str(func)
        return func(*args, **kwargs or {})


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(diffusers.ModelMixin, "set_attention_backend"), reason="this diffusers has no backends")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_backend_of_attention_is_that_of_the_gated_layers(kind, when):
    from diffusers.models.attention_dispatch import attention_backend

    pipe, both, plain = kind.build(), {**WAYS[1], "cross_attention": True}, kind.plain()
    layers = attention_modules(pipe.transformer)
    own = [layer.processor for layer in layers.values()]
    # Sana's processors have no choice.
    chooses = kind.name != "sana"
    with Kernels() as kernels:
        gated = kind.run(apply_settings(pipe, **both))
        assert kernels.fused
        if when == "before":
            remove_tgate(pipe)
        # To choose one makes it the default of the process, until the end of this context.
        with attention_backend("native"):
            pipe.transformer.set_attention_backend("_native_math")
        if when == "before":
            apply_settings(pipe, **both)
        kernels.fused = 0
        torch.testing.assert_close(kind.run(pipe), gated)
        assert bool(kernels.fused) is not chooses
        assert get_tgate_report(pipe).half_batch_forwards > 0
        remove_tgate(pipe)
        assert all(layer.processor is then for layer, then in zip(layers.values(), own, strict=True))
        torch.testing.assert_close(kind.run(pipe), plain)
        assert bool(kernels.fused) is not chooses
    pipe.transformer.reset_attention_backend()
    assert torch.equal(kind.run(apply_settings(pipe, **both)), gated)
