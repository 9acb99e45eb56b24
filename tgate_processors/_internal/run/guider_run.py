"""One call of a pipeline whose guidance is a guider: the steps and the predictions that the guider gets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..attention.state import TGateState
from ..caches.foreign_forwards import ForeignForwards
from ..denoiser.inputs import differs, is_latents
from ..guidance.halves_cfg import HalvesCFG
from ..plan.report_builder import NO_LAYER_COUNTS
from ..plan.step_plan import Level, Phase, StepPlan
from ..plan.steps import StepCounter, Timeline
from .base import Run
from .guider_call import GuiderPipelineCall
from .messages import (
    warn_exchanged_in_every_step,
    warn_gate_too_late,
    warn_no_cfg,
    warn_nothing_gated,
    warn_ungated_processors,
)
from .ranks import Agreement


class GuiderRun(Run[HalvesCFG]):
    """
    One call of a pipeline. It is made anew for every call, and nothing of it outlives the call but the report.

    Args:
        state (`TGateState`): The settings, and where the report goes.
        call (`GuiderPipelineCall`): The call, for messages.
        forwards (`ForeignForwards`): What its denoisers do when they are called.
        can_skip_half (`bool`, *optional*, defaults to `True`): Whether one half of guidance may be skipped.
        agree (`Agreement`, *optional*): How processes that share a denoiser agree.
    """

    def __init__(
        self,
        state: TGateState,
        call: GuiderPipelineCall,
        forwards: ForeignForwards,
        *,
        can_skip_half: bool = True,
        agree: Agreement | None = None,
    ) -> None:
        cfg = HalvesCFG(state.schedule)
        # Where processors may count their calls, none is left out.
        super().__init__(state, cfg, forwards, can_skip_half=can_skip_half, can_forecast=can_skip_half, agree=agree)
        self._call = call
        self._guider: Any = None
        self._level = Level.FULL
        self._in_step = self._saw_cfg = False
        # Whether guidance is on in the step that runs, or has run last.
        self._guided: bool | None = None
        self._num_predictions: int | None = None
        # Whether something was exchanged, and whether any step was full only because of that.
        self._exchanged = self._lost_half_step = False
        self._conditions: list[Any] = []

    def skips_unconditional(self, guider: Any) -> bool:
        """Whether the step that runs now asks this guider for the conditional half alone."""
        return self._level is Level.HALF and guider is self._guider

    def skips_all(self, guider: Any) -> bool:
        """Whether the step that runs now asks this guider for nothing."""
        return self._level is Level.FORECAST and guider is self._guider

    @property
    def is_finished(self) -> bool:
        """Whether all steps have ended."""
        return self._loop is not None and self._loop.is_finished

    @property
    def next_step(self) -> int | None:
        """The step that comes next, or has begun, if any has."""
        return None if self._loop is None else self._loop.pass_index

    def continues(self, step: int, steps: int) -> bool:
        """Whether a step of so many is the one that comes next."""
        loop = self._loop
        return loop is not None and not self._in_step and (loop.pass_index, loop.timeline.passes) == (step, steps)

    def join(self, step: int, steps: int) -> None:
        """A loop is under way, and another guider had its steps until this one."""
        loop = self._begin_loop(steps)
        for _ in range(step):
            loop.begin_forward()
            loop.end_pass()
        # Whoever comes after it begins without history.
        self._guider = object()

    def see_denoiser(self, forwards: ForeignForwards, ungated: Sequence[str], agree: Agreement | None) -> None:
        """
        The first step calls a denoiser, which was not known before.

        Args:
            forwards (`ForeignForwards`): What it does when it is called.
            ungated (`Sequence` of `str`): Its layers whose processors may count their calls.
            agree (`Agreement`, *optional*): How processes that share it agree.
        """
        forwards.begin_loop()
        self._forwards, self._agree, self._cfg.agree = forwards, agree, agree
        if ungated and self._loop is not None:
            warn_ungated_processors(self._state, self._call, ungated)
            self._can_skip_half = self._can_forecast = False
            self._loop.forbid_forecasts()
            self._restart_guidance(self._loop)

    def begin_step(
        self, guider: Any, step: int, steps: int, *, guided: bool, num_predictions: int | None = None
    ) -> None:
        """
        A guider's step begins.

        Args:
            guider (`BaseGuidance`): The guider.
            step (`int`): The step.
            steps (`int`): Steps of the loop.
            guided (`bool`): Whether guidance of two halves is on in it.
            num_predictions (`int`, *optional*): How many predictions guidance of another kind combines in it.

        Raises:
            ValueError: If it is not the step that comes next.
        """
        loop = self._begin_loop(steps) if step == 0 else self._loop
        expected = None if loop is None else loop.pass_index
        if loop is None or self._in_step or step != expected:
            raise self._call.wrong_step(step, None if self._in_step else expected or 0)
        if guider is not self._guider:
            self._switch_guider(guider, loop)
        elif num_predictions != self._num_predictions:
            self._restart_guidance(loop)
        self._num_predictions = num_predictions
        self._in_step = True
        self._saw_cfg = self._saw_cfg or guided
        loop.begin_forward()
        may_halve, before, self._guided = guided and self._can_skip_half, self._guided, guided
        improving = self._plan(loop).level is Level.HALF
        was_guided = None if before is None else before and self._can_skip_half
        self._level = self._cfg.level_of(loop, guided=may_halve, was_guided=was_guided)
        lost = self._exchanged and may_halve and bool(improving or self._state.schedule.tolerance)
        self._lost_half_step = self._lost_half_step or lost
        self._exchanged = False

    def set_conditions(self, conditions: Mapping[str, Any]) -> None:
        """
        Set the conditions of the step that runs now: new ones make it a full step.

        Args:
            conditions (`Mapping`): The inputs in which the halves differ, as tuples, the conditional one first.
        """
        own = {name: pair for name, pair in conditions.items() if isinstance(pair, tuple) and name != "hidden_states"}
        before, self._conditions = self._conditions, [*own.values()]
        loop = self._loop
        if loop is None or not self._state.schedule.predicts or not before:
            return
        if not self._can_forecast and self._plan(loop).phase is Phase.SEMANTICS_PLANNING:
            return
        if differs(before, self._conditions):
            self.invalidate(("text",))
            self._level, self._exchanged = Level.FULL, False
            self._lost_half_step = True

    def invalidate(self, names: Collection[str]) -> None:
        """
        Some inputs are exchanged: the next step is a full one.

        Args:
            names (`Collection` of `str`): Their names in pipelines.
        """
        if self._loop is not None and (any(map(is_latents, names)) or (names and self._state.schedule.predicts)):
            self._restart_guidance(self._loop)
            self._exchanged = True

    def on_step_end(self, index: int, latents: Any, tensors: dict[str, Any], exchanged: Collection[str]) -> None:
        """The pipeline's step callback has run, after the guider has ended the step."""
        self.invalidate(exchanged)

    def complete_step(self, conditional: Any, unconditional: Any, scale: Any, *, guided: bool) -> tuple[Any, Any]:
        """
        Complete the predictions of the step that runs.

        Args:
            conditional (`torch.Tensor`, *optional*): The conditional half, if it was computed.
            unconditional (`torch.Tensor`, *optional*): The unconditional half, if it was computed.
            scale (`float`): What guidance multiplies their difference with.
            guided (`bool`): Whether guidance is on.

        Returns:
            `tuple` of `torch.Tensor`: The conditional half, and the unconditional one.

        Raises:
            ValueError: If the conditional half has another size than in the full steps before.
        """
        loop = self._loop
        if loop is None:
            return conditional, unconditional
        shape = self._cfg.shape
        if self._level is Level.HALF and shape not in (None, conditional.shape):
            raise self._call.wrong_shape(conditional, loop.step_index, shape)
        if guided and self._level is Level.FULL:
            self._forwards.after_forward(len(conditional))
        guided = guided and self._can_skip_half
        return self._cfg.complete_step(loop, self._level, conditional, unconditional, scale, guided=guided)

    def observe_output(self, *parts: torch.Tensor) -> None:
        """
        A guider of another kind has made its output in a step that computes all of its predictions.

        Args:
            parts (`torch.Tensor`): What the pipeline gets of it.
        """
        if self._loop is not None:
            self._cfg.observe_output(self._loop, parts)

    def forecast_output(self) -> list[torch.Tensor]:
        """What stands for the output of a guider of another kind, in a forecast step."""
        assert self._loop is not None
        return self._cfg.forecast_output(self._loop)

    def end_step(self, *, guided: bool) -> None:
        """
        The guider has computed the guided output of the step.

        Args:
            guided (`bool`): Whether guidance was on.

        Raises:
            ValueError: If no step has begun.
        """
        loop = self._loop
        if loop is None or not self._in_step:
            raise self._call.without_step()
        # Where a step is two passes (Heun), guiders count passes, and guide in none beyond the number of steps.
        level, step, counts = self._level, loop.step_index, not loop.is_finished
        self._in_step, self._level = False, Level.FULL
        if loop.end_pass(level=level, errors=self._read_errors(loop)):
            self._cfg.end_step()
        if loop.is_finished:
            self._restart_guidance(loop)
        if counts:
            self._report_builder.add_pass(loop, step, level=level, counts=NO_LAYER_COUNTS, cached_bytes=self.nbytes)
        if guided and self._can_skip_half:
            warn_gate_too_late(self._state, self._call, loop, gates_cross=False)

    def finish(self, *, completed: bool = True) -> None:
        """The call has ended, however it ended: release cached tensors, store the report."""
        report = self._release()
        self._guider, self._conditions = None, []
        gated = report.half_batch_forwards or report.prediction_errors or report.forecast_errors
        if completed and self._lost_half_step and not gated:
            warn_exchanged_in_every_step(self._state, self._call)
        elif completed and not report.num_inference_steps:
            warn_nothing_gated(self._call, steps_seen=False)
        elif completed and not (self._saw_cfg or self._can_forecast):
            warn_no_cfg(self._state, self._call, gates_cross=False, joint=True)

    def _begin_loop(self, steps: int) -> StepCounter:
        """A loop begins, the first one of the call or another."""
        if self._loop is not None and not self._in_step:
            self._report_builder.end_loop(self._loop)
        self._guider = None
        return self._begin_counting(Timeline(steps))

    def _plan(self, loop: StepCounter) -> StepPlan:
        """The plan of the step that runs now."""
        guided = bool(self._guided) and self._can_skip_half
        return loop.current_plan(has_history=self._cfg.has_history, guided=guided)

    def _switch_guider(self, guider: Any, loop: StepCounter) -> None:
        """Another guider comes with another denoiser, whose guidance has no history yet."""
        self._cfg.needs_history = self._guider is not None
        if self._guider is not None:
            self._restart_guidance(loop)
        self._guider = guider
