"""What is kept is private: nobody else can write to it, and what others write elsewhere is not lost."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from tests.support.counting import layers
from tests.support.settings import apply_settings
from tests.zoo.case import slow
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, remove_tgate

GATE = 3
SETTINGS = [{}, {"sp_interval": 2, "fi_interval": 2, "warm_up": 1}]


@pytest.fixture(params=["sd", slow("sdxl"), "pixart_alpha"])
def case(request):
    return BY_NAME[request.param]


def hooked(case, hook, when):
    pipe = case.build()
    if when == "before":
        apply_tgate(pipe, GATE)
    for layer in layers(pipe, case, "attn").values():
        layer.register_forward_hook(hook)
    return pipe


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["v1", "v2"])
@pytest.mark.parametrize("scale", [5.0, 1.0], ids=["guided", "unguided"])
def test_a_hook_that_writes_in_place_is_one_that_returns_what_it_would_have_written(case, when, settings, scale):
    in_place = hooked(case, lambda module, args, output: output.mul_(0.5), when)
    returned = hooked(case, lambda module, args, output: output * 0.5, when)
    for pipe in (in_place, returned):
        apply_settings(pipe, GATE, **settings)
    got, expected = (case.run(pipe, guidance_scale=scale) for pipe in (in_place, returned))
    assert torch.equal(got, expected)
    assert torch.equal(*(case.run(remove_tgate(pipe), guidance_scale=scale) for pipe in (in_place, returned)))


def test_a_hook_on_all_modules_may_write_too():
    case = BY_NAME["sd"]
    attention = type(next(iter(layers(case.build(), case).values())))
    expected = case.run(apply_tgate(hooked(case, lambda module, args, output: output * 0.5, "after"), GATE))

    def halve(module, args, output):
        return output.mul_(0.5) if isinstance(module, attention) else None

    handle = torch.nn.modules.module.register_module_forward_hook(halve)
    try:
        got = case.run(apply_tgate(case.build(), GATE))
    finally:
        handle.remove()
    assert torch.equal(got, expected)


class OneBuffer(AttnProcessor2_0):
    """Hands out one buffer again and again."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        output = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if getattr(self, "buffer", None) is None or self.buffer.shape != output.shape:
            self.buffer = torch.empty_like(output)
        return self.buffer.copy_(output)


@pytest.mark.parametrize("settings", SETTINGS, ids=["v1", "v2"])
@pytest.mark.parametrize("scale", [5.0, 1.0], ids=["guided", "unguided"])
def test_a_processor_that_hands_out_one_buffer(case, settings, scale):
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    denoiser.set_attn_processor({name: OneBuffer() for name in denoiser.attn_processors})
    apply_settings(pipe, GATE, custom_processors="gate", **settings)
    expected = case.gated(GATE, call={"guidance_scale": scale}, **settings)
    assert torch.equal(case.run(pipe, guidance_scale=scale), expected)


@pytest.mark.parametrize("scale", [5.0, 1.0], ids=["guided", "unguided"])
def test_a_block_that_writes_to_a_layers_output_is_found_out(scale):
    """Nobody can tell beforehand, but torch counts how often a tensor is written to."""
    case = BY_NAME["sd"]
    pipe = case.build()
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]

    def written(hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        hidden_states = block.attn1(block.norm1(hidden_states)) + hidden_states
        output = block.attn2(block.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states)
        hidden_states = output.add_(hidden_states)
        return block.ff(block.norm3(hidden_states)) + hidden_states

    baseline = case.plain(guidance_scale=scale)
    block.forward = written
    assert torch.allclose(case.run(pipe, guidance_scale=scale), baseline, atol=1e-4)
    apply_tgate(pipe, GATE, custom_forwards="gate")
    with pytest.raises(ValueError, match=r"what mid_block\..*attn2 keeps was written to in place by somebody else"):
        case.run(pipe, guidance_scale=scale)
    del block.forward
    assert torch.equal(case.run(remove_tgate(pipe), guidance_scale=scale), baseline)


class Reading(AttnProcessor2_0):
    """Reads a map of regions and writes to a bank, both of them the user's."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, region=None, bank=None
    ):
        if bank is not None and encoder_hidden_states is None:
            bank.append(hidden_states.mean().item())
        output = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if region is None or encoder_hidden_states is not None:
            return output
        side = int(hidden_states.shape[1] ** 0.5)
        return output * torch.nn.functional.interpolate(region[None, None], size=(side, side)).reshape(1, -1, 1)


@pytest.mark.parametrize("custom", ["leave", "gate"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_what_a_user_hands_to_the_processors_arrives_as_it_is(name, custom):
    case = BY_NAME[name]
    region = torch.zeros(64, 64)
    region[:32] = 1
    pipe = case.build()
    pipe.unet.set_attn_processor({name: Reading() for name in pipe.unet.attn_processors})
    plain, bank = [], []
    case.run(pipe, cross_attention_kwargs={"bank": plain})
    apply_tgate(pipe, GATE, custom_processors=custom)
    expected = case.run(pipe)
    with_region = case.run(pipe, cross_attention_kwargs={"region": region, "bank": bank})
    # Self-attention runs in every step.
    assert len(bank) == len(plain)
    assert not torch.equal(with_region, expected)
    original = Reading.__call__

    def in_closure(self, *args, **kwargs):
        return original(self, *args, **(kwargs | {"region": region}))

    Reading.__call__ = in_closure
    try:
        pipe = case.build()
        pipe.unet.set_attn_processor({name: Reading() for name in pipe.unet.attn_processors})
        expected = case.run(apply_tgate(pipe, GATE, custom_processors=custom))
    finally:
        Reading.__call__ = original
    assert torch.equal(with_region, expected)
