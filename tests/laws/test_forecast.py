"""Forecast steps: the denoiser is not called, and the pipeline gets what its last outputs lead to."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch._dynamo.testing import CompileCounter

from tests.support.comparing import assert_same_but_for_rounding, distance
from tests.support.compiling import compile_in_place
from tests.support.counting import count, is_cross, samples_of
from tests.support.custom_loops import Loop, built
from tests.support.macs import sizes, taken
from tests.support.offload import group_offload_by_leaves, model_offload, sequential_offload, skip_if_missing
from tests.support.operations import operations
from tests.support.settings import FORECAST, LEVELS, apply_settings
from tests.zoo.case import STEPS, Case, images, quiet, rows, slow, thorough
from tests.zoo.catalogue import ALL, BY_NAME
from tests.zoo.core import with_scheduler
from tests.zoo.cross_attention import assemble, model
from tests.zoo.joint import FLUX, flux
from tgate_processors import (
    TGateCallback,
    TGateSchedule,
    apply_tgate,
    estimate_cost,
    get_tgate_report,
    remove_tgate,
)
from tgate_processors._internal.guidance.forecast import Output, extrapolate
from tgate_processors._internal.guidance.prediction import CFGDifference, predict

# Guidance in one batch, with a variance, of frames, with a ControlNet, by two calls, with joint attention, in a list.
QUICK = {"sd", "pixart_alpha", "svd", "sd_controlnet", "wan", "sd3", "qwen", "z_image"}
# A plan is for each of the loops of a call.
OTHERS = {"animatediff_free_init"}
PLANNED = [case for case in ALL if not (case.guidance_parts or case.name in OTHERS)]
every = pytest.mark.parametrize("case", rows(PLANNED, default=QUICK))
quick = pytest.mark.parametrize("case", rows([BY_NAME[name] for name in sorted(QUICK)]))
some = pytest.mark.parametrize("name", ["sd", slow("pixart_alpha"), "wan", slow("sd3")])


def plan_for(case, pipe):
    """A plan with every level for as many steps as this call has."""
    case.run(case.gate(pipe, tolerance=0))
    return ("FF-FH-" * 3)[: get_tgate_report(pipe).num_inference_steps]


def calls_of(pipe, case):
    """Counts the calls of a pipeline's denoisers, and of its ControlNet."""
    calls = {"denoiser": 0, "controlnet": 0}

    def counting(name):
        return lambda module, args: calls.__setitem__(name, calls[name] + 1)

    for denoiser in case.denoisers(pipe).values():
        denoiser.register_forward_pre_hook(counting("denoiser"))
    if isinstance(getattr(pipe, "controlnet", None), torch.nn.Module):
        pipe.controlnet.register_forward_pre_hook(counting("controlnet"))
    return calls


@pytest.mark.parametrize("name", ["sd", slow("wan")])
@pytest.mark.parametrize(("steps", "limit"), [(31, 3), (40, 5)])
def test_a_long_run_has_longer_gaps(name, steps, limit):
    case = BY_NAME[name]
    pipe = apply_tgate(case.build(), tolerance=math.inf)
    case.run(pipe, num_inference_steps=steps)
    levels = get_tgate_report(pipe).levels
    assert max(map(len, levels.replace("H", "F").split("F"))) == limit
    assert levels == "".join(step.level.value for step in TGateSchedule().plan(steps))


@every
def test_a_plan_gives_the_levels_that_it_says(case: Case):
    pipe, baseline = case.build(), case.plain()
    levels = plan_for(case, pipe)
    calls = calls_of(pipe, case)
    case.gate(pipe, levels="F" * len(levels))
    assert torch.equal(case.run(pipe), baseline)
    assert get_tgate_report(pipe).levels == "F" * len(levels)
    whole = dict(calls)
    case.gate(pipe, levels=levels)
    first = case.run(pipe)
    report = get_tgate_report(pipe)
    twice = whole["denoiser"] == 2 * whole["controlnet"] or case.calls == 2
    done = {name: calls[name] - whole[name] for name in calls}
    if len(levels) == STEPS and len(case.denoisers(pipe)) == 1:
        # Without guidance there are no halves.
        assert report.levels == (levels if case.is_guided else levels.replace("H", "F"))
        passes = whole["denoiser"] // len(levels)
        full, half = levels.count("F"), levels.count("H")
        assert done["denoiser"] == passes * full + (1 if twice and case.is_guided else passes) * half
        per_step = whole["controlnet"] // len(levels)
        assert done["controlnet"] in (per_step * (full + half), per_step * full + half * bool(per_step))
    assert report.forecast_forwards > 0
    assert done["denoiser"] < whole["denoiser"]
    assert torch.equal(case.run(pipe), first)
    remove_tgate(pipe)
    assert torch.equal(case.run(pipe), baseline)


