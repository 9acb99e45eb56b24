"""The user's callbacks see, and may do, what they see and may do without T-GATE."""

import inspect

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback

from tests.zoo.case import STEPS, rows
from tests.zoo.catalogue import BY_NAME
from tests.zoo.core import CASES
from tgate_processors import TGateCallback, TGateSchedule, apply_tgate, get_tgate_report

WITH_CALLBACK = rows((case for case in CASES if case.has_callback), default={"sd", "svd", "sd_controlnet", "lcm"})


class Recorder(PipelineCallback):
    """Writes down what it is called with; halves the latents in step 1."""

    tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012

    def __init__(self, inputs=None):
        super().__init__(cutoff_step_ratio=1.0)
        self.tensor_inputs = inputs or self.tensor_inputs
        self.calls = []

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.calls.append((step_index, float(timestep), sorted(callback_kwargs), id(pipeline)))
        if step_index == 1 and "latents" in callback_kwargs:
            callback_kwargs["latents"] = callback_kwargs["latents"] * 0.5
        return callback_kwargs


def as_function(recorder):
    def function(pipe, step_index, timestep, callback_kwargs):
        return recorder(pipe, step_index, timestep, callback_kwargs)

    return function


def arguments(kind, recorder, inputs):
    if kind == "function":
        return {"callback_on_step_end": as_function(recorder), "callback_on_step_end_tensor_inputs": inputs}
    if kind == "callback":
        return {"callback_on_step_end": recorder}
    return {"callback_on_step_end": MultiPipelineCallbacks([recorder, Recorder(["latents"])])}


@pytest.mark.parametrize("case", WITH_CALLBACK)
@pytest.mark.parametrize("kind", ["function", pytest.param("callback", marks=pytest.mark.slow), "several"])
def test_callbacks_of_every_kind_are_called_as_without_tgate(case, kind):
    pipe = case.build()
    inputs = ["latents"] if case.video else ["latents", "prompt_embeds"]
    plain, gated = Recorder(inputs), Recorder(inputs)
    baseline = case.run(pipe, **arguments(kind, plain, inputs))
    apply_tgate(pipe, 99)
    assert torch.equal(case.run(pipe, **arguments(kind, gated, inputs)), baseline)
    assert gated.calls == plain.calls
    assert len(gated.calls) >= STEPS - 1
    # The latent consistency pipelines do not ask a callback object what it wants.
    assert gated.calls[0][2] == (inputs if kind == "function" or case.name != "lcm" else ["latents"])
    # And with the gate closed the callback still has its effect.
    apply_tgate(pipe, 3)
    touched = case.run(pipe, **arguments(kind, Recorder(inputs), inputs))
    assert get_tgate_report(pipe).cross_attention_computed == 3
    assert not torch.equal(touched, case.gated(3))


def test_what_a_callback_returns_is_taken_even_if_it_is_another_dict():
    case = BY_NAME["sd"]
    pipe = case.build()

    def callback(pipe, step_index, timestep, callback_kwargs):
        return {"latents": callback_kwargs["latents"] * 0.5}

    baseline = case.run(pipe, callback_on_step_end=callback)
    assert torch.equal(case.run(apply_tgate(pipe, 99), callback_on_step_end=callback), baseline)


@pytest.mark.parametrize("inputs", [[], ["prompt_embeds"], ["latents"]], ids=str)
def test_a_callback_sees_the_tensors_that_it_asks_for_and_no_others(inputs):
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 3)
    recorder = Recorder()
    case.run(pipe, callback_on_step_end=as_function(recorder), callback_on_step_end_tensor_inputs=inputs)
    assert [keys for _, _, keys, _ in recorder.calls] == [inputs] * STEPS


@pytest.mark.parametrize("name", ["pixart_alpha", "pixart_sigma", "sd"])
def test_the_legacy_callback_is_called_as_without_tgate(name):
    case = BY_NAME[name]
    pipe = case.build()
    calls = []

    def callback(step, timestep, latents):
        calls.append((step, int(timestep), latents.clone()))

    baseline = case.run(pipe, callback=callback, callback_steps=2)
    plain, calls = calls, []
    apply_tgate(pipe, 99)
    assert torch.equal(case.run(pipe, callback=callback, callback_steps=2), baseline)
    assert [call[:2] for call in calls] == [call[:2] for call in plain]
    assert all(torch.equal(ours[2], theirs[2]) for ours, theirs in zip(calls, plain, strict=True))
    assert len(calls) == STEPS // 2


def test_positional_arguments_stay_where_they_are():
    case = BY_NAME["sd"]
    pipe = case.build()
    inputs = case.inputs([0])
    height, width, steps = inputs.pop("height"), inputs.pop("width"), inputs.pop("num_inference_steps")
    expected = case.gated(3)
    apply_tgate(pipe, 3)
    assert list(inspect.signature(pipe.__call__).parameters)[:4] == ["prompt", "height", "width", "num_inference_steps"]
    assert torch.equal(pipe(None, height, width, steps, **inputs).images, expected)


@pytest.mark.parametrize("cutoff", [1, 4])
def test_guidance_that_a_callback_switches_off_is_off(cutoff):
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 3)
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=cutoff)
    batches = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    latents = case.run(pipe, callback_on_step_end=callback)
    assert batches == [2 if step < min(3, cutoff + 1) else 1 for step in range(STEPS)]
    assert latents.isfinite().all()
    assert get_tgate_report(pipe).half_batch_forwards == max(0, cutoff - 2)


def test_an_interrupt_by_a_callback_ends_the_run_and_leaves_nothing():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 3)
    expected = case.gated(3)

    def stop(pipe, step_index, timestep, callback_kwargs):
        pipe._interrupt = step_index == 3
        return callback_kwargs

    interrupted = case.run(pipe, callback_on_step_end=stop)
    assert not torch.equal(interrupted, expected)
    assert vars(pipe)["_tgate"].state.nbytes == 0
    assert torch.equal(case.run(pipe), expected)


def test_progress_bars_keep_working(capsys):
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 3)
    pipe.set_progress_bar_config(disable=False)
    case.run(pipe)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


def test_a_second_clock_is_refused():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 3)
    expected = case.gated(3)
    clock = TGateCallback(TGateSchedule(3))
    for callback in (clock, MultiPipelineCallbacks([clock])):
        with pytest.raises(ValueError, match=r"TGateCallback.*remove_tgate"):
            case.run(pipe, callback_on_step_end=callback)
    assert torch.equal(case.run(pipe), expected)


def test_settings_cannot_be_changed_in_the_middle_of_a_run():
    from tgate_processors import remove_tgate

    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 3)
    expected = case.gated(3)
    for change in (remove_tgate, apply_tgate):
        with pytest.raises(RuntimeError, match=r"is running.*between two calls"):
            case.run(pipe, callback_on_step_end=lambda pipe, *args, change=change: change(pipe))
        assert torch.equal(case.run(pipe), expected)
