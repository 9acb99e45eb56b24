"""Guidance in two halves of one batch."""

from __future__ import annotations

from typing import Any

import torch

from .denoiser_cfg import ComputedCall, DenoiserCFG


class BatchedCFG(DenoiserCFG):
    """Two halves of one batch. A half step runs on one of them, and the hooks complete its output."""

    def complete(self, call: ComputedCall) -> list[torch.Tensor] | None:
        """Predict the difference with which the hooks complete the batch."""
        return self.predict(call.position)

    def observe(self, call: ComputedCall) -> None:
        """Record both halves, which were computed at once."""
        if self._predictor is not None and not call.cache_hit and self._has_halves(call):
            self._record_halves(call, [part.chunk(2) for part in self._parts_of(call)], call.uncond_index)

    def observe_output(self, call: ComputedCall) -> None:
        """Record the active half of an output, or all of one that is not split."""
        if self._forecaster is None or (call.is_split and not self._has_halves(call)):
            return
        parts = self._parts_of(call)
        if call.is_split:
            halves = [part.chunk(2) for part in parts]
            self._record_output(call, [pair[call.active_index] for pair in halves], halves)
        else:
            self._record_output(call, parts)
        self._record_template(call)

    @staticmethod
    def _has_halves(call: ComputedCall) -> bool:
        """Whether a batch can be two halves; the end of the step says if it has to be."""
        return call.inputs.batch_size % 2 == 0

    def forecast(self, call: ComputedCall) -> Any:
        """Forecast the active half, and predict the other one."""
        assert self._forecaster is not None
        active = self._forecaster.forecast_parts(call.position)
        difference = self.predict(call.position) if call.is_split else None

        def write(parts: list[torch.Tensor]) -> None:
            for index, (part, value) in enumerate(zip(parts, active, strict=True)):
                if difference is None:
                    part[:, : value.shape[1]].copy_(value)
                    continue
                halves, more = part.chunk(2), difference[index]
                other = value - more if call.active_index else value + more
                halves[call.active_index][:, : value.shape[1]].copy_(value)
                halves[1 - call.active_index][:, : value.shape[1]].copy_(other)

        return self._make_output(call, write)
