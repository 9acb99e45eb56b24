"""Guidance in two calls of the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..denoiser.batch import complete_second_call, guided_parts
from ..denoiser.spec import BatchLayout
from ..plan.schedule import TGateSchedule
from .denoiser_cfg import ComputedCall, DenoiserCFG


class SequentialCFG(DenoiserCFG):
    """Two calls of the denoiser, the conditional one first. The second call of a half step is skipped."""

    calls_per_step = 2

    def __init__(self, schedule: TGateSchedule, layout: BatchLayout, scale_of: Callable[[int], Any]) -> None:
        super().__init__(schedule, layout, scale_of)
        self._first: list[torch.Tensor] | None = None
        self._first_output: list[torch.Tensor] | None = None

    def release(self) -> None:
        """A loop has ended: release cached tensors."""
        super().release()
        self._first = self._first_output = None

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

    def observe_output(self, call: ComputedCall) -> None:
        """Record the output of the first call, once that of the second is known too."""
        if self._forecaster is None:
            return
        call = call._replace(uncond_index=1)
        parts = self._parts_of(call)
        first, self._first_output = self._first_output, None
        if call.call_index == 0:
            self._record_template(call)
            if not call.is_split:
                self._record_output(call, parts)
            elif self._ready_outputs:
                second = self._parts_of(call._replace(output=self._ready_outputs[0]))
                self._record_output(call, parts, [*zip(parts, second, strict=True)])
            else:
                self._first_output = parts
        elif first is not None:
            self._record_output(call, first, [*zip(first, parts, strict=True)])

    def forecast(self, call: ComputedCall) -> Any:
        """Forecast the output of the first call, and make that of the second from it."""
        assert self._forecaster is not None
        values = self._forecaster.forecast_parts(call.position)

        def write(parts: list[torch.Tensor]) -> None:
            for part, value in zip(parts, values, strict=True):
                part[:, : value.shape[1]].copy_(value)

        output = self._make_output(call, write)
        if call.is_split:
            self.complete(call._replace(output=output))
        return output