@pytest.mark.parametrize("name", ["sd", "pixart_alpha", slow("sdxl")])
def test_layers_run_in_no_forecast_step(name):
    case = BY_NAME[name]
    pipe = apply_settings(case.build(), **LEVELS)
    seen = count(pipe, case)
    case.run(pipe)
    assert seen.pop("denoiser") == [2, 2, 2, 1]
    for layer, batches in seen.items():
        assert batches == ([2, 2, 2] if is_cross(case, layer) else [2, 2, 2, 1]), layer


@quick
def test_a_tolerance_of_zero_is_the_plain_run_and_any_error_is_accepted_by_a_large_one(case: Case):
    pipe, baseline = case.build(), case.plain()
    case.gate(pipe, tolerance=0)
    assert torch.equal(case.run(pipe), baseline)
    report = get_tgate_report(pipe)
    # Measured from the third step on, though nothing is made of it.
    assert [step for step, _ in report.forecast_errors] == [2, 3, 4, 5]
    case.gate(pipe, **FORECAST)
    first = case.run(pipe)
    assert get_tgate_report(pipe).levels == "FFF--H"
    assert get_tgate_report(pipe).forecast_errors[0] == report.forecast_errors[0]
    assert torch.equal(case.run(pipe), first)
    assert not torch.equal(first, baseline)


@quick
@pytest.mark.parametrize("settings", [LEVELS, slow(FORECAST)], ids=["plan", "auto"])
def test_a_batch_of_two_equals_two_singles(case: Case, settings):
    pipe = case.gate(case.build(), **settings)
    if not case.batches:
        pytest.skip("it takes one prompt")
    both = case.run(pipe, [0, 1])
    levels = get_tgate_report(pipe).levels
    for index in range(2):
        assert distance(both[index : index + 1], case.run(pipe, [index])) < 3e-5
        assert get_tgate_report(pipe).levels == levels


def guided_outputs(case, pipe):
    """What the scheduler is given in each step, and what the denoiser gives in each call."""
    given, computed, step = [], [], pipe.scheduler.step

    def watched(model_output, *args, **kwargs):
        given.append(model_output.clone())
        return step(model_output, *args, **kwargs)

    pipe.scheduler.step = watched
    handle = getattr(pipe, case.denoiser).register_forward_hook(
        lambda module, args, output: computed.append(samples_of(output)[0].clone())
    )
    case.run(pipe)
    handle.remove()
    del pipe.scheduler.step
    return given, computed


@pytest.mark.parametrize("name", ["sd", "pixart_alpha", "sd3", "wan", slow("sdxl"), slow("qwen")])
def test_a_forecast_step_goes_on_with_an_extrapolated_half_and_a_predicted_difference(name):
    case = BY_NAME[name]
    pipe = case.gate(case.build(), **LEVELS)
    given, computed = guided_outputs(case, pipe)
    halves, differences, position = [], [], 0
    for step, level in enumerate(LEVELS["levels"]):
        if level == "-":
            conditional = extrapolate(halves[-2:], step)
            difference = predict(differences[-2:], step)
            expected = case.guided(conditional - difference, conditional)
            torch.testing.assert_close(given[step], expected.reshape(given[step].shape), rtol=1e-4, atol=1e-4)
            continue
        output = computed[position][:, : case.guided_channels]
        if case.calls == 1:
            none, conditional = output.chunk(2)
        else:
            conditional, none = output, computed[position + 1] if level == "F" else None
        position += case.calls if level == "F" else 1
        halves.append(Output(step, conditional))
        if level == "F":
            differences.append(CFGDifference(step, conditional - none))
    assert position == len(computed)


@pytest.mark.parametrize("name", ["flux", "sd", "pixart_alpha", slow("sdxl"), slow("wan"), slow("svd")])
def test_a_call_without_guidance_is_forecast_whole(name, caplog):
    case = BY_NAME[name]
    pipe = case.build()
    plain = case.run(pipe, **case.off)
    case.gate(pipe, tolerance=0)
    assert torch.equal(case.run(pipe, **case.off), plain)
    case.gate(pipe, **FORECAST)
    seen = count(pipe, case) if name != "flux" else None
    case.run(pipe, **case.off)
    report = get_tgate_report(pipe)
    assert report.levels == "FFF--F"
    assert report.half_batch_forwards == 0
    assert not report.prediction_errors
    assert report.kept_layers == 0
    if seen:
        assert len(seen["denoiser"]) == 4
    assert not [record.message for record in caplog.records if "tgate" in record.name]


