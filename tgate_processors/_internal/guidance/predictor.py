"""The guidance of one loop: what its two halves differ by, noted in full steps and predicted in half steps."""

from __future__ import annotations

from typing import Any

import torch

from ..plan.adaptive import LEAD, Pace
from .prediction import Difference, guided_output, predict, relative_error


class Guidance:
    """
    The difference of the two halves of a denoiser's output, in the last full steps of a loop.

    Args:
        tolerance (`float`, *optional*): The accepted error of a prediction. Nothing is measured without it.

    Attributes:
        pace (`Pace`, *optional*): What says which steps are full.
        error (`float`, *optional*): The largest error that was measured in this step.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self.pace = None if tolerance is None else Pace(tolerance)
        self.error: float | None = None
        self._known: list[Difference] = []
        self._tokens: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(difference.value.nbytes for difference in self._known)

    @property
    def judges(self) -> bool:
        """Whether the next difference that is computed has a prediction to be compared with."""
        return len(self._known) >= LEAD

    def read(self, tokens: int) -> None:
        """The pipeline reads so many tokens of an output, the first ones: others say nothing of guidance."""
        self._tokens = tokens
        self._known = [
            Difference(known.position, known.value[:, :tokens].clone()) if known.value.shape[1] > tokens else known
            for known in self._known
        ]

    def note(self, position: int, halves: tuple[torch.Tensor, torch.Tensor], unconditional: int, scale: Any) -> None:
        """
        Both halves were computed.

        Args:
            position (`int`): The pass of the loop.
            halves (`tuple` of `torch.Tensor`): The halves of the output.
            unconditional (`int`): Which of them is the unconditional one, 0 or 1.
            scale (`float` or `torch.Tensor`): Guidance scale; only needed where errors are measured.
        """
        halves = halves[0][:, : self._tokens], halves[1][:, : self._tokens]
        computed = halves[1] - halves[0]
        if self._known and self._known[-1].value.shape != computed.shape:
            self._known.clear()
        if self._known and self._known[-1].position == position:
            # Calls before the loop count as part of its first pass.
            self._known.pop()
        if self.pace is not None and self.judges:
            guided = guided_output(halves, unconditional, scale)
            self._measure(relative_error(predict(self._known, position), computed, guided, scale))
        self._known = [*self._known[1 - LEAD :], Difference(position, computed)]

    def predicted(self, position: int) -> torch.Tensor:
        """The second half minus the first, in a later pass."""
        return predict(self._known, position)

    def end_step(self, *, full: bool, computed: bool = True) -> None:
        """
        A step of the loop has ended.

        Args:
            full (`bool`): Whether both halves were computed in it.
            computed (`bool`, *optional*, defaults to `True`): Whether anything was, and not repeated by a cache.
        """
        if self.pace is not None:
            if full:
                self.pace.end_full_step(self.error)
            else:
                self.pace.end_half_step(computed=computed)
        self.error = None

    def _measure(self, errors: torch.Tensor) -> None:
        """The one wait for the device in a full step: the sample with the largest error decides for all."""
        # Without values, as in `estimate_cost`, every prediction is right, which gives the fewest full steps.
        error = 0.0 if errors.is_meta else float(errors.detach().max())
        if self.error is None or not error <= self.error:
            self.error = error
