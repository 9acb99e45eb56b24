"""When guidance is computed again: set by the error of what was predicted. Pure Python, no torch."""

from __future__ import annotations

# Half steps in a row, at most.
LONGEST_GAP = 4
# Differences of the two halves that a prediction is made from, and that are computed before any is judged.
LEAD = 2


class Pace:
    """
    The controller of `gate_step="auto"`.

    A full step measures how far the prediction for it was off. Below `tolerance` the next full step comes one half step
    later than the last one did, below twice that one earlier, else at once.

    Args:
        tolerance (`float`): Error of the guided output, relative to it, that is accepted.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._gap = 0
        self._left = 0

    @property
    def may_open(self) -> bool:
        """Whether any error is small enough for a half step."""
        return self._tolerance > 0

    @property
    def full(self) -> bool:
        """Whether the step that runs now computes both halves."""
        return self._left == 0

    def end_full_step(self, error: float | None) -> None:
        """
        A step with both halves has ended.

        Args:
            error (`float`, *optional*): How far the prediction was off; nothing if there was none.
        """
        # Not a number is above every tolerance.
        if error is not None and error < self._tolerance:
            self._gap = min(self._gap + 1, LONGEST_GAP)
        elif error is not None and error < 2 * self._tolerance:
            self._gap = max(self._gap - 1, 0)
        else:
            self._gap = 0
        self._left = self._gap

    def end_half_step(self) -> None:
        """A step with one half has ended."""
        self._left = max(self._left - 1, 0)
