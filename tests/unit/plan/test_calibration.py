"""The plan of least error at a cost, on errors that are made up."""

import itertools
import random

import pytest

from tgate_processors._internal.plan.adaptive import StepErrors
from tgate_processors._internal.plan.calibration import cost_of, improve_levels, plan_levels

HALF = 0.4


def made_up(steps, seed, *, guided=True):
    numbers = random.Random(seed)
    known = [StepErrors(numbers.random() if guided else None, numbers.random()) for _ in range(steps - 2)]
    return [StepErrors(), StepErrors(), *known]


def error_of(levels, errors):
    """The sum of squared errors by the law, written out once more; `None` if a plan is impossible."""
    last, before, full, total = -1, -2, -1, 0.0
    for step, letter in enumerate(levels):
        difference = (errors[step].difference or 0.0) * (step - full)
        if letter != "F":
            if errors[step].forecast is None or step - full > 6:
                return None
            total += difference**2
        if letter == "-":
            if step - last > 3 or step == len(levels) - 1:
                return None
            total += (errors[step].forecast * (step - last) * (step - before) / 2) ** 2
        else:
            last, before = step, last
        full = step if letter == "F" else full
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("budget", [4.0, 5.3])
def test_no_plan_that_costs_as_little_has_a_smaller_error(seed, guided, budget):
    errors = made_up(8, seed, guided=guided)
    levels = plan_levels(errors, budget, HALF)
    cost = cost_of(levels, HALF)
    assert cost <= budget
    letters = "FH-" if guided else "F-"
    others = map("".join, itertools.product(letters, repeat=8))
    possible = [error_of(each, errors) for each in others if cost_of(each, HALF) <= cost + 1e-9]
    best = min(each for each in possible if each is not None)
    assert error_of(levels, errors) == pytest.approx(best)


@pytest.mark.parametrize(("steps", "limit"), [(20, 6), (50, 12)])
def test_steps_between_two_full_ones_are_limited(steps, limit):
    errors = [StepErrors(), StepErrors(), *(StepErrors(0.0, 0.0) for _ in range(steps - 2))]
    levels = plan_levels(errors, steps, HALF)
    cheapest = plan_levels(errors, 12, HALF)
    for each in (levels, cheapest):
        full = [step for step, letter in enumerate(each) if letter == "F"]
        assert max(b - a for a, b in itertools.pairwise([*full, len(each)])) <= limit + 1
        assert "-" * (limit // 2 + 1) not in each
    assert cheapest.count("F") < 6


def test_without_guidance_no_step_is_halved():
    assert "H" not in plan_levels(made_up(12, 0, guided=False), 6, HALF)


def test_a_budget_of_all_steps_is_the_full_run():
    assert plan_levels(made_up(9, 1), 9, HALF) == 9 * "F"


def test_steps_without_errors_stay_full():
    errors = made_up(9, 2)
    errors[4] = StepErrors()
    assert plan_levels(errors, 6, HALF)[4] == "F"


def test_a_budget_that_no_plan_meets_is_refused():
    with pytest.raises(ValueError, match=r"budget=2 is too small for 9 steps, where no plan costs less than"):
        plan_levels(made_up(9, 3), 2, HALF)


def test_changes_are_kept_while_they_help_and_never_beyond_the_budget():
    wanted, tried = "FF-FHF-F-F", []

    def distance(levels):
        tried.append(levels)
        return sum(a != b for a, b in zip(levels, wanted, strict=True))

    start = "FFFFF--F-H"
    found, apart = improve_levels(start, distance, 6.5, HALF, 200)
    assert apart == distance(found) < distance(start)
    assert all(cost_of(each, HALF) <= 6.5 for each in tried)
    assert all(each.startswith("FF") and not each.endswith("-") and "----" not in each for each in tried)
    assert improve_levels(start, distance, 6.5, HALF, 0)[0] == start
    del tried[:]
    improve_levels(start, distance, 6.5, HALF, 5)
    assert len(tried) == len({*tried}) == 6
