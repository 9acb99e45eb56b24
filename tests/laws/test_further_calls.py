"""Further calls of the denoiser, besides those of guidance: a forecast step makes none of them."""

import math

import pytest
import torch

from tests.support.comparing import distance
from tests.support.counting import samples_of
from tests.support.settings import FORECAST, LEVELS
from tests.zoo.case import STEPS, Case, rows, slow
from tests.zoo.catalogue import BY_NAME
from tests.zoo.cross_attention import LTX2_FURTHER
from tgate_processors import get_tgate_report
from tgate_processors._internal.guidance.forecast import Output, extrapolate

# One further call in some steps, and two in every step.
SD3 = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_scale": 8.0,
    "skip_layer_guidance_start": -0.1,
    "skip_layer_guidance_stop": 1.0,
}
FURTHER = {"ltx2": LTX2_FURTHER, "sd3": SD3}
SCALES = {"ltx2": [(1.0, 1.0), (2.0, 2.0)], "sd3": [(8.0,)]}
both = pytest.mark.parametrize("case", rows([BY_NAME[name] for name in FURTHER]))
ltx2 = pytest.mark.parametrize("case", rows([BY_NAME["ltx2"]]))


def watched(case, pipe, **settings):
    """The picture, and what the denoiser gave in each of its calls."""
    outputs = []
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, output: outputs.append([part.clone() for part in samples_of(output)])
    )
    picture = case.run(pipe, **FURTHER[case.name], **settings)
    handle.remove()
    return picture, outputs


@both
@pytest.mark.parametrize("settings", [LEVELS, slow(FORECAST)], ids=["plan", "auto"])
def test_a_forecast_step_makes_none_of_its_calls(case: Case, settings):
    plain, calls = watched(case, case.build())
    pipe = case.gate(case.build(), **settings)
    gated, made = watched(case, pipe)
    levels = get_tgate_report(pipe).levels
    assert levels == settings.get("levels", "FFF--H")
    # A half step makes all of its further ones.
    assert len(made) == len(calls) // STEPS * (STEPS - levels.count("-"))
    assert not torch.equal(gated, plain)
    assert torch.equal(watched(case, pipe)[0], gated)
    single = [case.run(pipe, [index], **FURTHER[case.name]) for index in range(2)]
    together = case.run(pipe, [0, 1], **FURTHER[case.name])
    assert all(distance(together[index : index + 1], single[index]) < 3e-5 for index in range(2))
    case.gate(pipe, tolerance=0)
    assert torch.equal(watched(case, pipe)[0], plain)


@ltx2
def test_each_is_forecast_from_its_own_past(case: Case):
    pipe = case.gate(case.build(), levels="FF-FFF")
    given, convert = [], pipe.convert_velocity_to_x0

    def watch(sample, output, *args, **kwargs):
        given.append(output.clone())
        return convert(sample, output, *args, **kwargs)

    pipe.convert_velocity_to_x0 = watch
    case.run(pipe, **LTX2_FURTHER)
    # In each step: both halves of the video and of the sound, and both for each of two further calls.
    first, second, third = (given[8 * step : 8 * step + 8] for step in range(3))
    for index in (0, 2, 4, 5, 6, 7):
        expected = extrapolate([Output(0, first[index]), Output(1, second[index])], 2)
        torch.testing.assert_close(third[index], expected)


@both
def test_the_error_of_a_forecast_is_that_of_its_difference_too(case: Case):
    pipe = case.gate(case.build(), tolerance=0)
    _, outputs = watched(case, pipe)
    per_step = len(outputs) // STEPS
    steps = [outputs[per_step * step : per_step * (step + 1)] for step in range(3)]
    parts = len(SCALES[case.name][0])

    def off(call, part, half=None):
        taken = [step[call][part] for step in steps]
        taken = taken if half is None else [each.chunk(2)[half] for each in taken]
        return 2 * taken[1] - taken[0] - taken[2]

    errors = []
    for part in range(parts):
        none, conditional = steps[2][0][part].chunk(2)
        guided = case.guided(none, conditional)
        own = off(0, part, half=1)
        errors.append(float(own.norm() / guided.norm()))
        for call, scales in enumerate(SCALES[case.name], start=1):
            errors.append(float(scales[part] * (own - off(call, part)).norm() / guided.norm()))
    (step, measured), *_ = get_tgate_report(pipe).forecast_errors
    assert step == 2
    assert measured == pytest.approx(max(errors), rel=1e-3)
    # The further calls decide here.
    assert max(errors) > max(errors[:: len(SCALES[case.name]) + 1])


def test_a_call_that_was_not_expected_is_computed_and_nothing_is_forecast_after_it():
    case = BY_NAME["sd3"]
    late = {**SD3, "skip_layer_guidance_start": 0.5}
    plain, calls = [], []
    for pipe, seen in ((case.build(), plain), (case.gate(case.build(), levels="FFFF--"), calls)):
        pipe.transformer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(1))
        case.run(pipe, **late)
    # It comes in the steps 4 and 5, and what guides the first of them was forecast.
    assert len(plain) == STEPS + 2
    assert get_tgate_report(pipe).levels == "FFFF-F"
    assert len(calls) == len(plain) - 1


def test_calls_that_have_ended_are_not_waited_for():
    case = BY_NAME["sd3"]
    early = {**SD3, "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.5}
    pipe, calls = case.gate(case.build(), levels="FFF-F-"), []
    pipe.transformer.register_forward_hook(lambda module, args, output: calls.append(1))
    case.run(pipe, **early)
    assert get_tgate_report(pipe).levels == "FFF-F-"
    assert len(calls) == 4 + 2


@ltx2
def test_what_is_held_of_them_counts_and_is_released(case: Case):
    pipe = case.gate(case.build(), tolerance=math.inf)
    case.run(pipe)
    held = get_tgate_report(pipe).peak_bytes
    output = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, given: output.append(samples_of(given)))
    case.run(pipe, **LTX2_FURTHER)
    handle.remove()
    # Two outputs of each of two further calls.
    more = 4 * sum(part.nbytes for part in output[1])
    assert get_tgate_report(pipe).peak_bytes == held + more
    state = vars(pipe)["_tgate"].state
    assert state.current() is None
