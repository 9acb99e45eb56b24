"""The plan of every step: with a gate, of fixed levels, or of a run in which every prediction is right."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from .adaptive import MIN_HISTORY, NO_ERRORS, AdaptiveController, LevelController, StepErrors
from .step_plan import Action, Level, Phase, StepPlan
from .validation import shown

if TYPE_CHECKING:
    from .schedule import TGateSchedule

_BY_PHASE = {
    Phase.SEMANTICS_PLANNING: Action.COMPUTE,
    Phase.GATE: Action.STORE,
    Phase.FIDELITY_IMPROVING: Action.REUSE,
}


def plan_with_gate(schedule: TGateSchedule, gate: int, num_inference_steps: int) -> tuple[StepPlan, ...]:
    """The plan of every step for a gate that is known."""
    steps = range(num_inference_steps)
    cross = _drop_unused_stores([_cross_attention(schedule, step, gate) for step in steps])
    own = _drop_unused_stores([_self_attention(schedule, step, gate) for step in steps])
    return tuple(StepPlan(_phase(schedule, step, gate), cross[step], own[step]) for step in steps)


def optimistic_plan(schedule: TGateSchedule, steps: int) -> tuple[StepPlan, ...]:
    """The plan of a run in which every prediction is right."""
    assert schedule.tolerance is not None
    controller = (LevelController if schedule.forecast else AdaptiveController)(schedule.tolerance)
    plan = []
    for step in range(steps):
        has_history, is_last = step >= MIN_HISTORY, step == steps - 1
        level = controller.next_level(steps, is_last=is_last)
        stores = controller.can_skip and has_history and not is_last
        plan.append(adaptive_step(schedule, step, level, stores=stores))
        controller.end_step(level, StepErrors(0.0, 0.0) if has_history else NO_ERRORS)
    return tuple(plan)


def plan_of_levels(schedule: TGateSchedule, levels: str, steps: int) -> tuple[StepPlan, ...]:
    """The plan of every step, as `levels` gives it."""
    if steps and steps != len(levels):
        raise ValueError(
            f"`levels` must have a letter for each of the {steps} steps that run, got {len(levels)}: "
            f"{shown(levels)}. Call the pipeline with num_inference_steps={len(levels)}, or give another plan."
        )
    called = [step for step in range(steps) if levels[step] != Level.FORECAST.value]
    followers = dict(itertools.pairwise(called))
    plan = []
    for step, letter in enumerate(levels[:steps]):
        follower = followers.get(step)
        stores = follower is not None and levels[follower] == Level.HALF.value
        plan.append(adaptive_step(schedule, step, Level(letter), stores=stores))
    return tuple(plan)


def _phase(schedule: TGateSchedule, step: int, gate: int) -> Phase:
    """Phase of a step; full steps after the gate count as the gate."""
    if step < gate - 1:
        return Phase.SEMANTICS_PLANNING
    refreshes = schedule.cfg_interval is not None and (step - gate + 1) % schedule.cfg_interval == 0
    return Phase.GATE if step == gate - 1 or refreshes else Phase.FIDELITY_IMPROVING


def _cross_attention(schedule: TGateSchedule, step: int, gate: int) -> Action:
    """Cross-attention: stored in the last step before the gate, reused from the gate on."""
    return _BY_PHASE[_phase(schedule, step, gate)]


def _self_attention(schedule: TGateSchedule, step: int, gate: int) -> Action:
    """Self-attention: stored at the gate and at every interval, reused between."""
    phase = _phase(schedule, step, gate)
    if phase is Phase.GATE:
        return Action.STORE
    if phase is Phase.FIDELITY_IMPROVING:
        return Action.STORE if step % schedule.fi_interval == 0 else Action.REUSE
    if step < schedule.warm_up:
        return Action.COMPUTE
    return Action.STORE if step == schedule.warm_up or step % schedule.sp_interval == 0 else Action.REUSE


def _drop_unused_stores(actions: list[Action]) -> list[Action]:
    """Turn every store that nothing reuses into a plain compute."""
    reused = False
    for step in reversed(range(len(actions))):
        if actions[step] is Action.REUSE:
            reused = True
        else:
            if not reused:
                actions[step] = Action.COMPUTE
            reused = False
    return actions


def adaptive_step(schedule: TGateSchedule, step: int, level: Level, *, stores: bool) -> StepPlan:
    """
    Give the plan of a step of this level.

    Args:
        schedule (`TGateSchedule`): The schedule.
        step (`int`): The step.
        level (`Level`): How much of it is computed.
        stores (`bool`): Whether a half step may come before the next full step, if this one is full.

    Returns:
        `StepPlan`: What happens in it.
    """
    reuses_own = schedule.fi_interval > 1
    if level is Level.FORECAST:
        return StepPlan(Phase.FORECAST, Action.COMPUTE, Action.COMPUTE)
    if level is Level.HALF:
        between = Action.STORE if step % schedule.fi_interval == 0 else Action.REUSE
        return StepPlan(Phase.FIDELITY_IMPROVING, Action.REUSE, between if reuses_own else Action.COMPUTE)
    if not stores:
        return StepPlan(Phase.SEMANTICS_PLANNING, Action.COMPUTE, Action.COMPUTE)
    return StepPlan(Phase.GATE, Action.STORE, Action.STORE if reuses_own else Action.COMPUTE)


def first_step(schedule: TGateSchedule) -> StepPlan:
    """The plan of the first step of a run that is not known to be short."""
    if schedule.levels is not None:
        return schedule.plan(len(schedule.levels))[0]
    # Whatever comes later than the third step has no say in it.
    latest = 3
    gate = min(schedule.gate_step, latest) if isinstance(schedule.gate_step, int) else latest
    return schedule.plan(latest)[0] if schedule.is_auto else plan_with_gate(schedule, gate, latest + 1)[0]
