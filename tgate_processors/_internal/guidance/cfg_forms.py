"""
The forms of classifier-free guidance: two halves of one batch, two calls of the denoiser, or a guider.

A form of its own is a subclass of `CFGForm`: how often the denoiser is called in a step, where both halves are seen,
and what stands for the half that is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from ..denoiser.batch import complete_second_call, guided_parts
from ..denoiser.inputs import DenoiserInputs
from ..denoiser.spec import Layout
from ..plan.schedule import TGateSchedule
from .predictor import GuidancePredictor


class ComputedCall(NamedTuple):
    """
    A call of the denoiser that has run.

    Args:
        position (`int`): The pass of the loop.
        output (`torch.Tensor` or container): What the denoiser has given.
        inputs (`DenoiserInputs`): What it was given.
        call_index (`int`): Which of the calls of the step it was.
        uncond_index (`int`): Which half of a batch is the unconditional one, 0 or 1.
        denoiser_index (`int`): The denoiser's place among those of the pipeline.
        cache_hit (`bool`): Whether a cache has repeated what it gave before, which says nothing new of guidance.
    """

    position: int
    output: Any
    inputs: DenoiserInputs
    call_index: int = 0
    uncond_index: int = 0
    denoiser_index: int = 0
    cache_hit: bool = False


class CFGForm:
    """
    The guidance of a run. It owns the predictor of the loop that runs, and the error that this step has shown.

    Args:
        schedule (`TGateSchedule`): Whether guidance is predicted, and whether errors are measured.

    Attributes:
        error (`float`, *optional*): The largest error that was measured in this step.
    """

    calls_per_step: ClassVar[int] = 1

    def __init__(self, schedule: TGateSchedule) -> None:
        self._schedule = schedule
        self._predictor: GuidancePredictor | None = None
        self.error: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held in differences of the halves."""
        return 0 if self._predictor is None else self._predictor.nbytes

    @property
    def has_history(self) -> bool:
        """Whether what the next full step computes has a prediction to be compared with."""
        return self._predictor is not None and self._predictor.has_history

    @property
    def lacks_history(self) -> bool:
        """Whether guidance is predicted, but not enough is known of it yet."""
        return self._predictor is not None and not self._predictor.has_history

    def begin(self) -> None:
        """Begin without history: at the start of a loop, and when the history no longer holds."""
        self._predictor = GuidancePredictor(measures_errors=self._schedule.is_auto) if self._schedule.predicts else None
        self.error = None

    def release(self) -> None:
        """A loop has ended: release cached tensors."""
        self._predictor = None

    def limit_tokens(self, tokens: int) -> None:
        """Keep the first tokens of each difference: the pipeline does not read the others."""
        if self._predictor is not None:
            self._predictor.limit_tokens(tokens)

    def record(self, position: int, halves: Sequence[Sequence[torch.Tensor]], uncond_index: int, scale: Any) -> None:
        """Record both halves of each part of an output. This is the one wait for the device in a full step."""
        if self._predictor is None:
            return
        errors = self._predictor.record(position, halves, uncond_index, scale)
        if errors is None:
            return
        # The sample with the largest error decides for all. NaN counts as above every tolerance.
        error = float(errors.detach().max())
        if self.error is None or not error <= self.error:
            self.error = error

    def predict(self, position: int) -> list[torch.Tensor] | None:
        """Predict the second half minus the first, of each part; `None` where guidance is dropped."""
        return None if self._predictor is None else self._predictor.predict(position)


