"""The steps of a denoising loop: what the pipeline reports, checked against what is seen."""

from __future__ import annotations

from typing import NamedTuple

from .adaptive import HALF_STEP_SHARE_ALONE, NO_ERRORS, AdaptiveController, LevelController, StepErrors
from .planning import adaptive_step
from .schedule import TGateSchedule
from .step_plan import Level, StepPlan


class Timeline(NamedTuple):
    """
    The steps of a loop, as its pipeline and scheduler report them.

    Args:
        passes (`int`): Passes of the loop.
        order (`int`): Passes per step.
        warmup_passes (`int`): First passes that belong to step 0 beyond its own (PNDM).
        is_reported (`bool`): Whether the pipeline reports them itself; if not, the scheduler has prepared them.
    """

    passes: int
    order: int = 1
    warmup_passes: int = 0
    is_reported: bool = True

    def step_of(self, index: int) -> int:
        """Inference step of a pass: the ticks that the progress bar shows by then."""
        return max(0, index - self.warmup_passes) // self.order

    @property
    def steps(self) -> int:
        """Inference steps of the loop."""
        return self.step_of(self.passes - 1) + 1


class StepCounter:
    """
    One denoising loop of a call: counts its steps, and raises where they are not those that the pipeline reports.

    Calls before the loop (an inversion) look like a part of its first pass, so that one may have several forwards.

    Args:
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        timeline (`Timeline`): The steps that the pipeline reports.
        calls_per_step (`int`, *optional*, defaults to 1): Calls of the denoiser that guidance of two halves is made of.
        can_forecast (`bool`, *optional*, defaults to `False`): Whether calls of the denoiser can be left out.

    Attributes:
        controller (`LevelController` or `AdaptiveController`, *optional*):
            Decides how much of each step is computed, with `gate_step="auto"`.
    """

    def __init__(
        self, schedule: TGateSchedule, timeline: Timeline, calls_per_step: int = 1, *, can_forecast: bool = False
    ) -> None:
        self._schedule = schedule
        self._calls_per_step = calls_per_step
        self._can_forecast = can_forecast
        self.restart_controller()
        self._pass = 0
        self._forwards = 0
        self.last_index: int | None = None
        self._planned: Timeline | None = None
        self.set_timeline(timeline)

    def set_timeline(self, timeline: Timeline) -> None:
        """Plan the steps to come by what the pipeline reports now; some report it only when the loop has begun."""
        if not timeline.is_reported and isinstance(self._schedule.gate_step, float):
            raise ValueError(
                f"T-GATE: gate_step={self._schedule.gate_step} is a share of the steps, but the pipeline does not say "
                "how many it runs (it never sets `num_timesteps`): pass gate_step as a number of steps."
            )
        if timeline == self._planned:
            return
        self._planned = self.timeline = timeline
        self.plan = self._schedule.plan(timeline.steps)
        self.gate_step = self._schedule.resolve_gate_step(timeline.steps)

    @property
    def pass_index(self) -> int:
        """The pass that runs now: so many have ended."""
        return self._pass

    @property
    def step_index(self) -> int:
        """Inference step that runs now."""
        return min(self.timeline.step_of(self._pass), max(0, len(self.plan) - 1))

    def current_plan(
        self, *, has_history: bool, cache_hit: bool = False, was_half: bool = False, guided: bool = True
    ) -> StepPlan:
        """
        Give the plan of the step that runs now.

        Args:
            has_history (`bool`): Whether what a full step computes has a prediction to be compared with.
            cache_hit (`bool`, *optional*, defaults to `False`):
                Whether a cache hardly computes anything in it. If the run decides, it then goes on as it was.
            was_half (`bool`, *optional*, defaults to `False`): Whether the step before was on half of the batch.
            guided (`bool`, *optional*, defaults to `True`): Whether the step has guidance of two halves.
        """
        if self.controller is None:
            return self.plan[self.step_index]
        is_last = self.step_index >= len(self.plan) - 1
        stores = self.controller.can_skip and has_history and not is_last
        level = self.controller.next_level(len(self.plan), guided=guided, is_last=is_last)
        if cache_hit:
            level = Level.HALF if was_half else Level.FULL
        return adaptive_step(self._schedule, self.step_index, level, stores=stores)

    @property
    def can_halve_batch(self) -> bool:
        """Whether the batch of a guided step of this loop may be halved."""
        return self.has_half_steps_left and (self.controller is None or self.controller.can_skip)

    @property
    def has_half_steps_left(self) -> bool:
        """Whether a step to come may be a half step."""
        rest = self.plan[self.step_index :]
        return self._schedule.is_auto or any(step.level is Level.HALF for step in rest)

    @property
    def has_forecast_steps_left(self) -> bool:
        """Whether a step to come may be a forecast one."""
        rest = self.plan[self.step_index :]
        return self._can_forecast and (self._schedule.is_auto or any(step.level is Level.FORECAST for step in rest))

    @property
    def is_finished(self) -> bool:
        """Whether all passes have ended."""
        return self._pass >= self.timeline.passes

    @property
    def forwards_in_pass(self) -> int:
        """Calls of the denoiser in this pass."""
        return self._forwards

    def restart_controller(self) -> None:
        """Begin with full steps: at the start, and when what is known of guidance no longer holds."""
        tolerance = self._schedule.tolerance
        self.controller: LevelController | AdaptiveController | None = None
        if tolerance is not None and self._can_forecast and self._schedule.forecast:
            self.controller = LevelController(tolerance)
        elif tolerance is not None:
            share = HALF_STEP_SHARE_ALONE if self._schedule.forecast else 1.0
            self.controller = AdaptiveController(share * tolerance)

    def forbid_forecasts(self) -> None:
        """No call can be left out from now on."""
        self._can_forecast = False
        self.restart_controller()

    def begin_forward(self, *, guided: bool = False) -> None:
        """The denoiser is called."""
        self._forwards += 1
        if self._calls_per_step > 1:
            self._check_call_count(guided)
            return
        if self._forwards > 1 and self._pass > 0:
            raise ValueError(
                f"T-GATE: the denoiser was called a second time in step {self.step_index}, where T-GATE expects one "
                "call in each step: what a layer keeps cannot serve two (tiles, views, several predictions), or "
                "callback_on_step_end does not come after every step. Call remove_tgate(pipe) to use this pipeline."
            )

    def end_pass(
        self,
        index: int | None = None,
        *,
        level: Level = Level.FULL,
        computed: bool = True,
        guided: bool = False,
        errors: StepErrors = NO_ERRORS,
    ) -> bool:
        """
        A pass has ended.

        Args:
            index (`int`, *optional*): The pipeline's own number of the pass.
            level (`Level`, *optional*, defaults to `Level.FULL`): How much of it was computed.
            computed (`bool`, *optional*, defaults to `True`): Whether a cache did not repeat all of it.
            guided (`bool`, *optional*, defaults to `False`): Whether guidance was on.
            errors (`StepErrors`, *optional*): How far off predictions were in this step, if any was compared.

        Returns:
            `bool`: Whether its step has ended too.
        """
        if self._calls_per_step > 1 and guided and self._forwards == 1:
            raise ValueError(
                f"T-GATE: step {self.step_index} ended with one call of the denoiser, where T-GATE expects two with "
                "classifier-free guidance, the conditional one first. If each process makes one of them (CFG "
                "parallelism), there is no half to skip: pass each process its own prompts instead. Or call "
                "remove_tgate(pipe) to use this pipeline."
            )
        if not self._forwards:
            raise ValueError(
                f"T-GATE: step {self.step_index} ended without a call of the denoiser in this thread, where T-GATE "
                "expects one call in each step. Call remove_tgate(pipe) to use this pipeline."
            )
        if index is not None and self.last_index is not None and index != self.last_index + 1:
            raise ValueError(
                f"T-GATE: callback_on_step_end came with step {index} after step {self.last_index}, where T-GATE "
                f"expects step {self.last_index + 1} of {self.timeline.passes}: it has to come after every step, and "
                "`num_timesteps` has to be their number. Call remove_tgate(pipe) to use this pipeline."
            )
        self.last_index = index
        self._forwards = 0
        ended = self.step_index
        self._pass += 1
        if not self.is_finished and self.step_index == ended:
            return False
        if self.controller is not None:
            self.controller.end_step(level, errors, computed=computed)
        return True

    def _check_call_count(self, guided: bool) -> None:
        """Refuse more calls in a step than guidance is made of."""
        expected = self._calls_per_step if guided else 1
        if self._forwards > expected:
            raise ValueError(
                f"T-GATE: the denoiser was called {self._forwards} times in step {self.step_index}, where T-GATE "
                f"expects {expected} with classifier-free guidance {'on' if guided else 'off'} (windows, several "
                "predictions). Call remove_tgate(pipe) to use this pipeline."
            )
