"""What the two halves of guidance differ by: recorded in full steps, predicted in half steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..plan.adaptive import MIN_HISTORY
from .prediction import CFGDifference, apply_cfg, predict, relative_error


class GuidedPart(NamedTuple):
    """
    A part of an output (video, sound) of which both halves were computed.

    Args:
        difference (`torch.Tensor`): Second half minus first half.
        guided (`torch.Tensor`): The guided output.
        scale (`float` or `torch.Tensor`): Guidance scale.
    """

    difference: torch.Tensor
    guided: torch.Tensor
    scale: Any


class GuidancePredictor:
    """
    The difference of the two halves of a denoiser's output, in the last full steps of a loop, for each of its parts.

    Args:
        measures_errors (`bool`, *optional*, defaults to `False`): Whether errors of predictions are measured.
    """

    def __init__(self, *, measures_errors: bool = False) -> None:
        self._measures_errors = measures_errors
        # Of each full step, the differences of the parts of the output.
        self._history: list[list[CFGDifference]] = []
        self._num_tokens: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(difference.value.nbytes for parts in self._history for difference in parts)

    @property
    def history(self) -> list[tuple[int, list[torch.Tensor]]]:
        """The passes in which both halves were computed, and the difference of each part."""
        return [(parts[0].position, [each.value for each in parts]) for parts in self._history]

    @history.setter
    def history(self, history: Sequence[tuple[int, Sequence[torch.Tensor]]]) -> None:
        """Go on from what another one has recorded."""
        self._history = [[CFGDifference(position, each) for each in parts] for position, parts in history]

    @property
    def has_history(self) -> bool:
        """Whether the next difference that is computed has a prediction to be compared with."""
        return len(self._history) >= MIN_HISTORY

    def limit_tokens(self, tokens: int) -> None:
        """Keep the first tokens of each difference: the pipeline does not read the others."""
        self._num_tokens = tokens
        self._history = [
            [CFGDifference(at, part[:, :tokens].clone() if part.shape[1] > tokens else part) for at, part in parts]
            for parts in self._history
        ]

    def record(
        self, position: int, halves: Sequence[Sequence[torch.Tensor]], uncond_index: int, scale: Any = None
    ) -> torch.Tensor | None:
        """
        Record both halves of a full step.

        Args:
            position (`int`): The pass of the loop.
            halves (`Sequence`): The two halves, of each part of the output.
            uncond_index (`int`): Which of them is the unconditional one, 0 or 1.
            scale (`float` or `list`, *optional*):
                Guidance scale, or one for each part; only needed where errors are measured.

        Returns:
            `torch.Tensor`, *optional*: How far off the predictions for each part and sample were, if there were any.
        """
        halves = [[half[:, : self._num_tokens] for half in pair] for pair in halves]
        differences = [second - first for first, second in halves]
        if not self._measures_errors:
            return self._add_to_history(position, differences)
        scales = scale if isinstance(scale, list) else [scale] * len(halves)
        guided = [apply_cfg(pair, uncond_index, own) for pair, own in zip(halves, scales, strict=True)]
        return self.record_parts(position, [*map(GuidedPart, differences, guided, scales)])

    def record_parts(self, position: int, parts: Sequence[GuidedPart]) -> torch.Tensor | None:
        """Record the parts of an output whose differences and guided outputs are computed already."""
        return self._add_to_history(position, [part.difference for part in parts], parts)

    def predict(self, position: int) -> list[torch.Tensor]:
        """Predict the second half minus the first, in a later pass, of each part of the output."""
        return [predict(known, position) for known in zip(*self._history, strict=True)]

    def _add_to_history(
        self, position: int, differences: Sequence[torch.Tensor], parts: Sequence[GuidedPart] = ()
    ) -> torch.Tensor | None:
        """Add differences to the history, and measure how far off their predictions were."""
        shapes = [each.shape for each in differences]
        if self._history and [each.value.shape for each in self._history[-1]] != shapes:
            self._history.clear()
        if self._history and self._history[-1][0].position == position:
            # Calls before the loop count as part of its first pass.
            self._history.pop()
        errors = None
        if parts and self.has_history:
            compared = zip(self.predict(position), parts, strict=True)
            errors = torch.cat([relative_error(predicted, *part) for predicted, part in compared])
        self._history = [*self._history[1 - MIN_HISTORY :], [CFGDifference(position, each) for each in differences]]
        return errors
