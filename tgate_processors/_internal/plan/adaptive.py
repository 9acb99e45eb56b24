"""When guidance is computed again, decided by the error of its predictions. Pure Python, no torch."""

from __future__ import annotations

# Half steps in a row, at most.
MAX_HALF_STEPS = 4
# A prediction takes this many differences of the two halves, so it is measured once as many have been computed.
MIN_HISTORY = 2


class AdaptiveController:
    """
    The controller of `gate_step="auto"`.

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

    @property
    def is_full_step(self) -> bool:
        """Whether the step that runs now computes both halves."""
        return self._remaining == 0

    def end_full_step(self, error: float | None) -> None:
        """
        A step with both halves has ended.

        Args:
            error (`float`, *optional*): How far off the prediction was; `None` if there was none.
        """
        # NaN counts as above every tolerance.
        if error is not None and error < self._tolerance:
            self._interval = min(self._interval + 1, MAX_HALF_STEPS)
        elif error is not None and error < 2 * self._tolerance:
            self._interval = max(self._interval - 1, 0)
        else:
            self._interval = 0
        self._remaining = self._interval
        self._computed = False

    def end_half_step(self, *, computed: bool = True) -> None:
        """
        A step without both halves has ended.

        Args:
            computed (`bool`, *optional*, defaults to `True`): Whether it was computed, not repeated by a cache.
        """
        self._computed = self._computed or computed
        waits = self._interval > 1 and not self._computed
        self._remaining = max(self._remaining - 1, int(waits))