@pytest.mark.parametrize("case", rows([case for case in ALL if case.guidance_parts], default={"pag", "sdxl_pix2pix"}))
def test_guidance_of_several_parts_is_forecast_whole(case: Case):
    pipe, baseline = case.build(), case.plain()
    case.gate(pipe, tolerance=0)
    assert torch.equal(case.run(pipe), baseline)
    calls = calls_of(pipe, case)
    case.gate(pipe, **FORECAST)
    case.run(pipe)
    report = get_tgate_report(pipe)
    assert report.levels == "FFF--F"
    assert calls["denoiser"] == 4
    assert (report.half_batch_forwards, report.cross_attention_reused) == (0, 0)


def flux_control():
    """FLUX with a control in the channels, whose guidance is distilled into it."""
    parts = flux()
    transformer = model("FluxTransformer2DModel", **FLUX | {"in_channels": 32, "out_channels": 16})
    return quiet(assemble("FluxControlPipeline", transformer=transformer, scheduler=parts.scheduler, vae=parts.vae))


def test_what_has_no_guidance_of_halves_at_all_is_forecast():
    pipe, case = flux_control(), BY_NAME["flux"]
    if not case.is_there:
        pytest.skip("this diffusers has no such FLUX")
    inputs = case.inputs([0])
    call = {name: inputs[name] for name in inputs if name != "true_cfg_scale" and not name.startswith("negative")}
    call["control_image"] = images([9])

    def drawn():
        return pipe(**call | {"generator": torch.Generator().manual_seed(0)}).images

    baseline = drawn()
    apply_tgate(pipe, tolerance=0)
    assert torch.equal(drawn(), baseline)
    for settings, levels in ((FORECAST, "FFF--F"), ({"levels": "FFF-F-"}, "FFF-F-")):
        calls = calls_of(apply_settings(pipe, **settings), case)
        first = drawn()
        assert get_tgate_report(pipe).levels == levels
        assert calls["denoiser"] == levels.count("F")
        assert torch.equal(drawn(), first)
        assert estimate_cost(pipe, TGateSchedule(**settings), STEPS, **case.size).report.levels == levels
    remove_tgate(pipe)
    assert torch.equal(drawn(), baseline)


@some
def test_one_number_is_read_in_a_computed_step_and_none_in_a_forecast_step(name):
    case = BY_NAME[name]
    pipe = case.build()
    plain = operations(case, pipe).waiting
    # Fewer than in the plain run, as the denoiser itself may read some.
    assert operations(case, case.gate(pipe, **LEVELS)).waiting <= plain
    waiting = operations(case, case.gate(pipe, **FORECAST)).waiting
    report = get_tgate_report(pipe)
    # Those of a step are brought over together.
    assert 0 < waiting <= plain + len(report.prediction_errors) + len(report.forecast_errors)


@some
@pytest.mark.parametrize("settings", [LEVELS, FORECAST], ids=["plan", "auto"])
def test_nothing_is_held_after_a_call(name, settings):
    case = BY_NAME[name]
    pipe = case.gate(case.build(), **settings)
    held, runs, state = [], [], pipe._tgate.state

    def look(module, args):
        held.append(state.nbytes)
        runs.append(state.current())

    getattr(pipe, case.denoiser).register_forward_pre_hook(look)
    case.run(pipe)
    assert 0 < max(held) <= get_tgate_report(pipe).peak_bytes
    # Though somebody may still have the run.
    assert runs[-1].nbytes == state.nbytes == 0


@pytest.mark.parametrize("name", ["sd", "pixart_alpha", slow("sdxl")])
@pytest.mark.parametrize("settings", [LEVELS, FORECAST], ids=["plan", "auto"])
def test_the_estimate_is_what_a_run_takes(name, settings):
    case = BY_NAME[name]
    pipe = case.build()
    cost = estimate_cost(
        pipe, TGateSchedule(**settings), STEPS, do_classifier_free_guidance=True, batch_size=2, **sizes(case)
    )
    assert cost.with_tgate == taken(apply_settings(pipe, **settings), case, [0, 1])
    report = get_tgate_report(pipe)
    errors = {name: getattr(report, name) for name in ("prediction_errors", "forecast_errors")}
    assert replace(cost.report, **errors) == report
    assert [step for step, _ in cost.report.forecast_errors] == [step for step, _ in report.forecast_errors]


