"""A run without a network: the plan of every forward, and the MACs of a denoiser with a known profile."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.adaptive import MIN_HISTORY, StepErrors
from ..plan.forward_plan import NO_FORWARD, CachedPart, CacheKey, ForwardContext, ForwardPlan, plan_forward
from ..plan.report import TGateReport
from ..plan.report_builder import NO_LAYER_COUNTS, ReportBuilder
from ..plan.schedule import TGateSchedule
from ..plan.step_plan import Level
from ..plan.steps import StepCounter, Timeline
from .macs import DenoiserProfile, MACs
from .simulated_denoiser import SimulatedDenoiser


class _Simulation:
    """A run that goes on pass by pass, in which every prediction is right."""

    def __init__(
        self,
        denoiser: SimulatedDenoiser,
        schedule: TGateSchedule,
        timeline: Timeline,
        batch_size: int,
        *,
        guided: bool,
        extra_forwards: int,
    ) -> None:
        self.macs = MACs()
        self.builder = ReportBuilder(tolerance=schedule.tolerance)
        self.min_bytes: int | None = None
        self._denoiser = denoiser
        self._schedule = schedule
        self._counter = StepCounter(schedule, timeline, can_forecast=bool(schedule.forecast))
        self._extra_forwards = extra_forwards
        self._guided = guided
        self._batch_size = batch_size
        self._rows = (2 if guided else 1) * batch_size
        # How many differences of guidance are known, and how many outputs.
        self._num_known = self._num_outputs = 0
        self._switched = False

    def switch_denoiser(self, index: int) -> None:
        """Another denoiser takes over."""
        self._denoiser.release()
        self._counter.restart_controller()
        self._num_known, self._num_outputs, self._switched = 0, 0, index > 0

    def run_pass(self) -> None:
        """Plan a pass, run it, and count what it has shown."""
        plan = self._plan()
        denoiser, step = self._denoiser, self._counter.step_index
        if plan.level is Level.FORECAST:
            denoiser.counts = NO_LAYER_COUNTS
        else:
            self.macs += denoiser.forward(plan, self._batch_size if plan.halves_batch else self._rows)
        if plan.marks_cache:
            rows = self._rows if plan.part is CachedPart.ALL else self._rows // 2
            denoiser.cached.key = CacheKey(rows, denoiser.sample_shape, plan.part)
        errors = self._observe(plan)
        self.builder.add_errors(step, errors)
        self._counter.begin_forward()
        self._counter.end_pass(level=plan.level, errors=errors)
        self._report(plan, step)

    def _plan(self) -> ForwardPlan:
        """The plan of the forward that comes next."""
        has_history, denoiser = self._num_known >= MIN_HISTORY, self._denoiser
        context = ForwardContext(
            batch_size=self._rows,
            sample_shape=denoiser.sample_shape,
            guided=self._guided,
            may_skip=not (self._switched and self._schedule.predicts) or has_history,
            active_part=CachedPart.MEAN if self._guided else CachedPart.ALL,
            cached=denoiser.cached.key,
            gates_cross=denoiser.asked_to_gate,
        )
        step = self._counter.current_plan(has_history=has_history, guided=self._guided)
        forecasts = step.level is Level.FORECAST and self._num_outputs > 0
        return NO_FORWARD if forecasts else plan_forward(step, context)

    def _observe(self, plan: ForwardPlan) -> StepErrors:
        """What a pass has shown of guidance and of the output: no error, where it is measured."""
        errors, left, is_auto = StepErrors(), self._counter.has_forecast_steps_left, self._schedule.is_auto
        observes = self._guided and self._schedule.predicts and plan.level is Level.FULL
        if observes and (self._counter.has_half_steps_left or left):
            errors = StepErrors(0.0 if self._num_known >= MIN_HISTORY and is_auto else None)
            self._num_known = min(self._num_known + 1, MIN_HISTORY)
        if left and plan.level is not Level.FORECAST:
            errors = errors._replace(forecast=0.0 if self._num_outputs == MIN_HISTORY and is_auto else None)
            self._num_outputs = min(self._num_outputs + 1, MIN_HISTORY)
        return errors

    def _report(self, plan: ForwardPlan, step: int) -> None:
        """Add a pass to the report."""
        denoiser = self._denoiser
        num_held = self._num_known + self._num_outputs * (1 + self._extra_forwards)
        held = denoiser.nbytes + num_held * denoiser.sample_bytes * self._batch_size
        held += denoiser.template_bytes * self._rows if self._num_outputs else 0
        self.builder.add_pass(
            self._counter,
            step,
            level=plan.level,
            counts=denoiser.counts,
            cached_bytes=held,
            cached_layers=denoiser.cached_layer_counts,
        )
        if not denoiser.asked_to_gate and plan.level is Level.FULL:
            self.builder.add_uncached_bytes(denoiser.uncached_bytes // (2 if plan.caches_one_half else 1))
        if denoiser.min_bytes is not None and not self.builder.report.kept_layers:
            self.min_bytes = denoiser.min_bytes


@dataclass(frozen=True)
class DryRun:
    """
    The result of a simulated run.

    Args:
        macs (`MACs`): Multiply-accumulates of all forwards.
        report (`TGateReport`): The report of the run.
        min_bytes (`int`, *optional*): The bytes that the first layer needs, if `max_memory` is too little for it.
    """

    macs: MACs
    report: TGateReport
    min_bytes: int | None


def simulate_schedule(
    profile: DenoiserProfile,
    schedule: TGateSchedule,
    timeline: Timeline,
    *,
    batch_size: int,
    guided: bool,
    itemsize: int,
    cross_attention: bool = True,
    joint: bool = False,
    max_memory: int | None = None,
    takes_over: int | None = None,
    extra_forwards: int = 0,
) -> DryRun:
    """
    Go through a run, step by step, by the plans of its forwards. Every prediction is right in it, which gives the
    fewest full steps.

    Args:
        profile (`DenoiserProfile`): The denoiser.
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        timeline (`Timeline`): Passes of the loop, passes per step, and first passes that repeat step 0.
        batch_size (`int`): Number of samples.
        guided (`bool`): Whether classifier-free guidance is on.
        itemsize (`int`): Bytes of each number that is stored.
        cross_attention (`bool`, *optional*, defaults to `True`): Whether cross-attention is reused.
        joint (`bool`, *optional*, defaults to `False`): Whether no layer is gated.
        max_memory (`int`, *optional*): Most bytes of kept cross-attention.
        takes_over (`int`, *optional*): The pass from which another denoiser of the same size runs.
        extra_forwards (`int`, *optional*, defaults to 0): Calls of a step besides those of guidance.

    Returns:
        `DryRun`: The MACs and the report of the run.
    """
    denoiser = SimulatedDenoiser(
        profile, itemsize=itemsize, gates_cross=cross_attention, joint=joint, max_memory=max_memory
    )
    simulation = _Simulation(denoiser, schedule, timeline, batch_size, guided=guided, extra_forwards=extra_forwards)
    for index in range(timeline.passes):
        if index == takes_over:
            simulation.switch_denoiser(index)
        simulation.run_pass()
    return DryRun(simulation.macs, simulation.builder.report, simulation.min_bytes)
