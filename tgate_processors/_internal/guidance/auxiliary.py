"""Calls of the denoiser besides those of the two halves of guidance: each is forecast from its own past."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .forecast import OutputForecaster
from .prediction import relative_error


class AuxiliaryCalls:
    """
    The further calls of a step (without some layers, or with video and sound apart), by their order in it.

    Guidance adds to the conditional half what each of them differs from it by. The error of a forecast is therefore
    that of this difference.
    """

    def __init__(self) -> None:
        # The settings of each call of the last computed step, and what it gave.
        self._seen: list[tuple[Any, OutputForecaster]] = []
        # How many calls this step has had, and whether any was left out.
        self._index = 0
        self._skipped = False
        # How far off the conditional half of this step would have been, and the guided output.
        self._off: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(forecaster.nbytes for _, forecaster in self._seen)

    @property
    def are_expected(self) -> bool:
        """Whether the last computed step had any."""
        return bool(self._seen)

    def can_forecast(self, *, measures_errors: bool) -> bool:
        """Whether enough is known of each to forecast it."""
        return all(each.has_history if measures_errors else each.can_forecast for _, each in self._seen)

    def begin(self) -> None:
        """What is known no longer holds."""
        self._seen.clear()
        self._off = None

    def end_pass(self) -> None:
        """A pass of the loop has ended. What a computed one did not call is not expected again."""
        if not self._skipped:
            del self._seen[self._index :]
        self._index, self._skipped, self._off = 0, False, None

    def set_off(self, off: list[torch.Tensor], guided: list[torch.Tensor]) -> None:
        """
        The conditional half of this step was computed.

        Args:
            off (`list` of `torch.Tensor`): Its forecast minus what came, for each part of the output.
            guided (`list` of `torch.Tensor`): The guided output, without what further calls add to it.
        """
        self._off = (off, guided)

    def record(
        self, position: int, settings: Any, output: Any, parts: Sequence[torch.Tensor], scales: Sequence[float]
    ) -> torch.Tensor | None:
        """
        A call has run.

        Args:
            position (`int`): The pass of the loop.
            settings (`Any`): What is the same in each of its runs.
            output (`torch.Tensor` or container): What it has given.
            parts (`Sequence` of `torch.Tensor`): The parts of its output that guidance combines.
            scales (`Sequence` of `float`): What guidance multiplies its difference from the conditional half with, for
                each part.

        Returns:
            `torch.Tensor`, *optional*: How far off the guided output would have been with a forecast, if there was one.
        """
        if self._index < len(self._seen) and self._seen[self._index][0] != settings:
            del self._seen[self._index :]
        if self._index == len(self._seen):
            self._seen.append((settings, OutputForecaster()))
        forecaster, errors = self._seen[self._index][1], None
        if forecaster.has_history and self._off is not None:
            errors = self._errors_of(self._off, forecaster.forecast_parts(position), parts, scales)
        forecaster.record(position, parts)
        forecaster.record_template(output, list(parts))
        self._index += 1
        return errors

    def skip(self, position: int, settings: Any, parts_of: Callable[[Any], Sequence[torch.Tensor]]) -> Any:
        """What stands for the output of a call that is left out; `None` if it is not the call of the steps before."""
        if self._index >= len(self._seen) or self._seen[self._index][0] != settings:
            return None
        forecaster = self._seen[self._index][1]
        values = forecaster.forecast_parts(position)
        self._index += 1
        self._skipped = True

        def write(output: Any) -> None:
            for part, value in zip(parts_of(output), values, strict=True):
                part.copy_(value)

        return forecaster.make_output(write)

    @staticmethod
    def _errors_of(
        half: tuple[list[torch.Tensor], list[torch.Tensor]],
        forecast: Sequence[torch.Tensor],
        parts: Sequence[torch.Tensor],
        scales: Sequence[float],
    ) -> torch.Tensor | None:
        """How far off the guided output would have been by the difference from the conditional half."""
        errors = []
        for off, guided, predicted, computed, scale in zip(*half, forecast, parts, scales, strict=True):
            own = predicted.float() - computed.float()
            if own.shape != off.shape:
                return None
            errors.append(relative_error(own, off, guided, scale))
        return torch.cat(errors)