class DenoiserCFG(CFGForm):
    """
    Guidance that the pipeline computes itself from the outputs of its denoiser.

    Args:
        schedule (`TGateSchedule`): Whether guidance is predicted, and whether errors are measured.
        layout (`Layout`): The outputs of the denoiser.
        scale_of (`Callable`): What guidance multiplies the difference with, by the denoiser's place in the pipeline.
    """

    def __init__(self, schedule: TGateSchedule, layout: Layout, scale_of: Callable[[int], Any]) -> None:
        super().__init__(schedule)
        self._layout = layout
        self._scale_of = scale_of
        # The outputs of the calls of this step that are skipped.
        self._ready_outputs: list[Any] = []

    @property
    def skips_call(self) -> bool:
        """Whether the call of the denoiser that comes next is skipped."""
        return bool(self._ready_outputs)

    def take_output(self) -> Any:
        """The output of the call that is skipped."""
        return self._ready_outputs.pop(0)

    def release(self) -> None:
        """A loop has ended: release cached tensors."""
        super().release()
        self._ready_outputs.clear()

    def end_pass(self, latents: Any, *, ends_step: bool) -> None:
        """A pass has ended with these latents; it may be the last one of its step."""
        if ends_step:
            self.error = None
        packed = isinstance(latents, torch.Tensor) and latents.dim() == 3
        if self._layout.reference_tokens_last and packed:
            # The tokens of a reference image follow those of the latents.
            self.limit_tokens(latents.shape[1])

    def complete(self, call: ComputedCall) -> list[torch.Tensor] | None:
        """
        The denoiser has computed one half, in a half step: complete it.

        Returns:
            `list` of `torch.Tensor`, *optional*: The second half minus the first, of each part, for the hooks to add.
        """
        raise NotImplementedError

    def observe(self, call: ComputedCall) -> None:
        """The denoiser has given its output, in a full step."""
        raise NotImplementedError

    def _parts_of(self, call: ComputedCall) -> list[torch.Tensor]:
        """The parts of a call's output that guidance combines."""
        return guided_parts(call.output, call.inputs, self._layout)

    def _record_halves(self, call: ComputedCall, halves: Sequence[Sequence[torch.Tensor]], uncond_index: int) -> None:
        """Record both halves, with the scale that the pipeline has for them."""
        scale = self._scale_of(call.denoiser_index) if self._schedule.is_auto else None
        self.record(call.position, halves, uncond_index, scale)


class BatchedCFG(DenoiserCFG):
    """Two halves of one batch. A half step runs on one of them, and the hooks complete its output."""

    def complete(self, call: ComputedCall) -> list[torch.Tensor] | None:
        """Predict the difference with which the hooks complete the batch."""
        return self.predict(call.position)

    def observe(self, call: ComputedCall) -> None:
        """Record both halves, which were computed at once."""
        if self._predictor is not None and not call.cache_hit:
            self._record_halves(call, [part.chunk(2) for part in self._parts_of(call)], call.uncond_index)


class SequentialCFG(DenoiserCFG):
    """Two calls of the denoiser, the conditional one first. The second call of a half step is skipped."""

    calls_per_step = 2

    def __init__(self, schedule: TGateSchedule, layout: Layout, scale_of: Callable[[int], Any]) -> None:
        super().__init__(schedule, layout, scale_of)
        self._first: list[torch.Tensor] | None = None

    def release(self) -> None:
        """A loop has ended: release cached tensors."""
        super().release()
        self._first = None

    def complete(self, call: ComputedCall) -> None:
        """Make the output of the second call from that of the first."""
        difference = self.predict(call.position)
        self._ready_outputs = [
            complete_second_call(call.output, difference, lambda whole: guided_parts(whole, call.inputs, self._layout))
        ]

    def observe(self, call: ComputedCall) -> None:
        """Remember the output of the first call, or record both with that of the second."""
        if self._predictor is None:
            return
        first, self._first = self._first, None
        if call.call_index == 0:
            self._first = self._parts_of(call)
        elif first is not None and not call.cache_hit:
            self._record_halves(call, [*zip(first, self._parts_of(call), strict=True)], 1)


class GuiderCFG(CFGForm):
    """A guider of diffusers, which asks for the conditional half first. A half step asks for nothing else."""


def form_of(schedule: TGateSchedule, layout: Layout, scale_of: Callable[[int], Any]) -> DenoiserCFG:
    """The form of guidance of a family."""
    return (SequentialCFG if layout.calls_per_step > 1 else BatchedCFG)(schedule, layout, scale_of)
