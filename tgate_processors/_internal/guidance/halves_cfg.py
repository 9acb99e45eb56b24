"""Guidance whose halves are passed one by one, by a guider of diffusers or by a loop of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..denoiser.batch import complete_second_call
from ..plan.schedule import TGateSchedule
from ..plan.step_plan import Level
from ..plan.steps import StepCounter
from .cfg_form import CFGForm
from .prediction import apply_cfg, relative_error


class HalvesCFG(CFGForm):
    """
    Guidance of which each step is asked for its halves: a half step for the conditional one, a forecast step for none.

    Args:
        schedule (`TGateSchedule`): Whether guidance is predicted, and whether errors are measured.

    Attributes:
        needs_history (`bool`):
            Whether half steps wait for an error that was measured, as another denoiser has taken over. If not, one full
            step is enough for them.
        full_steps (`int`): Full steps with guidance since the history began.
        shape (`torch.Size`, *optional*): The shape of a half whose difference from the other one can be predicted.
    """

    def __init__(self, schedule: TGateSchedule) -> None:
        super().__init__(schedule)
        self.needs_history = False
        self.full_steps = 0
        self.shape: torch.Size | None = None

    def begin(self, *, can_forecast: bool = False) -> None:
        """Begin without history: at the start of a loop, and when the history no longer holds."""
        super().begin(can_forecast=can_forecast)
        self.full_steps, self.shape = 0, None

    def level_of(self, loop: StepCounter, *, guided: bool, was_guided: bool | None) -> Level:
        """
        Give the level of the step that begins: as it is planned, unless too little is known for that.

        Args:
            loop (`StepCounter`): Its loop.
            guided (`bool`): Whether it has guidance of two halves.
            was_guided (`bool`, *optional*): Whether the step before had; `None` in the first one.
        """
        level = loop.current_plan(has_history=self.has_history, guided=guided).level
        if level is Level.FORECAST and not (self.can_forecast and was_guided is guided):
            return Level.FULL
        if level is Level.HALF and not (guided and self._can_predict):
            return Level.FULL
        return level

    def complete_step(
        self, loop: StepCounter, level: Level, conditional: Any, unconditional: Any, scale: Any, *, guided: bool
    ) -> tuple[Any, Any]:
        """
        Complete the halves of the step that runs, and record what was computed of them.

        Args:
            loop (`StepCounter`): Its loop.
            level (`Level`): Its level.
            conditional (`torch.Tensor`, *optional*): The conditional half, or all there is without guidance.
            unconditional (`torch.Tensor`, *optional*): The unconditional half, of a full step with guidance.
            scale (`float` or `torch.Tensor`): What guidance multiplies the difference of the halves with.
            guided (`bool`): Whether it has guidance of two halves.

        Returns:
            `tuple` of `torch.Tensor`: The conditional half and, with guidance, the unconditional one.
        """
        position = loop.pass_index
        if level is Level.FORECAST:
            assert self._forecaster is not None
            # A copy, as a single output is held.
            conditional = self._forecaster.forecast_parts(position)[0].clone()
            return conditional, self._other_half(position, conditional) if guided else None
        if level is Level.HALF:
            unconditional = self._other_half(position, conditional)
        elif guided:
            self.full_steps += 1
            if loop.has_half_steps_left or loop.has_forecast_steps_left:
                self.record(position, [(conditional, unconditional)], 1, scale)
                self.shape = conditional.shape if self._schedule.predicts else None
        if loop.has_forecast_steps_left:
            self._record_conditional(position, conditional, unconditional, scale)
        return conditional, unconditional

    def observe_output(self, loop: StepCounter, parts: Sequence[torch.Tensor]) -> None:
        """Record the output of guidance of another kind, which is forecast whole."""
        if loop.has_forecast_steps_left:
            self.record_parts(loop.pass_index, parts, _errors_of_output)

    def forecast_output(self, loop: StepCounter) -> list[torch.Tensor]:
        """Forecast the output of guidance of another kind."""
        assert self._forecaster is not None
        # Copies, as a single output is held.
        return [part.clone() for part in self._forecaster.forecast_parts(loop.pass_index)]

    def state_dict(self) -> dict[str, Any]:
        """What is known, as tensors and plain numbers."""
        parts = {"differences": self._predictor, "outputs": self._forecaster}
        known = {name: [] if part is None else part.history for name, part in parts.items()}
        return {
            "full_steps": self.full_steps,
            "needs_history": self.needs_history,
            **{name: [parts[0] for _, parts in history] for name, history in known.items()},
            **{f"{name}_at": [position for position, _ in history] for name, history in known.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, after `begin`."""
        self.full_steps, self.needs_history = state["full_steps"], state["needs_history"]
        for name, part in (("differences", self._predictor), ("outputs", self._forecaster)):
            if part is not None:
                part.history = [(at, [each]) for at, each in zip(state[f"{name}_at"], state[name], strict=True)]

    @property
    def _can_predict(self) -> bool:
        """Whether enough full steps are known for a half step."""
        return self.has_history if self.needs_history and self._schedule.predicts else self.full_steps > 0

    def _other_half(self, position: int, conditional: torch.Tensor) -> Any:
        """The half that is not computed: the conditional one plus the predicted difference, if it is predicted."""
        return complete_second_call(conditional, self.predict(position), lambda whole: [whole])

    def _record_conditional(self, position: int, conditional: torch.Tensor, unconditional: Any, scale: Any) -> None:
        """Record the conditional half of a computed step; without guidance there is no other one."""

        def errors_of(forecast: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> torch.Tensor:
            guided = conditional if unconditional is None else apply_cfg((conditional, unconditional), 1, scale)
            return relative_error(forecast[0], parts[0], guided, 1.0)

        self.record_parts(position, [conditional], errors_of)


def _errors_of_output(forecast: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far off each part of an output would have been, relative to itself."""
    return torch.cat([relative_error(*each, each[1], 1.0) for each in zip(forecast, parts, strict=True)])