def test_what_a_users_hook_makes_of_an_output_is_forecast_too():
    case = BY_NAME["sd"]

    def drawn(add):
        pipe = apply_settings(case.build(), **LEVELS)
        pipe.unet.register_forward_hook(lambda module, args, output: (output[0] + add, *output[1:]))
        given, _ = guided_outputs(case, pipe)
        return given

    # The first two steps see the same latents only in the first; the third is forecast from both.
    plain, moved = drawn(0.0), drawn(100.0)
    assert all((each - other).mean() > 50 for each, other in zip(moved, plain, strict=True))


@pytest.mark.parametrize("settings", [LEVELS, FORECAST], ids=["plan", "auto"])
def test_latents_and_text_that_a_callback_gives_begin_anew(settings):
    case = BY_NAME["sd"]
    pipe = apply_settings(case.build(), **settings)
    for name in ("latents", "prompt_embeds"):

        def exchange(pipe, step, timestep, tensors, name=name):
            # Before a step that is forecast otherwise.
            return {name: tensors[name].flip(1).clone()} if step == 1 + (settings is FORECAST) else {}

        case.run(pipe, callback_on_step_end=exchange, callback_on_step_end_tensor_inputs=[name])
        assert get_tgate_report(pipe).levels == ("FFFFH-" if settings is LEVELS else "FFFFFF")


class Merging(Loop):
    """Exchanges the text itself, from the fourth step on, as PhotoMaker does; in each step it is another object."""

    def predict(self, i, x, t, texts, pooled, scale):
        return super().predict(i, x, t, [text * (1.0 if i < 3 else 0.5) for text in texts], pooled, scale)


def test_a_text_that_the_loop_itself_exchanges_is_computed():
    case = BY_NAME["sd"]
    pipe = apply_settings(built("sd", Loop), **FORECAST)
    case.run(pipe)
    assert get_tgate_report(pipe).levels == "FFF--H"
    pipe = apply_settings(built("sd", Merging), **FORECAST)
    case.run(pipe)
    assert get_tgate_report(pipe).levels == "FFFFFF"


def test_settings_of_the_denoiser_that_change_are_computed():
    case = BY_NAME["sd_controlnet"]
    pipe = apply_settings(case.build(), **FORECAST)
    case.run(pipe)
    assert get_tgate_report(pipe).levels == "FFF--H"
    # Its scale becomes zero in the fourth step of six.
    case.run(pipe, control_guidance_end=0.5)
    assert get_tgate_report(pipe).levels[3] == "F"


class Weakening(Loop):
    """Weakens an adapter from the fourth step on."""

    def denoise(self, x, t, text, pooled):
        scale = 1.0 if t > self.scheduler.timesteps[3] else 0.5
        return self.unet(x, t, encoder_hidden_states=text, cross_attention_kwargs={"scale": scale}).sample


def test_a_scale_in_the_arguments_of_the_denoiser_that_changes_is_computed():
    case = BY_NAME["sd"]
    pipe = apply_tgate(built("sd", Weakening), "FFF--F")
    case.run(pipe)
    assert get_tgate_report(pipe).levels == "FFFF-F"


class Counting:
    """A processor of somebody's own, which may do anything with the number of its calls."""

    def __init__(self):
        self.inner, self.calls = AttnProcessor2_0(), 0

    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.calls += 1
        return self.inner(attn, hidden_states, *args, **kwargs)


def test_what_may_count_its_calls_gets_all_of_them():
    case = BY_NAME["sd"]
    pipe = case.build()
    own = Counting()
    name = next(iter(pipe.unet.attn_processors))
    pipe.unet.set_attn_processor({**pipe.unet.attn_processors, name: own})
    case.run(apply_settings(pipe, **FORECAST))
    assert own.calls == STEPS
    assert get_tgate_report(pipe).levels == "F" * STEPS
    own.calls = 0
    case.run(apply_settings(pipe, **FORECAST, custom_processors="gate"))
    assert get_tgate_report(pipe).levels == "FFF--H"
    assert own.calls == 4


def test_another_number_of_steps_than_the_plan_has_is_refused_before_the_first():
    case = BY_NAME["sd"]
    pipe = apply_settings(case.build(), **LEVELS)
    with pytest.raises(ValueError, match="each of the 7 steps that run, got 6"):
        case.run(pipe, num_inference_steps=7)
    assert get_tgate_report(pipe).num_inference_steps == 0
    remove_tgate(pipe)
    assert torch.equal(case.run(pipe), case.plain())


