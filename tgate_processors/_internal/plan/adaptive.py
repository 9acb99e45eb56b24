"""How much of each step is computed, decided by the measured error of predictions. Pure Python, no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

from .step_plan import Level

# Half steps in a row, at most.
MAX_HALF_STEPS = 4
# Forecast steps in a row, at most: an eighth of the steps, but no fewer and no more than these. Twice as many lie
# between two full ones.
FORECAST_LIMITS = (3, 6)
FORECAST_SHARE = 8
# A prediction takes this many differences of the two halves, so it is measured once as many have been computed.
# A forecast takes as many outputs.
MIN_HISTORY = 2
# The tolerance of a half step, as a share of that of a forecast step. Its whole error is one of guidance, which every
# later step of the kind repeats. Where nothing is forecast, half steps have the tolerance of both.
HALF_STEP_SHARE = 2 / 3
HALF_STEP_SHARE_ALONE = 3.0


class StepErrors(NamedTuple):
    """
    How far off predictions were, relative to the guided output; `None` if none was compared.

    Args:
        difference (`float`, *optional*): The error of the predicted difference of the two halves of guidance.
        forecast (`float`, *optional*): The error of the forecast output.
    """

    difference: float | None = None
    forecast: float | None = None


NO_ERRORS = StepErrors()


class GapLimits(NamedTuple):
    """
    How many steps predictions may bridge.

    Args:
        forecast (`int`): Forecast steps in a row.
        between_full (`int`): Steps between two full ones.
    """

    forecast: int
    between_full: int

    @classmethod
    def of(cls, num_inference_steps: int) -> GapLimits:
        """The limits of a run: the more steps it has, the nearer they are to each other."""
        least, most = FORECAST_LIMITS
        forecast = min(max(least, num_inference_steps // FORECAST_SHARE), most)
        return cls(forecast, 2 * forecast)


class AdaptiveController:
    """
    The controller of `gate_step="auto"` where nothing is forecast: full steps and half steps.

    A full step measures how far off the prediction for it was. If the error is below `tolerance`, the next gap of half
    steps is one longer than the last. If it is below twice `tolerance`, the gap is one shorter. Otherwise there is no
    gap.

    Together with a cache that hardly computes anything in some steps, a gap of two steps or more lasts until one of its
    steps was computed.

    Args:
        tolerance (`float`): Accepted error of the guided output, relative to that output.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._interval = 0
        self._remaining = 0
        self._computed = False

    @property
    def can_skip(self) -> bool:
        """Whether any error is small enough for a half step."""
        return self._tolerance > 0

    def next_level(self, num_inference_steps: int, *, guided: bool = True, is_last: bool = False) -> Level:
        """The level of the step that runs now."""
        return Level.HALF if self._remaining else Level.FULL

    def end_step(self, level: Level, errors: StepErrors = NO_ERRORS, *, computed: bool = True) -> None:
        """
        A step has ended.

        Args:
            level (`Level`): Its level.
            errors (`StepErrors`, *optional*): How far off predictions for it were.
            computed (`bool`, *optional*, defaults to `True`): Whether it was computed, not repeated by a cache.
        """
        if level is Level.FULL:
            self._end_full_step(errors.difference)
            return
        self._computed = self._computed or computed
        waits = self._interval > 1 and not self._computed
        self._remaining = max(self._remaining - 1, int(waits))

    def _end_full_step(self, error: float | None) -> None:
        """A step with both halves has ended."""
        # NaN counts as above every tolerance.
        if error is not None and error < self._tolerance:
            self._interval = min(self._interval + 1, MAX_HALF_STEPS)
        elif error is not None and error < 2 * self._tolerance:
            self._interval = max(self._interval - 1, 0)
        else:
            self._interval = 0
        self._remaining = self._interval
        self._computed = False


class LevelController:
    """
    The controller of `gate_step="auto"`: full steps, half steps and forecast steps.

    Every step that computes the denoiser measures how far off a forecast of its output would have been, and every full
    step how far off the predicted difference was. Both say what the error of the next step would be: that of a linear
    forecast over `k` steps, from two that are `h` steps apart, grows as `k * (k + h)`, and that of a difference as the
    steps since the last full one. The step is a forecast one if both errors together are below `tolerance`, else a half
    step if that of the difference is below its share of it, else a full step.

    Args:
        tolerance (`float`): Accepted error of the guided output, relative to that output.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._step = 0
        # The last two steps that computed the denoiser, and the last full one.
        self._computed: list[int] = []
        self._full: int | None = None
        # The last errors, divided by what they grow with.
        self._forecast_rate: float | None = None
        self._difference_rate: float | None = None

    @property
    def can_skip(self) -> bool:
        """Whether any error is small enough for a step that is not full."""
        return self._tolerance > 0

    def next_level(self, num_inference_steps: int, *, guided: bool = True, is_last: bool = False) -> Level:
        """
        The level of the step that runs now.

        Args:
            num_inference_steps (`int`): Steps of the whole loop.
            guided (`bool`, *optional*, defaults to `True`): Whether it has guidance of two halves.
            is_last (`bool`, *optional*, defaults to `False`): Whether it is the last one, which is not forecast.
        """
        difference = self._difference_error() if guided else 0.0
        limits = GapLimits.of(num_inference_steps)
        if difference is None or (guided and self._step - (self._full or 0) > limits.between_full):
            return Level.FULL
        forecast = None if is_last else self._forecast_error(limits.forecast)
        # NaN is below no tolerance.
        if forecast is not None and math.hypot(forecast, difference) < self._tolerance:
            return Level.FORECAST
        if guided and difference < HALF_STEP_SHARE * self._tolerance:
            return Level.HALF
        return Level.FULL

    def end_step(self, level: Level, errors: StepErrors = NO_ERRORS, *, computed: bool = True) -> None:
        """
        A step has ended.

        Args:
            level (`Level`): Its level.
            errors (`StepErrors`, *optional*): How far off predictions for it were.
            computed (`bool`, *optional*, defaults to `True`): Ignored: beside a cache nothing is forecast.
        """
        now, self._step = self._step, self._step + 1
        if level is Level.FORECAST:
            return
        if errors.forecast is not None and len(self._computed) == MIN_HISTORY:
            self._forecast_rate = errors.forecast / self._forecast_growth(now)
        self._computed = [*self._computed[-1:], now]
        if level is Level.FULL:
            if errors.difference is not None and self._full is not None:
                self._difference_rate = errors.difference / (now - self._full)
            self._full = now

    def _difference_error(self) -> float | None:
        """What the error of the predicted difference would be in this step, if it is known."""
        if self._difference_rate is None or self._full is None:
            return None
        return self._difference_rate * (self._step - self._full)

    def _forecast_error(self, limit: int) -> float | None:
        """What the error of the forecast output would be in this step, if it is known and not too far ahead."""
        if self._forecast_rate is None or self._step - self._computed[-1] > limit:
            return None
        return self._forecast_rate * self._forecast_growth(self._step)

    def _forecast_growth(self, step: int) -> int:
        """What the error of a linear forecast grows with."""
        before, last = self._computed
        return (step - last) * (step - before)
