"""What replaces attention processors behind our back is found at the next call; nothing is gated in part."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from tests.support.comparing import distance
from tests.zoo.case import slow
from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateAttnProcessor, apply_tgate, get_tgate_report, remove_tgate
from tgate_processors._internal.families import attention_modules

GATE = 2


def fuse(pipe):
    pipe.fuse_qkv_projections(vae=False)


def unfuse(pipe):
    pipe.unfuse_qkv_projections(vae=False)


def slice_(pipe):
    pipe.enable_attention_slicing(1)


def unslice(pipe):
    pipe.disable_attention_slicing()


def plain(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())


def fewer(pipe):
    """Some layers only."""
    for name, layer in attention_modules(pipe.unet).items():
        if "mid_block" in name:
            layer.set_processor(AttnProcessor())


def no_xformers(pipe):
    pipe.disable_xformers_memory_efficient_attention()


def default(pipe):
    remove_tgate(pipe)
    pipe.unet.set_default_attn_processor()
    apply_tgate(pipe, GATE)


DEEDS = {
    "fuse": (fuse, unfuse),
    "slice": (slice_, unslice),
    "plain": (plain, None),
    "fewer": (fewer, None),
    "no_xformers": (no_xformers, None),
    "default": (default, None),
}


def processors(pipe):
    return [layer.processor for layer in attention_modules(pipe.unet).values()]


@pytest.mark.parametrize(
    "called", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["after_a_call", "before_any_call"]
)
@pytest.mark.parametrize(("deed", "undo"), DEEDS.values(), ids=DEEDS)
@pytest.mark.parametrize("name", ["sd", slow("sdxl")])
def test_before_and_after_are_the_same(name, deed, undo, called):
    case = BY_NAME[name]
    before, after = case.build(), case.build()
    untouched = case.plain()
    deed(before)
    remove_tgate(before)
    baseline, types = case.run(before), [type(p) for p in processors(before)]
    expected = case.run(apply_tgate(before, GATE))
    apply_tgate(after, GATE)
    gated = case.run(after) if called else case.gated(GATE)
    deed(after)
    assert torch.equal(case.run(after), expected)
    assert all(isinstance(processor, TGateAttnProcessor) for processor in processors(after))
    assert get_tgate_report(after).cross_attention_reused == 4
    if undo is not None:
        undo(after)
        assert torch.equal(case.run(after), gated)
        assert distance(case.run(remove_tgate(after)), untouched) < 1e-6
        assert not any(isinstance(processor, TGateAttnProcessor) for processor in processors(after))
        apply_tgate(after, GATE)
        deed(after)
        case.run(after)
    remove_tgate(after)
    assert [type(processor) for processor in processors(after)] == types
    assert torch.equal(case.run(after), baseline)
    if undo is not None:
        undo(after)
        assert not any(isinstance(processor, TGateAttnProcessor) for processor in processors(after))
        assert distance(case.run(after), untouched) < 1e-6


def test_what_diffusers_itself_refuses_leaves_the_gates_in_place():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), GATE)
    expected = case.run(pipe)
    with pytest.raises(ValueError, match=r"set_default_attn_processor.*TGateAttnProcessor"):
        pipe.unet.set_default_attn_processor()
    with pytest.raises((ModuleNotFoundError, ValueError), match="xformers"):
        pipe.enable_xformers_memory_efficient_attention()
    assert torch.equal(case.run(pipe), expected)


@pytest.mark.parametrize("deed", [plain, slice_, fewer, fuse])
def test_in_the_middle_of_a_run_it_is_an_error(deed):
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), GATE)

    def on_step_end(pipe, step, timestep, kwargs):
        if step == GATE:
            deed(pipe)
        return kwargs

    with pytest.raises(RuntimeError, match=r"attention processors were replaced while the pipeline runs.*between two"):
        case.run(pipe, callback_on_step_end=on_step_end)
    assert vars(pipe)["_tgate"].state.nbytes == 0
    other = case.build()
    deed(other)
    assert torch.equal(case.run(pipe), case.run(apply_tgate(other, GATE)))
