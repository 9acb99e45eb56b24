"""The plan of levels that is off least at a cost, from errors measured in full steps. Pure Python, no torch."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

from .adaptive import GapLimits, StepErrors
from .step_plan import Level

# Halvings of the price of a full step: enough to tell two plans apart.
_HALVINGS = 60
_PRICES = (1e-9, 1e9)
# Tries for every plan that is run: many are too dear, or were run before.
_TRIES = 20
_NEAR = (-2, -1, 1, 2)


def cost_of(levels: str, half_cost: float) -> float:
    """The cost of a plan in full steps."""
    return levels.count(Level.FULL.value) + half_cost * levels.count(Level.HALF.value)


def plan_levels(errors: Sequence[StepErrors], budget: float, half_cost: float) -> str:
    """
    Plan the levels of a run at no more than a cost.

    By the law of [`LevelController`], the error of a forecast over `k` steps from two computed ones `h` steps apart is
    half of `k * (k + h)` times the measured one, and that of a difference `k` times it. The plan has the least sum of
    squares.

    Args:
        errors (`Sequence` of `StepErrors`):
            Of each step, how far off its predictions were in a run of full steps. A step without errors stays full.
        budget (`float`): The most that the plan may cost, in full steps.
        half_cost (`float`): The cost of a half step, in full steps.

    Returns:
        `str`: A letter for each step.

    Raises:
        ValueError: If no plan costs so little.
    """
    guided = any(each.difference is not None for each in errors)
    cheap, dear = _PRICES[1], _PRICES[0]
    found = _least_error(tuple(errors), cheap, half_cost, guided=guided)
    if cost_of(found, half_cost) > budget:
        least = cost_of(found, half_cost)
        raise ValueError(
            f"budget={budget:g} is too small for {len(errors)} steps, where no plan costs less than {least:.3g} full "
            "steps: pass more, or run fewer steps."
        )
    for _ in range(_HALVINGS):
        price = (cheap * dear) ** 0.5
        levels = _least_error(tuple(errors), price, half_cost, guided=guided)
        if cost_of(levels, half_cost) <= budget:
            found, cheap = levels, price
        else:
            dear = price
    return found


def _least_error(errors: tuple[StepErrors, ...], price: float, half_cost: float, *, guided: bool) -> str:
    """The plan with the least sum of squared errors, and of `price` for every full step."""
    limits = GapLimits.of(len(errors))

    @functools.cache
    def rest(step: int, last: int, before: int, full: int) -> tuple[float, str]:
        """The cost and the levels from a step on; `last` and `before` computed the denoiser, `full` all of it."""
        if step == len(errors):
            return 0.0, ""
        total, levels = rest(step + 1, step, last, step)
        options = [(total + price, Level.FULL.value + levels)]
        now = errors[step]
        known = now.forecast is not None and (now.difference is not None or not guided)
        if known and step - full <= limits.between_full:
            difference = (now.difference or 0.0) * (step - full)
            if guided:
                total, levels = rest(step + 1, step, last, full)
                options.append((total + price * half_cost + difference**2, Level.HALF.value + levels))
            if step - last <= limits.forecast and step < len(errors) - 1:
                forecast = (now.forecast or 0.0) / 2 * (step - last) * (step - before)
                total, levels = rest(step + 1, last, before, full)
                options.append((total + difference**2 + forecast**2, Level.FORECAST.value + levels))
        return min(options)

    return rest(0, -1, -2, -1)[1]


def improve_levels(
    levels: str, distance: Callable[[str], float], budget: float, half_cost: float, trials: int, seed: int = 0
) -> tuple[str, float]:
    """
    Change a plan as long as that makes its measured distance smaller: hill climbing.

    Args:
        levels (`str`): The plan to begin with.
        distance (`Callable`): Runs a plan, and says how far off it is.
        budget (`float`): The most that a plan may cost, in full steps.
        half_cost (`float`): The cost of a half step, in full steps.
        trials (`int`): Plans to run beside the first one.
        seed (`int`, *optional*, defaults to 0): Of the changes.

    Returns:
        `tuple` of `str` and `float`: The best plan, and its distance.
    """
    numbers = random.Random(seed)
    best, seen = distance(levels), {levels}
    for _ in range(trials * _TRIES):
        if len(seen) > trials:
            break
        changed = _changed(levels, numbers)
        if changed in seen or cost_of(changed, half_cost) > budget or not _is_possible(changed):
            continue
        seen.add(changed)
        found = distance(changed)
        if found < best:
            levels, best = changed, found
    return levels, best


def _changed(levels: str, numbers: random.Random) -> str:
    """A plan with two steps exchanged, mostly near ones, or one of another level."""
    letters = list(levels)
    step = numbers.randrange(1, len(letters))
    if numbers.random() < 0.3:
        letters[step] = numbers.choice(sorted({*levels} - {letters[step]}) or [letters[step]])
        return "".join(letters)
    other = step + numbers.choice(_NEAR) if numbers.random() < 0.7 else numbers.randrange(1, len(letters))
    other = min(max(other, 1), len(letters) - 1)
    letters[step], letters[other] = letters[other], letters[step]
    return "".join(letters)


def _is_possible(levels: str) -> bool:
    """Whether the law of errors holds in a plan: two computed steps first, the last one computed, no wide gaps."""
    forecast = Level.FORECAST.value
    wide = forecast * (GapLimits.of(len(levels)).forecast + 1)
    return levels.startswith(2 * Level.FULL.value) and not levels.endswith(forecast) and wide not in levels
