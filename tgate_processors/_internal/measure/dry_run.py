"""A run without a network: the plan of every forward, and the MACs of a denoiser with a known profile."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..attention.budget import MemoryBudget
from ..plan.adaptive import MIN_HISTORY, StepErrors
from ..plan.forward_plan import NO_FORWARD, CachedPart, CacheKey, ForwardContext, ForwardPlan, plan_forward
from ..plan.report import TGateReport
from ..plan.report_builder import ReportBuilder
from ..plan.schedule import TGateSchedule
from ..plan.step_plan import Action, Level
from ..plan.steps import StepCounter, Timeline
from .macs import DenoiserProfile, MACs


@dataclass
class _Cached:
    """What the layers of a denoiser have cached: rows of each layer with cross-attention, and of self-attention."""

    cross: dict[int, int] = field(default_factory=dict)
    over_budget: set[int] = field(default_factory=set)
    self_rows: int | None = None
    key: CacheKey | None = None


class _SimulatedDenoiser:
    """A denoiser that runs by its profile, without tensors."""

    def __init__(
        self, profile: DenoiserProfile, *, itemsize: int, gates_cross: bool, joint: bool, max_memory: int | None
    ) -> None:
        self._profile = profile
        self._itemsize = itemsize
        self._joint = joint
        self._gates_cross = gates_cross and not joint
        self._budget: MemoryBudget[int] | None = None if max_memory is None else MemoryBudget(max_memory)
        self.cached = _Cached()
        self.uncached_bytes = 0
        self.counts = ((False, False), (False, False))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        cached = self.cached
        cross = sum(self._profile.cross[index].width * rows for index, rows in cached.cross.items())
        return (cross + self._profile.self_width * (cached.self_rows or 0)) * self._itemsize

    @property
    def cached_layer_counts(self) -> tuple[int, int]:
        """How many layers have cross-attention cached, and how many would without a budget."""
        return len(self.cached.cross), len(self.cached.cross) + len(self.cached.over_budget)

    @property
    def min_bytes(self) -> int | None:
        """The bytes that the first layer needs, if any is beyond the budget."""
        return self._budget.min_bytes if self._budget is not None and self.cached.over_budget else None

    def release(self) -> None:
        """Another denoiser takes over, or the run has ended."""
        self.cached = _Cached()
        if self._budget is not None:
            self._budget.reset()

    def forward(self, plan: ForwardPlan, rows: int) -> MACs:
        """Run a forward with so many rows, and return its MACs."""
        cached_rows = rows if plan.part is CachedPart.ALL else rows // 2
        reuses_own = not self._joint and plan.self_attention is Action.REUSE and self.cached.self_rows == rows
        computed = list(range(len(self._profile.cross)))
        if plan.cross_attention is Action.REUSE and self._gates_cross:
            computed = [index for index in computed if index not in self.cached.cross]
        elif plan.cross_attention is Action.STORE and self._gates_cross:
            self._store_cross(cached_rows)
        else:
            self.cached.cross.clear()
        if not reuses_own and not self._joint:
            self.cached.self_rows = None if plan.self_attention is Action.COMPUTE else cached_rows
        widths = sum(self._profile.cross[index].width for index in computed)
        is_uncached = plan.cross_attention is Action.COMPUTE and not self._joint
        self.uncached_bytes = widths * rows * self._itemsize if is_uncached else 0
        if not self._joint:
            reused = len(computed) < len(self._profile.cross)
            self.counts = (len(computed) > 0, reused), (not reuses_own, reuses_own)
        return self._macs(computed, reuses_own=reuses_own) * rows

    def _store_cross(self, rows: int) -> None:
        """Every layer caches its output, as far as the budget goes."""
        widths = {index: layer.width * rows * self._itemsize for index, layer in enumerate(self._profile.cross)}
        if self._budget is not None:
            for index, nbytes in widths.items():
                self._budget.offer(index, self._profile.cross[index].saved, nbytes, index)
            self.cached.over_budget = {index for index in widths if index not in self._budget}
        self.cached.cross = {index: rows for index in widths if index not in self.cached.over_budget}

    def _macs(self, computed: list[int], *, reuses_own: bool) -> MACs:
        """MACs of a forward for one sample, in which these layers compute cross-attention."""
        reuses = len(computed) < len(self._profile.cross)
        separately = [self._profile.cross[index].macs for index in computed] if reuses else []
        return sum(separately, start=self._profile.forwards[reuses, reuses_own].macs)


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
    can_forecast: bool = True,
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
        can_forecast (`bool`, *optional*, defaults to `True`): Whether calls of the denoiser can be left out.

    Returns:
        `DryRun`: The MACs and the report of the run.
    """
    denoiser = _SimulatedDenoiser(
        profile, itemsize=itemsize, gates_cross=cross_attention, joint=joint, max_memory=max_memory
    )
    counter = StepCounter(schedule, timeline, can_forecast=can_forecast and bool(schedule.forecast))
    builder, taken = ReportBuilder(tolerance=schedule.tolerance), MACs()
    rows = (2 if guided else 1) * batch_size
    part = CachedPart.MEAN if guided else CachedPart.ALL
    # How many differences of guidance are known, and how many outputs.
    num_known, num_outputs, switched, min_bytes = 0, 0, False, None
    for index in range(timeline.passes):
        if index == takes_over:
            denoiser.release()
            counter.restart_controller()
            num_known, num_outputs, switched = 0, 0, index > 0
        has_history = num_known >= MIN_HISTORY
        context = ForwardContext(
            batch_size=rows,
            sample_shape=(profile.width,),
            guided=guided,
            may_skip=not (switched and schedule.predicts) or has_history,
            active_part=part,
            cached=denoiser.cached.key,
            gates_cross=cross_attention,
        )
        step_plan = counter.current_plan(has_history=has_history, guided=guided)
        forecast = step_plan.level is Level.FORECAST and num_outputs > 0
        plan = NO_FORWARD if forecast else plan_forward(step_plan, context)
        if forecast:
            denoiser.counts = ((False, False), (False, False))
        else:
            taken += denoiser.forward(plan, batch_size if plan.halves_batch else rows)
        if plan.marks_cache:
            denoiser.cached.key = CacheKey(
                rows if plan.part is CachedPart.ALL else rows // 2, (profile.width,), plan.part
            )
        step, errors, left = counter.step_index, StepErrors(), counter.has_forecast_steps_left
        if guided and schedule.predicts and plan.level is Level.FULL and (counter.has_half_steps_left or left):
            errors = StepErrors(0.0 if has_history and schedule.is_auto else None)
            num_known = min(num_known + 1, MIN_HISTORY)
        if left and not forecast:
            errors = errors._replace(forecast=0.0 if num_outputs == MIN_HISTORY and schedule.is_auto else None)
            num_outputs = min(num_outputs + 1, MIN_HISTORY)
        builder.add_errors(step, errors)
        counter.begin_forward()
        counter.end_pass(level=plan.level, errors=errors)
        held = denoiser.nbytes + (num_known + num_outputs) * profile.width * batch_size * itemsize
        held += profile.template_width * rows * itemsize if num_outputs else 0
        _report_pass(builder, counter, step, denoiser, plan, held)
        if not cross_attention and plan.level is Level.FULL:
            builder.add_uncached_bytes(denoiser.uncached_bytes // (2 if plan.caches_one_half else 1))
        if denoiser.min_bytes is not None and not builder.report.kept_layers:
            min_bytes = denoiser.min_bytes
    return DryRun(taken, builder.report, min_bytes)


def _report_pass(
    builder: ReportBuilder, counter: StepCounter, step: int, denoiser: _SimulatedDenoiser, plan: ForwardPlan, held: int
) -> None:
    """Add a pass to the report."""
    builder.add_pass(
        counter,
        step,
        level=plan.level,
        counts=denoiser.counts,
        cached_bytes=held,
        cached_layers=denoiser.cached_layer_counts,
    )
