"""Guidance that a pipeline computes itself from the outputs of its denoiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..denoiser.batch import guided_parts, stack_samples, unstack_samples
from ..denoiser.inputs import DenoiserInputs
from ..denoiser.spec import BatchLayout
from ..plan.schedule import TGateSchedule
from .auxiliary import AuxiliaryCalls
from .cfg_form import CFGForm
from .prediction import apply_cfg, largest_error, relative_error


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
        is_split (`bool`): Whether it has guidance of two halves, of which one can be skipped.
        active_index (`int`): Which half of a batch half steps compute, 0 or 1.
        num_samples (`int`, *optional*): How many samples it is for, if known.
    """

    position: int
    output: Any
    inputs: DenoiserInputs
    call_index: int = 0
    uncond_index: int = 0
    denoiser_index: int = 0
    cache_hit: bool = False
    is_split: bool = True
    active_index: int = 1
    num_samples: int | None = None


class DenoiserCFG(CFGForm):
    """
    Guidance that the pipeline computes itself from the outputs of its denoiser.

    Args:
        schedule (`TGateSchedule`): Whether guidance is predicted, and whether errors are measured.
        layout (`BatchLayout`): The outputs of the denoiser.
        scale_of (`Callable`): What guidance multiplies the difference with, by the denoiser's place in the pipeline.
    """

    def __init__(self, schedule: TGateSchedule, layout: BatchLayout, scale_of: Callable[[int], Any]) -> None:
        super().__init__(schedule)
        self._layout = layout
        self._scale_of = scale_of
        self._num_tokens: int | None = None
        # The outputs of the calls of this step that are skipped.
        self._ready_outputs: list[Any] = []
        self._auxiliary = AuxiliaryCalls()

    def begin(self, *, can_forecast: bool = False) -> None:
        """Begin without history: at the start of a loop, and when the history no longer holds."""
        super().begin(can_forecast=can_forecast)
        self._num_tokens = None
        self._auxiliary.begin()

    @property
    def nbytes(self) -> int:
        """Bytes held in differences of the halves, and in outputs to forecast from."""
        return super().nbytes + self._auxiliary.nbytes

    @property
    def can_forecast(self) -> bool:
        """Whether enough is known to forecast every call of a step."""
        return super().can_forecast and self._auxiliary.can_forecast(measures_errors=self._schedule.is_auto)

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
        self._auxiliary.begin()

    def end_pass(self, latents: Any, *, ends_step: bool) -> None:
        """A pass has ended with these latents; it may be the last one of its step."""
        if ends_step:
            self.end_step()
        self._auxiliary.end_pass()
        packed = isinstance(latents, torch.Tensor) and latents.dim() == 3
        if self._layout.reference_tokens_last and packed:
            # The tokens of a reference image follow those of the latents.
            self._num_tokens = latents.shape[1]
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

    def observe_output(self, call: ComputedCall) -> None:
        """The pipeline gets this output of a call that was computed, with both halves in it if it is split."""
        raise NotImplementedError

    def forecast(self, call: ComputedCall) -> Any:
        """The output of the first call of a step in which none is computed; those of the others are made ready."""
        raise NotImplementedError

    def observe_auxiliary(self, call: ComputedCall, settings: Any, scales: Sequence[float]) -> None:
        """A further call has run, which guidance compares with the conditional half, with these scales."""
        if self._forecaster is None:
            return
        errors = self._auxiliary.record(call.position, settings, call.output, self._parts_of(call), scales)
        if errors is not None:
            self._add_errors("forecast", errors)

    def forecast_auxiliary(self, call: ComputedCall, settings: Any) -> Any:
        """The output of a further call of a step in which none is computed; `None` if it is not known."""
        parts_of = functools.partial(guided_parts, inputs=call.inputs, layout=self._layout)
        return self._auxiliary.skip(call.position, settings, parts_of)

    def _record_output(
        self, call: ComputedCall, parts: Sequence[torch.Tensor], halves: Sequence[Sequence[torch.Tensor]] = ()
    ) -> None:
        """Record what can be forecast of an output, and measure the forecast; guidance combines the halves."""
        parts = [part[:, : self._num_tokens] for part in parts]
        self.record_parts(call.position, parts, functools.partial(self._forecast_errors, call, halves))

    def _forecast_errors(
        self,
        call: ComputedCall,
        halves: Sequence[Sequence[torch.Tensor]],
        forecast: Sequence[torch.Tensor],
        parts: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """How far off the guided output would have been with this forecast, for each part and sample."""
        guided = self._guided(call, halves) if halves else [*parts]
        if self._auxiliary.are_expected:
            self._auxiliary.set_off([a.float() - b.float() for a, b in zip(forecast, parts, strict=True)], guided)
        if halves:
            compared = zip(forecast, parts, guided, strict=True)
            return torch.cat([relative_error(*each, 1.0) for each in compared])
        # Guidance that is no two halves has several parts in one batch.
        number = max(1, call.inputs.batch_size // (call.num_samples or 1))
        scale = self._scale_of(call.denoiser_index) if number > 1 else 1.0
        scale = max(scale) if isinstance(scale, list) else scale
        return torch.cat([largest_error(*each, number, scale) for each in zip(forecast, parts, strict=True)])

    def _guided(self, call: ComputedCall, halves: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """The guided output, as the pipeline computes it from these halves."""
        scale = self._scale_of(call.denoiser_index)
        scales = scale if isinstance(scale, list) else [scale] * len(halves)
        cut = [[half[:, : self._num_tokens] for half in pair] for pair in halves]
        return [apply_cfg(pair, call.uncond_index, own) for pair, own in zip(cut, scales, strict=True)]

    def _record_template(self, call: ComputedCall) -> None:
        """Record the form of an output."""
        assert self._forecaster is not None
        output = stack_samples(call.output) if self._layout.list_arguments else call.output
        self._forecaster.record_template(output, self._parts_of(call._replace(output=output)))

    def _make_output(self, call: ComputedCall, write: Callable[[list[torch.Tensor]], None]) -> Any:
        """Make an output of the recorded form, into whose parts `write` writes."""
        assert self._forecaster is not None
        output = self._forecaster.make_output(lambda made: write(self._parts_of(call._replace(output=made))))
        return unstack_samples(output) if self._layout.list_arguments else output

    def _parts_of(self, call: ComputedCall) -> list[torch.Tensor]:
        """The parts of a call's output that guidance combines."""
        return guided_parts(call.output, call.inputs, self._layout)

    def _record_halves(self, call: ComputedCall, halves: Sequence[Sequence[torch.Tensor]], uncond_index: int) -> None:
        """Record both halves, with the scale that the pipeline has for them."""
        scale = self._scale_of(call.denoiser_index) if self._schedule.is_auto else None
        self.record(call.position, halves, uncond_index, scale)