def test_a_report_is_a_plan_for_the_same_again():
    case = BY_NAME["sd"]
    pipe = apply_settings(case.build(), **FORECAST)
    drawn = case.run(pipe)
    assert torch.equal(case.run(apply_tgate(pipe, get_tgate_report(pipe).levels)), drawn)


@pytest.mark.parametrize(("scheduler", "passes"), [("HeunDiscreteScheduler", 2), ("PNDMScheduler", 1)])
def test_a_step_is_forecast_with_all_its_passes(scheduler, passes):
    case = BY_NAME["sd"]
    pipe = with_scheduler(case.build(), scheduler)
    baseline = case.run(pipe)
    calls = calls_of(pipe, case)
    case.run(apply_settings(pipe, **FORECAST))
    report = get_tgate_report(pipe)
    # Two passes of the second step show an error already.
    assert report.levels == "FFH--H"
    forwards = report.full_batch_forwards + report.half_batch_forwards
    assert calls["denoiser"] == forwards
    assert report.forecast_forwards == 2 * passes
    assert torch.equal(case.run(apply_tgate(pipe, tolerance=0)), baseline)


@pytest.mark.parametrize("name", ["sd", slow("sd_controlnet"), slow("wan")])
@pytest.mark.parametrize("step", [slow(0), slow(1), 2, slow(3), slow(4)])
def test_a_run_that_fails_in_any_step_of_a_plan_leaves_nothing(name, step):
    case = BY_NAME[name]
    pipe = apply_settings(case.build(), **LEVELS)
    expected = case.run(pipe)

    def fail(pipe, index, timestep, tensors):
        if index == step:
            raise RuntimeError("no more")
        return tensors

    with pytest.raises(RuntimeError, match="no more"):
        case.run(pipe, callback_on_step_end=fail)
    # The user's callback comes before the step ends for T-GATE.
    assert get_tgate_report(pipe).levels == LEVELS["levels"][:step]
    assert torch.equal(case.run(pipe), expected)
    assert torch.equal(case.run(remove_tgate(pipe)), case.plain())


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_a_copy_has_the_same_plan(clone):
    case = BY_NAME["sd"]
    pipe = apply_settings(case.build(), **LEVELS)
    expected = case.run(pipe)
    other = quiet(clone(pipe))
    assert_same_but_for_rounding(case.run(other), expected)
    assert get_tgate_report(other).levels == LEVELS["levels"]


def test_two_threads_do_not_mix():
    case = BY_NAME["sd"]
    first, second = (apply_settings(case.build(), **FORECAST) for _ in range(2))
    expected = [case.run(first, [number]) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda job: case.run(*job), [(first, [0]), (second, [1])])]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("way", [model_offload, thorough(sequential_offload), slow(group_offload_by_leaves)])
def test_nothing_is_moved_for_a_forecast_step(way, tmp_path):
    skip_if_missing(way)
    case = BY_NAME["sd"]
    pipe = case.build()
    expected = case.run(apply_settings(case.build(), **LEVELS))
    way(pipe, case, tmp_path)
    apply_settings(pipe, **LEVELS)
    moved, hook = [], getattr(pipe.unet, "_hf_hook", None)
    if way is model_offload:
        pre_forward = hook.pre_forward
        hook.pre_forward = lambda *args, **kwargs: moved.append(1) or pre_forward(*args, **kwargs)
    assert torch.equal(case.run(pipe), expected)
    assert len(moved) == (way is model_offload) * 4


def test_no_graph_is_compiled_for_a_forecast_step():
    case = BY_NAME["pixart_alpha"]
    expected = case.run(apply_settings(case.build(), **FORECAST))
    torch._dynamo.reset()
    pipe, counter = case.build(), CompileCounter()
    compile_in_place(pipe, case, counter)
    apply_settings(pipe, **FORECAST)
    torch.testing.assert_close(case.run(pipe), expected)
    # Compute; compute and store; reuse.
    assert counter.frame_count == 3
    torch._dynamo.reset()


def test_wired_by_hand_nothing_is_forecast():
    case = BY_NAME["sd"]
    pipe = case.build()
    callback = TGateCallback(TGateSchedule(**FORECAST))
    case.run(pipe, callback_on_step_end=callback)
    assert callback.state.report.forecast_forwards == 0
    with pytest.raises(ValueError, match=r'has forecast steps \("-"\), and a callback alone cannot leave out'):
        case.run(pipe, callback_on_step_end=TGateCallback(TGateSchedule(**LEVELS)))
    assert torch.equal(case.run(pipe), case.plain())
