"""The guidance of one loop: what its two halves differ by, noted in full steps and predicted in half steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..plan.adaptive import LEAD
from ..plan.schedule import TGateSchedule
from ..plan.steps import StepCounter, Timeline
from .prediction import CFGDifference, guided_output, predict, relative_error


class Guidance:
    """
    The difference of the two halves of a denoiser's output, in the last full steps of a loop.

    Args:
        measures (`bool`, *optional*, defaults to `False`): Whether predictions are compared with what is computed.

    Attributes:
        error (`float`, *optional*): The largest error that was measured in this step.
    """

    def __init__(self, *, measures: bool = False) -> None:
        self._measures = measures
        self.error: float | None = None
        # Of each full step, the differences of the parts of the output.
        self._known: list[list[CFGDifference]] = []
        self._tokens: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(difference.value.nbytes for known in self._known for difference in known)

    @property
    def judges(self) -> bool:
        """Whether the next difference that is computed has a prediction to be compared with."""
        return len(self._known) >= LEAD

    def read(self, tokens: int) -> None:
        """The pipeline reads so many tokens of an output, the first ones: others say nothing of guidance."""
        self._tokens = tokens
        self._known = [
            [CFGDifference(at, part[:, :tokens].clone() if part.shape[1] > tokens else part) for at, part in known]
            for known in self._known
        ]

    def note(
        self, position: int, halves: Sequence[Sequence[torch.Tensor]], unconditional: int, scale: Any = None
    ) -> None:
        """
        Both halves were computed.

        Args:
            position (`int`): The pass of the loop.
            halves (`Sequence`): The two halves of each part of the output.
            unconditional (`int`): Which of them is the unconditional one, 0 or 1.
            scale (`float` or `list`, *optional*):
                Guidance scale, or one for each part; only needed where errors are measured.
        """
        halves = [[half[:, : self._tokens] for half in pair] for pair in halves]
        computed = [CFGDifference(position, second - first) for first, second in halves]
        if self._known and [each.value.shape for each in self._known[-1]] != [each.value.shape for each in computed]:
            self._known.clear()
        if self._known and self._known[-1][0].position == position:
            # Calls before the loop count as part of its first pass.
            self._known.pop()
        if self._measures and self.judges:
            scales = scale if isinstance(scale, list) else [scale] * len(halves)
            for pair, predicted, known, own in zip(halves, self.predicted(position), computed, scales, strict=True):
                self._measure(relative_error(predicted, known.value, guided_output(pair, unconditional, own), own))
        self._known = [*self._known[1 - LEAD :], computed]

    def predicted(self, position: int) -> list[torch.Tensor]:
        """The second half minus the first, in a later pass, of each part of the output."""
        return [predict(known, position) for known in zip(*self._known, strict=True)]

    def _measure(self, errors: torch.Tensor) -> None:
        """The one wait for the device in a full step: the sample with the largest error decides for all."""
        # Without values, as in `estimate_cost`, every prediction is right, which gives the fewest full steps.
        error = 0.0 if errors.is_meta else float(errors.detach().max())
        if self.error is None or not error <= self.error:
            self.error = error


class GuidedStepCounter(StepCounter):
    """
    A loop, and what the halves of its guidance differ by.

    Args:
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        timeline (`Timeline`): What the pipeline says of the loop.
        calls (`int`, *optional*, defaults to 1): Calls of the denoiser that guidance of two halves is made of.

    Attributes:
        guidance (`Guidance`, *optional*): What the halves of guidance differ by, if that is predicted.
    """

    def __init__(self, schedule: TGateSchedule, timeline: Timeline, calls: int = 1) -> None:
        self.guidance: Guidance | None = None
        super().__init__(schedule, timeline, calls)

    @property
    def judges(self) -> bool:
        """Whether what the next full step computes has a prediction to be compared with."""
        return self.guidance is not None and self.guidance.judges

    @property
    def error(self) -> float | None:
        """How far off a prediction was in the step that runs now, if one was compared."""
        return None if self.guidance is None else self.guidance.error

    def begin_guidance(self) -> None:
        """Start with nothing known of guidance: at the beginning, and when another denoiser takes over."""
        super().begin_guidance()
        self.guidance = Guidance(measures=self.controller is not None) if self._schedule.predicts else None

    def end_guided_step(self, *, full: bool, computed: bool) -> None:
        """A step of the loop has ended."""
        super().end_guided_step(full=full, computed=computed)
        if self.guidance is not None:
            self.guidance.error = None
