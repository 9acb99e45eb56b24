"""The guidance of one loop: what its two halves differ by, noted in full steps and predicted in half steps."""

from __future__ import annotations

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
        self._known: list[CFGDifference] = []
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
            CFGDifference(known.position, known.value[:, :tokens].clone()) if known.value.shape[1] > tokens else known
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
        if self._measures and self.judges:
            guided = guided_output(halves, unconditional, scale)
            self._measure(relative_error(predict(self._known, position), computed, guided, scale))
        self._known = [*self._known[1 - LEAD :], CFGDifference(position, computed)]

    def predicted(self, position: int) -> torch.Tensor:
        """The second half minus the first, in a later pass."""
        return predict(self._known, position)

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
