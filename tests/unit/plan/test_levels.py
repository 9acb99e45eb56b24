"""How much of each step is computed, on errors that are made up."""

import math

import pytest

from tgate_processors import TGateSchedule
from tgate_processors._internal.plan.adaptive import (
    HALF_STEP_SHARE,
    GapLimits,
    LevelController,
    StepErrors,
)
from tgate_processors._internal.plan.step_plan import Action, Level


def levels(tolerance, forecast, difference=0.0, steps=24, *, guided=True):
    """The levels of a run whose errors these functions of the steps between give, as in a run without noise."""
    controller, found, computed, full = LevelController(tolerance), "", [], []
    for step in range(steps):
        level = controller.next_level(steps, guided=guided, is_last=step == steps - 1)
        found += level.value
        errors = StepErrors()
        if level is not Level.FORECAST:
            if len(computed) > 1:
                errors = errors._replace(forecast=forecast * (step - computed[-1]) * (step - computed[-2]))
            computed.append(step)
        if level is Level.FULL:
            if len(full) > 1 and guided:
                errors = errors._replace(difference=difference * (step - full[-1]))
            full.append(step)
        controller.end_step(level, errors)
    return found


def test_a_step_is_known_after_three():
    assert levels(1.0, 0.0).startswith("FFF-")
    assert levels(1.0, 0.0, guided=False).startswith("FFF-")


def test_nothing_is_skipped_with_a_tolerance_of_zero():
    assert levels(0.0, 0.0) == "F" * 24
    assert not LevelController(0.0).can_skip


@pytest.mark.parametrize("error", [math.nan, math.inf, 1e300])
def test_what_is_no_number_or_too_large_keeps_every_step_full(error):
    assert levels(1.0, error, error) == "F" * 24
    assert levels(1.0, error, guided=False) == "F" * 24


@pytest.mark.parametrize(("steps", "forecast"), [(12, 3), (25, 3), (31, 3), (32, 4), (40, 5), (50, 6), (100, 6)])
def test_without_error_the_longest_gaps(steps, forecast):
    found, unguided = levels(1.0, 0.0, steps=steps), levels(1.0, 0.0, steps=steps, guided=False)
    assert max(map(len, found.replace("H", "F").split("F"))) == forecast
    assert max(map(len, found.split("F"))) == 2 * forecast
    # No half steps without guidance.
    assert "H" not in unguided
    assert max(map(len, unguided.split("F"))) == forecast
    assert GapLimits.of(steps) == (forecast, 2 * forecast)


def test_the_last_step_is_not_forecast():
    assert all(levels(1.0, 0.0, steps=steps)[-1] != "-" for steps in range(1, 30))
    assert all(levels(1.0, 0.0, steps=steps, guided=False)[-1] == "F" for steps in range(1, 30))


def test_a_forecast_grows_with_its_distance():
    # One step ahead of two neighbours it is off by 0.1 * 1 * 2, two ahead by 0.1 * 2 * 3.
    assert levels(0.25, 0.1, guided=False).startswith("FFF-F")
    assert levels(0.65, 0.1, guided=False).startswith("FFF--F")
    assert levels(0.15, 0.1, guided=False) == "F" * 24


def test_half_steps_pay_where_guidance_is_smooth_and_the_picture_is_not():
    share = HALF_STEP_SHARE
    assert levels(1.0, 9.0, 0.9 * share).startswith("FFFHFHF")
    assert levels(1.0, 9.0, 1.1 * share) == "F" * 24


def test_both_errors_together_decide_about_a_forecast():
    assert levels(1.0, 0.35, 0.0)[3] == "-"
    assert levels(1.0, 0.0, 0.7)[3] == "-"
    # 0.7 and 0.8 together are above 1.
    assert levels(1.0, 0.35, 0.8)[3] == "F"


def test_a_rate_comes_from_the_last_error():
    controller = LevelController(1.0)
    for errors in (StepErrors(), StepErrors(), StepErrors(9.0, 9.0)):
        assert controller.next_level(25) is Level.FULL
        controller.end_step(Level.FULL, errors)
    assert controller.next_level(25) is Level.FULL
    controller.end_step(Level.FULL, StepErrors(0.1, 0.1))
    assert controller.next_level(25) is Level.FORECAST


def test_the_plan_of_a_run_that_forecasts_is_the_shortest():
    assert "".join(step.level.value for step in TGateSchedule().plan(12)) == levels(1.0, 0.0, steps=12)
    assert TGateSchedule().resolve_gate_step(12) == 3
    assert all(step.level is Level.FULL for step in TGateSchedule(tolerance=0).plan(9))


def test_a_plan_of_letters():
    schedule = TGateSchedule(levels="FF-FH-HF-F")
    plan = schedule.plan(10)
    assert "".join(step.level.value for step in plan) == "FF-FH-HF-F"
    assert [step.cross_attention for step in plan if step.level is Level.HALF] == [Action.REUSE] * 2
    # Stored where a half step comes before the next full one.
    assert [number for number, step in enumerate(plan) if step.cross_attention is Action.STORE] == [3]
    assert schedule.resolve_gate_step(10) == 2
    assert (schedule.predicts, schedule.is_auto, schedule.forecast, schedule.tolerance) == (True, False, True, None)
    with pytest.raises(
        ValueError, match=r"a letter for each of the 9 steps that run, got 10: .* num_inference_steps=10"
    ):
        schedule.plan(9)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"levels": ""}, ValueError, "`levels` must be a letter for each step .*, got ''"),
        ({"levels": "FXH"}, ValueError, "got 'FXH'.*The letters are F"),
        ({"levels": "-F"}, ValueError, "must be a plan that begins with a full step"),
        ({"levels": ["F"]}, TypeError, "of type list"),
        ({"levels": "FF", "gate_step": 1}, ValueError, "`gate_step` must be left out beside levels='FF', got 1"),
        ({"levels": "FF", "tolerance": 0.1}, ValueError, '`tolerance` must be left out .* got 0.1.*gate_step="auto"'),
        ({"levels": "FF", "guidance": "drop"}, ValueError, "`guidance` must be left out .* got .drop"),
        ({"levels": "FF", "sp_interval": 2}, ValueError, "`sp_interval` must be left out .* got 2"),
        ({"levels": "FF", "cfg_interval": 2}, ValueError, "`cfg_interval` must be left out .* got 2"),
        ({"levels": "FF-F", "forecast": False}, ValueError, "`forecast` must be left out .* got False"),
        (
            {"gate_step": 3, "forecast": True},
            ValueError,
            '`forecast` must be left out with gate_step=3, got True.*gate_step="auto"',
        ),
        ({"forecast": 1}, TypeError, "`forecast` must be True or False, got 1 of type int"),
    ],
)
def test_settings_that_mean_nothing_together(settings, error, message):
    with pytest.raises(error, match=message):
        TGateSchedule(**settings)
