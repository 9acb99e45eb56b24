"""What one forward of the denoiser does: a pure function of the plan of its step and of what is known by then."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from .step_plan import Action, Level, Phase, StepPlan


class CachedPart(enum.Enum):
    """What of a layer's output is cached."""

    ALL = "all"
    MEAN = "mean of the halves"
    FIRST = "first half"
    SECOND = "second half"


class ForwardMode(enum.Enum):
    """How much is computed of what the pipeline asks for in a step."""

    FULL = "all"
    HALF_BATCH = "half of the batch"
    SKIP_SECOND_CALL = "the first of two calls"
    FORECAST = "nothing"


class CacheKey(NamedTuple):
    """The forward that cached cross-attention: rows of what is cached, shape of a sample, and what part it is."""

    rows: int
    sample_shape: tuple[int, ...]
    part: CachedPart


# Cached by a forward that no hook has seen. Whether it fits is for the layers to see.
UNSEEN = CacheKey(-1, (), CachedPart.ALL)


@dataclass(frozen=True)
class ForwardContext:
    """
    What is known when the denoiser is called for the first time in a step.

    Args:
        batch_size (`int`): Samples that it is given, both halves of guidance counted.
        sample_shape (`tuple` of `int`): Shape of one sample.
        guided (`bool`): Whether classifier-free guidance is on in this step.
        can_skip_half (`bool`): Whether guidance is two halves, of which one can be skipped at all.
        may_skip (`bool`): Whether one may be skipped now: guidance has history, and no other hook reads the batch.
        calls_per_step (`int`): Calls of the denoiser that guidance is made of.
        active_part (`CachedPart`): What a full step caches of a guided batch for the half steps after it.
        cached (`CacheKey`, *optional*): The forward that cached cross-attention.
        gates_cross (`bool`): Whether cross-attention is gated.
        cache_invalidated (`bool`): Whether what was cached is gone, because something was exchanged.
        stores_early (`bool`):
            Whether cross-attention is cached in every step before the gate, as another cache may skip layers in it.
    """

    batch_size: int
    sample_shape: tuple[int, ...]
    guided: bool = True
    can_skip_half: bool = True
    may_skip: bool = True
    calls_per_step: int = 1
    active_part: CachedPart = CachedPart.ALL
    cached: CacheKey | None = None
    gates_cross: bool = True
    cache_invalidated: bool = False
    stores_early: bool = False

    @property
    def splits_guidance(self) -> bool:
        """Whether this step has two halves of guidance, of which one can be skipped."""
        return self.guided and self.can_skip_half


@dataclass(frozen=True)
class ForwardPlan:
    """
    What a forward does.

    Args:
        phase (`Phase`): The phase of its step. A half step that cannot be one counts as the gate.
        cross_attention (`Action`): What the layers with cross-attention do.
        self_attention (`Action`): What the layers with self-attention do.
        mode (`ForwardMode`): How much is computed of what the pipeline asks for.
        part (`CachedPart`): What of an output is cached in it.
        caches_one_half (`bool`): Whether full steps like it cache one half of a batch, or the mean of both.
        marks_cache (`bool`): Whether what is cached from now on is of this forward.
    """

    phase: Phase = Phase.SEMANTICS_PLANNING
    cross_attention: Action = Action.COMPUTE
    self_attention: Action = Action.COMPUTE
    mode: ForwardMode = ForwardMode.FULL
    part: CachedPart = CachedPart.ALL
    caches_one_half: bool = False
    marks_cache: bool = False

    @property
    def is_half_step(self) -> bool:
        """Whether one half of guidance is skipped."""
        return self.mode in (ForwardMode.HALF_BATCH, ForwardMode.SKIP_SECOND_CALL)

    @property
    def is_forecast_step(self) -> bool:
        """Whether the denoiser is not called."""
        return self.mode is ForwardMode.FORECAST

    @property
    def level(self) -> Level:
        """How much of the step is computed."""
        if self.is_forecast_step:
            return Level.FORECAST
        return Level.HALF if self.is_half_step else Level.FULL

    @property
    def halves_batch(self) -> bool:
        """Whether the denoiser runs on half of the batch that the pipeline gives."""
        return self.mode is ForwardMode.HALF_BATCH

    def for_second_call(self, *, can_skip_half: bool) -> tuple[Action, Action]:
        """What cross-attention and self-attention do in the second call of a full step: as in the first one."""
        if not can_skip_half:
            return self.cross_attention, self.self_attention
        # Only half steps reuse what is cached, and there is no second call in them.
        own = Action.COMPUTE if self.phase is Phase.GATE else self.self_attention
        return Action.COMPUTE if self.marks_cache else self.cross_attention, own


# The plan of a step in which the denoiser is not called. What is cached stays.
NO_FORWARD = ForwardPlan(phase=Phase.FORECAST, mode=ForwardMode.FORECAST)


def plan_forward(step: StepPlan, context: ForwardContext) -> ForwardPlan:
    """
    Plan a forward, the first one of its step.

    Args:
        step (`StepPlan`): What the schedule, or the controller, says of the step.
        context (`ForwardContext`): What is known by now.

    Returns:
        `ForwardPlan`: What the forward does. Where something is to be reused that does not fit, it is a full one that
        caches everything anew, as at the gate.
    """
    phase, cross, own = step.phase, step.cross_attention, step.self_attention
    if phase is Phase.FORECAST:
        # It cannot be one, as the denoiser is called.
        split = context.splits_guidance
        phase, cross = (Phase.GATE, Action.STORE) if split else (Phase.SEMANTICS_PLANNING, Action.COMPUTE)
    half = context.splits_guidance and phase is Phase.FIDELITY_IMPROVING
    fits = _cache_matches(context, half=half) and (context.may_skip or not half)
    refreshes = cross is Action.REUSE and not fits
    if (refreshes or context.cache_invalidated) and own is Action.REUSE:
        own = Action.STORE
    if refreshes:
        half, phase, cross = False, Phase.GATE, Action.STORE
    early = cross is Action.COMPUTE and context.stores_early
    marks = early or cross is Action.STORE
    by_part = (early or phase is Phase.GATE) and context.batch_size % 2 == 0
    halves = ForwardMode.HALF_BATCH if context.calls_per_step == 1 else ForwardMode.SKIP_SECOND_CALL
    return ForwardPlan(
        phase=phase,
        cross_attention=(Action.STORE if marks else cross) if context.gates_cross else Action.COMPUTE,
        self_attention=own,
        mode=halves if half else ForwardMode.FULL,
        part=context.active_part if by_part else CachedPart.ALL,
        caches_one_half=context.active_part is not CachedPart.ALL,
        marks_cache=marks,
    )


def _cache_matches(context: ForwardContext, *, half: bool) -> bool:
    """Whether what is cached was made for such a forward."""
    cached = context.cached
    if cached is None or cached is UNSEEN:
        return cached is UNSEEN and not half
    rows = context.batch_size // 2 if half and context.calls_per_step == 1 else context.batch_size
    same = (cached.rows, cached.sample_shape) == (rows, context.sample_shape)
    return same and (cached.part is context.active_part or not context.guided)
