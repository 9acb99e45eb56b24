"""The manual wiring: processors by `set_attn_processor`, the clock by `callback_on_step_end`."""

import logging

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks
from diffusers.models.attention_processor import AttnProcessor2_0

from tests.support.settings import apply_settings
from tests.zoo.case import rows
from tests.zoo.catalogue import BY_NAME
from tests.zoo.core import CASES, GOLDEN_SD, other
from tgate_processors import TGateAttnProcessor, TGateCallback, TGateSchedule, apply_tgate, remove_tgate

WITH_CALLBACK = rows((case for case in CASES if case.has_callback), default={"sd", "svd", "sd_controlnet", "lcm"})
SETTINGS = [(2,), (4, 2, 2, 1), (0.5, 3)]


def wire(pipe, *settings):
    callback = TGateCallback(TGateSchedule(*settings))
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({name: TGateAttnProcessor(p, callback.state) for name, p in before.items()})
    return callback, before


@pytest.mark.parametrize("case", WITH_CALLBACK)
@pytest.mark.parametrize("settings", [*SETTINGS[:2], pytest.param(SETTINGS[2], marks=pytest.mark.slow)], ids=str)
def test_the_manual_wiring_gives_the_same_picture_and_the_same_report(case, settings):
    pipe = case.build()
    baseline = case.plain()
    gate_step, *rest = settings
    names = ("sp_interval", "fi_interval", "warm_up")
    expected = case.run(apply_settings(pipe, gate_step, **dict(zip(names, rest, strict=False))))
    report = vars(pipe)["_tgate"].state.report
    remove_tgate(pipe)
    callback, before = wire(pipe, *settings)
    for _ in range(2):
        assert torch.equal(case.run(pipe, callback_on_step_end=callback), expected)
        assert callback.state.nbytes == 0
        assert not pipe.unet._forward_pre_hooks
    assert (callback.state.report.cross_attention_reused, callback.state.report.half_batch_forwards) == (
        report.cross_attention_reused,
        report.half_batch_forwards,
    )
    pipe.unet.set_attn_processor(dict(before))
    assert torch.equal(case.run(pipe), baseline)


def test_it_combines_with_other_callbacks():
    case = BY_NAME["sd"]
    pipe = case.build()
    expected = case.gated(3)
    callback, _ = wire(pipe, 3)
    assert torch.equal(case.run(pipe, callback_on_step_end=MultiPipelineCallbacks([callback])), expected)


def test_chosen_layers_only():
    case = BY_NAME["sd"]
    pipe = case.build()
    callback = TGateCallback(TGateSchedule(2))
    runs = {}
    processors = pipe.unet.attn_processors
    chosen = {
        name: TGateAttnProcessor(p, callback.state) if "mid_block" in name and "attn2" in name else p
        for name, p in processors.items()
    }
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            runs[name] = []
            module.to_k.register_forward_hook(lambda module, args, output, name=name: runs[name].append(1))
    pipe.unet.set_attn_processor(chosen)
    case.run(pipe, callback_on_step_end=callback)
    assert {name: len(seen) for name, seen in runs.items()} == {name: 2 if "mid_block" in name else 6 for name in runs}


def test_after_a_broken_run_the_next_one_is_right():
    case = BY_NAME["sd"]
    pipe = case.build()
    callback, _ = wire(pipe, 2)
    expected = case.run(pipe, callback_on_step_end=callback)
    for broken in (1, 4):

        def stop(pipe, step_index, timestep, callback_kwargs, broken=broken):
            if step_index == broken:
                raise KeyboardInterrupt
            return callback(pipe, step_index, timestep, callback_kwargs)

        with pytest.raises(KeyboardInterrupt):
            case.run(pipe, callback_on_step_end=stop)
        assert torch.equal(case.run(pipe, callback_on_step_end=callback), expected)
        with pytest.raises(KeyboardInterrupt):
            case.run(pipe, callback_on_step_end=stop)
        callback.reset()
        assert callback.state.nbytes == 0
        assert not pipe.unet._forward_pre_hooks
        assert torch.equal(case.run(pipe, callback_on_step_end=callback), expected)


def test_a_gate_in_the_first_step_comes_too_soon_for_a_callback():
    case = BY_NAME["sd"]
    pipe = case.build()
    baseline = case.plain()
    callback, before = wire(pipe, 1)
    with pytest.raises(ValueError, match=r"gate_step is the first step.*apply_tgate"):
        case.run(pipe, callback_on_step_end=callback)
    assert callback.state.nbytes == 0
    # Without guidance there is nothing to know, so it works.
    expected = case.run(pipe, callback_on_step_end=callback, guidance_scale=1.0)
    pipe.unet.set_attn_processor(dict(before))
    assert torch.equal(case.run(pipe), baseline)
    assert torch.equal(case.gated(1, call={"guidance_scale": 1.0}), expected)


def test_one_processor_for_several_layers_is_refused():
    case = BY_NAME["sd"]
    pipe = case.build()
    callback = TGateCallback(TGateSchedule(2))
    pipe.unet.set_attn_processor(TGateAttnProcessor(AttnProcessor2_0(), callback.state))
    with pytest.raises(ValueError, match="one TGateAttnProcessor serves several attention layers: make one for each"):
        case.run(pipe, callback_on_step_end=callback)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: TGateAttnProcessor(3, TGateCallback(TGateSchedule()).state),
            TypeError,
            "original=3 is of type int, not an",
        ),
        (
            lambda: TGateAttnProcessor(len, TGateCallback(TGateSchedule()).state),
            TypeError,
            "is of type builtin_function",
        ),
        (lambda: TGateAttnProcessor(AttnProcessor2_0, None), TypeError, "is of type type, not an attention"),
        (lambda: TGateAttnProcessor(AttnProcessor2_0(), None), TypeError, "state=None is of type NoneType: pass the"),
        (lambda: TGateCallback(None), TypeError, "`schedule` must be .*TGateSchedule.*got None of type NoneType"),
        (lambda: TGateCallback(TGateSchedule(), cfg_half="both"), ValueError, "got 'both'"),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_pipeline_that_cannot_be_gated_is_refused_by_the_callback_too():
    pipe = other(*GOLDEN_SD, "StableDiffusionPanoramaPipeline")
    with pytest.raises(ValueError, match="several views in every step"):
        TGateCallback(TGateSchedule())(pipe, 0, torch.tensor(1), {})
    assert not pipe.unet._forward_pre_hooks


def test_the_gate_beyond_the_last_step_warns(caplog):
    case = BY_NAME["sd"]
    pipe = case.build()
    callback, _ = wire(pipe, 50)
    with caplog.at_level(logging.WARNING):
        case.run(pipe, callback_on_step_end=callback)
    assert "gate_step=50 is not before the last of the 6 steps" in caplog.text


def test_a_script_finds_the_state_of_a_run_in_the_same_place():
    installation = vars(apply_tgate(BY_NAME["sd"].build(), 3))["_tgate"]
    assert installation.callback.state is installation.state
    assert isinstance(TGateCallback(TGateSchedule(3)).state, type(installation.state))
