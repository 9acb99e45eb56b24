"""What the two halves of guidance differ by: recorded in full steps, predicted in half steps."""

from __future__ import annotations

from typing import Any

import torch

from ..plan.adaptive import LEAD
from .prediction import CFGDifference, guided_output, predict, relative_error


class GuidancePredictor:
    """
    The difference of the two halves of a denoiser's output, in the last full steps of a loop.

    Args:
        measures (`bool`, *optional*, defaults to `False`): Whether predictions are compared with what is computed.
    """

    def __init__(self, *, measures: bool = False) -> None:
        self._measures = measures
        self._history: list[CFGDifference] = []
        self._tokens: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(difference.value.nbytes for difference in self._history)

    @property
    def has_history(self) -> bool:
        """Whether the next difference that is computed has a prediction to be compared with."""
        return len(self._history) >= LEAD

    def limit_tokens(self, tokens: int) -> None:
        """Keep the first tokens of a difference: the pipeline does not read the others, which say nothing of it."""
        self._tokens = tokens
        self._history = [
            CFGDifference(each.position, each.value[:, :tokens].clone()) if each.value.shape[1] > tokens else each
            for each in self._history
        ]

    def record(
        self, position: int, halves: tuple[torch.Tensor, torch.Tensor], unconditional: int, scale: Any = None
    ) -> torch.Tensor | None:
        """
        Both halves were computed.

        Args:
            position (`int`): The pass of the loop.
            halves (`tuple` of `torch.Tensor`): The halves of the output.
            unconditional (`int`): Which of them is the unconditional one, 0 or 1.
            scale (`float` or `torch.Tensor`, *optional*): Guidance scale; only needed where errors are measured.

        Returns:
            `torch.Tensor`, *optional*: How far off the prediction for each sample was, if there was one to compare.
        """
        halves = halves[0][:, : self._tokens], halves[1][:, : self._tokens]
        guided = guided_output(halves, unconditional, scale) if self._measures else None
        return self.record_difference(CFGDifference(position, halves[1] - halves[0]), guided, scale)

    def record_difference(
        self, difference: CFGDifference, guided: torch.Tensor | None, scale: Any
    ) -> torch.Tensor | None:
        """The same, for a difference and a guided output that are known already."""
        if self._history and self._history[-1].value.shape != difference.value.shape:
            self._history.clear()
        if self._history and self._history[-1].position == difference.position:
            # Calls before the loop count as part of its first pass.
            self._history.pop()
        errors = None
        if guided is not None and self.has_history:
            predicted = predict(self._history, difference.position)
            errors = relative_error(predicted, difference.value, guided, scale)
        self._history = [*self._history[1 - LEAD :], difference]
        return errors

    def predict(self, position: int) -> torch.Tensor:
        """The second half minus the first, in a later pass."""
        return predict(self._history, position)
