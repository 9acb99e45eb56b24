"""What the two halves of guidance gave in the forwards of a run: noted where both ran, else predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..caches.adapter import CacheAdapters
from ..denoiser.batch import guided_parts, second_of
from ..denoiser.inputs import DenoiserInputs
from ..denoiser.spec import Layout
from ..plan.report_builder import ReportBuilder
from .batch_check import CFGBatchCheck
from .predictor import GuidedStepCounter


class Differences:
    """
    Between the denoiser, which gives outputs, and the guidance of a loop, which knows what their halves differ by.

    Args:
        scale_of (`Callable`): Tells what guidance multiplies the difference with, by the denoiser's place.
        batch (`CFGBatchCheck`): Which half is which.
        layout (`Layout`): How the family does guidance.
        adapters (`CacheAdapters`): The caches of others.
        report_builder (`ReportBuilder`): The report, which lists the errors.
        is_auto (`bool`): Whether errors are measured.
    """

    def __init__(
        self,
        scale_of: Callable[[int], Any],
        batch: CFGBatchCheck,
        layout: Layout,
        adapters: CacheAdapters,
        report_builder: ReportBuilder,
        *,
        is_auto: bool,
    ) -> None:
        self._scale_of = scale_of
        self._batch = batch
        self._layout = layout
        self._adapters = adapters
        self._report_builder = report_builder
        self._is_auto = is_auto
        self._first: list[torch.Tensor] | None = None
        self._left_out: Any = None

    def of_first(
        self, loop: GuidedStepCounter, output: Any, seen: DenoiserInputs, *, half: bool, expert: int
    ) -> list[torch.Tensor] | None:
        """
        The first forward of a guided step has given its output.

        Args:
            loop (`GuidedStepCounter`): Its loop.
            output (`torch.Tensor` or container): The output.
            seen (`DenoiserInputs`): What the denoiser was given.
            half (`bool`): Whether it is the only one, and on one half.
            expert (`int`): The denoiser's place among those of the pipeline.

        Returns:
            `list` of `torch.Tensor`, *optional*: What the half that was left out of a batch is to have more.
        """
        guidance = loop.guidance
        if half:
            predicted = None if guidance is None else guidance.predicted(loop.passes)
            if self._layout.calls == 1:
                return predicted
            self._left_out = second_of(output, predicted, lambda whole: guided_parts(whole, seen, self._layout))
            return None
        if guidance is None or not loop.may_halve or (self._layout.calls == 1 and self._repeats()):
            return None
        parts = guided_parts(output, seen, self._layout)
        if self._layout.calls > 1:
            self._first = parts
        else:
            halves = [part.chunk(2) for part in parts]
            self._note(loop, halves, 0 if self._batch.unconditional_first else 1, expert)
        return None

    def of_second(self, loop: GuidedStepCounter, output: Any, seen: DenoiserInputs, *, expert: int) -> None:
        """The second call of a full step has given its output."""
        first, self._first = self._first, None
        if first is not None and not self._repeats():
            self._note(loop, [*zip(first, guided_parts(output, seen, self._layout), strict=True)], 1, expert)

    def read(self, loop: GuidedStepCounter, latents: Any) -> None:
        """A step has ended, with these latents: what follows them in an output is not read."""
        packed = isinstance(latents, torch.Tensor) and latents.dim() == 3
        if self._layout.given_last and loop.guidance is not None and packed:
            loop.guidance.read(latents.shape[1])

    @property
    def leaves_out(self) -> bool:
        """Whether the second call of this step is left out."""
        return self._left_out is not None

    def left_out(self) -> Any:
        """The output of the call that is left out, once."""
        output, self._left_out = self._left_out, None
        return output

    def forget(self) -> None:
        """Hold nothing."""
        self._first = self._left_out = None

    def _repeats(self) -> bool:
        """Whether the step that has run says nothing new of guidance, because a cache has repeated it."""
        return self._is_auto and self._adapters.repeated()

    def _note(
        self, loop: GuidedStepCounter, halves: Sequence[Sequence[torch.Tensor]], unconditional: int, expert: int
    ) -> None:
        """Both halves of guidance were computed, of each part."""
        assert loop.guidance is not None
        scale = self._scale_of(expert) if self._is_auto else None
        loop.guidance.note(loop.passes, halves, unconditional, scale)
        if loop.guidance.error is not None:
            self._report_builder.measured(loop.step_index, loop.guidance.error)
