"""
The guidance of a run, whatever its form: what is known of it, what is predicted of it, and how far off that was.

A form of its own is a subclass of `CFGForm`: how often the denoiser is called in a step, where both halves are seen,
and what stands for the half, or for the calls, that are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from ..plan.adaptive import StepErrors
from ..plan.schedule import TGateSchedule
from .forecast import OutputForecaster
from .predictor import GuidancePredictor


class CFGForm:
    """
    The guidance of a run. It owns the predictor of the loop that runs, and the errors that this step has shown.

    Args:
        schedule (`TGateSchedule`): Whether guidance is predicted, and whether errors are measured.

    Attributes:
        errors (`StepErrors`): The largest errors that were measured in this step.
    """

    calls_per_step: ClassVar[int] = 1

    def __init__(self, schedule: TGateSchedule) -> None:
        self._schedule = schedule
        self._predictor: GuidancePredictor | None = None
        self._forecaster: OutputForecaster | None = None
        # Errors on the device, of this pass.
        self._unread: dict[str, list[torch.Tensor]] = {}
        self.errors = StepErrors()
        # Makes the largest errors of all processes from those of each, where they share a denoiser.
        self.agree: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held in differences of the halves, and in outputs to forecast from."""
        return sum(part.nbytes for part in (self._predictor, self._forecaster) if part is not None)

    @property
    def has_history(self) -> bool:
        """Whether what the next full step computes has a prediction to be compared with."""
        return self._predictor is not None and self._predictor.has_history

    @property
    def lacks_history(self) -> bool:
        """Whether guidance is predicted, but not enough is known of it yet."""
        return self._predictor is not None and not self._predictor.has_history

    @property
    def can_forecast(self) -> bool:
        """Whether anything is known to forecast from."""
        return self._forecaster is not None and self._forecaster.can_forecast

    def begin(self, *, can_forecast: bool = False) -> None:
        """
        Begin without history: at the start of a loop, and when the history no longer holds.

        Args:
            can_forecast (`bool`, *optional*, defaults to `False`): Whether calls of the denoiser can be left out.
        """
        self._predictor = GuidancePredictor(measures_errors=self._schedule.is_auto) if self._schedule.predicts else None
        self._forecaster = OutputForecaster() if can_forecast else None
        self._unread = {}
        self.errors = StepErrors()

    def release(self) -> None:
        """A loop has ended: release cached tensors."""
        self._predictor = self._forecaster = None
        self._unread = {}

    def read_errors(self) -> StepErrors:
        """Read the errors of this pass: the one wait for the device in it."""
        names = [*self._unread]
        # The sample with the largest error decides for all. NaN counts as above every tolerance.
        largest = [torch.cat([errors.flatten() for errors in self._unread[name]]).max() for name in names]
        if largest and self.agree is not None:
            largest = list(self.agree(torch.stack(largest)))
        read = map(float, torch.stack(largest).cpu()) if largest else ()
        self._unread = {}
        for name, error in zip(names, read, strict=True):
            before = getattr(self.errors, name)
            if before is None or not error <= before:
                self.errors = self.errors._replace(**{name: error})
        return self.errors

    def end_step(self) -> None:
        """A step has ended, and the next one measures anew."""
        self.errors = StepErrors()

    def limit_tokens(self, tokens: int) -> None:
        """Keep the first tokens of each difference: the pipeline does not read the others."""
        if self._predictor is not None:
            self._predictor.limit_tokens(tokens)

    def record(self, position: int, halves: Sequence[Sequence[torch.Tensor]], uncond_index: int, scale: Any) -> None:
        """Record both halves of each part of an output."""
        if self._predictor is None:
            return
        errors = self._predictor.record(position, halves, uncond_index, scale)
        if errors is not None:
            self._add_errors("difference", errors)

    def predict(self, position: int) -> list[torch.Tensor] | None:
        """Predict the second half minus the first, of each part; `None` where guidance is dropped."""
        return None if self._predictor is None else self._predictor.predict(position)

    def record_parts(
        self,
        position: int,
        parts: Sequence[torch.Tensor],
        errors_of: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor],
    ) -> None:
        """
        Record the parts of an output that later ones are forecast from.

        Args:
            position (`int`): The pass of the loop.
            parts (`Sequence` of `torch.Tensor`): The parts.
            errors_of (`Callable`): How far off the guided output would be with a forecast of these parts.
        """
        forecaster = self._forecaster
        if forecaster is None:
            return
        if self._schedule.is_auto and forecaster.has_history:
            forecast = forecaster.forecast_parts(position)
            if [part.shape for part in parts] == [part.shape for part in forecast]:
                self._add_errors("forecast", errors_of(forecast, parts))
        forecaster.record(position, parts)

    def _add_errors(self, name: str, errors: torch.Tensor) -> None:
        """Note errors of this pass, by their name in `StepErrors`."""
        self._unread.setdefault(name, []).append(errors.detach())
