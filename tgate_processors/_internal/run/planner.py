"""Plans every forward of a run, and passes the plan on to the layers and to the caches of others."""

from __future__ import annotations

from ..attention.state import TGateState
from ..caches.adapter import CacheAdapters
from ..denoiser.inputs import DenoiserInputs
from ..guidance.cfg_form import CFGForm
from ..plan.forward_plan import NO_FORWARD, CachedPart, ForwardContext, ForwardPlan, plan_forward
from ..plan.step_plan import CFGHalf, Phase, StepPlan
from ..plan.steps import StepCounter
from .denoisers import DenoiserCaches
from .messages import raise_uncached_layers


class ForwardPlanner:
    """
    Gathers the context of each forward, and plans it with `plan_forward`.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        denoisers (`DenoiserCaches`): The denoisers, and what their layers have cached.
        caches (`CacheAdapters`): The caches of others.
        cfg (`CFGForm`): The form of guidance.
        gates_cross (`bool`): Whether cross-attention is gated.

    Attributes:
        plan (`ForwardPlan`): The plan of the forward that runs, or has run last.
    """

    def __init__(
        self,
        state: TGateState,
        denoisers: DenoiserCaches,
        caches: CacheAdapters,
        cfg: CFGForm,
        *,
        gates_cross: bool,
    ) -> None:
        self._schedule = state.schedule
        self._denoisers = denoisers
        self._caches = caches
        self._cfg = cfg
        self._gates_cross = gates_cross
        self.reset()

    def reset(self) -> None:
        """A loop begins, or has ended."""
        self.plan = ForwardPlan()
        self._cache_invalidated = False

    def invalidate(self) -> None:
        """What was cached no longer holds: the next step computes everything."""
        self._cache_invalidated = True

    @property
    def is_invalidated(self) -> bool:
        """Whether what was cached no longer holds."""
        return self._cache_invalidated

    def step_plan(self, loop: StepCounter, *, is_split: bool = True) -> StepPlan:
        """The plan of the step that runs now, by the schedule or the controller; `is_split` if it has two halves."""
        return loop.current_plan(
            has_history=self._cfg.has_history,
            cache_hit=self._caches.will_hit(),
            was_half=self._caches.was_half_step,
            guided=is_split,
        )

    def skip_forward(self) -> None:
        """The denoiser is not called in this step."""
        self.plan = NO_FORWARD

    def halves_next_forward(self, loop: StepCounter, shape: tuple[int, ...]) -> bool:
        """Whether a guided step that begins now will run on half the batch, if its latents are of this shape."""
        cached = self._denoisers.active.cache_key
        if loop.is_finished or cached is None or self.step_plan(loop).phase is not Phase.FIDELITY_IMPROVING:
            return False
        return cached.part is not CachedPart.ALL and cached.sample_shape[-2:] == shape[-2:]

    def begin_step(
        self,
        loop: StepCounter,
        inputs: DenoiserInputs,
        active_half: CFGHalf,
        *,
        guided: bool,
        can_skip_half: bool,
        may_halve: bool,
    ) -> tuple[StepPlan, ForwardContext]:
        """
        Plan a forward, the first one of its step, and apply the plan.

        Args:
            loop (`StepCounter`): Its loop.
            inputs (`DenoiserInputs`): What the denoiser is given.
            active_half (`str`): The half that a half step runs on, by its place.
            guided (`bool`): Whether guidance is on.
            can_skip_half (`bool`): Whether guidance is two halves, of which one can be skipped.
            may_halve (`bool`): Whether no other hook reads the batch after ours.

        Returns:
            `tuple` of `StepPlan` and `ForwardContext`: What the plan was made from.
        """
        active, sequential, part = self._denoisers.active, self._cfg.calls_per_step > 1, CachedPart.ALL
        if guided and can_skip_half and not sequential:
            part = CachedPart.FIRST if active_half == "unconditional" else CachedPart.SECOND
            if active.layers.layout.averages_when_dropped and not self._schedule.predicts:
                part = CachedPart.MEAN
        context = ForwardContext(
            batch_size=inputs.batch_size,
            sample_shape=inputs.sample_shape,
            guided=guided,
            can_skip_half=can_skip_half,
            # A denoiser that takes over begins with full steps.
            may_skip=may_halve and not (self._denoisers.switched and self._cfg.lacks_history),
            calls_per_step=self._cfg.calls_per_step,
            active_part=part,
            cached=active.cache_key,
            gates_cross=self._gates_cross,
            cache_invalidated=self._cache_invalidated,
            stores_early=self._caches.may_skip_gate_step and loop.has_half_steps_left,
        )
        step = self.step_plan(loop, is_split=context.splits_guidance)
        self.plan, self._cache_invalidated = plan_forward(step, context), False
        # Without guidance there is no second call either.
        self._apply_plan(inputs, active_half, skips_half=self.plan.is_half_step or (sequential and not guided))
        return step, context

    def begin_second_call(self, *, can_skip_half: bool) -> None:
        """The second call of a full step: as the first one, but what only half steps reuse is not cached in it."""
        self._denoisers.call_index = 1
        cache = self._denoisers.attention_cache
        cache.actions.set(*self.plan.for_second_call(can_skip_half=can_skip_half))
        cache.before_forward()

    def _apply_plan(self, inputs: DenoiserInputs, active_half: CFGHalf, *, skips_half: bool) -> None:
        """Set the actions of the layers, and notify the caches of others."""
        plan, cache = self.plan, self._denoisers.attention_cache
        if plan.is_half_step and self._gates_cross:
            raise_uncached_layers(cache.missing_layers(), "keep no output, so no half of the batch can be left out")
        halved = plan.halves_batch and self._gates_cross
        cache.actions.set(plan.cross_attention, plan.self_attention, part=plan.part, on_half_batch=halved)
        self._caches.on_step_begin(
            inputs.batch_size // 2 if plan.halves_batch else inputs.batch_size,
            is_half_step=skips_half,
            active_half=int(active_half == "conditional"),
            is_gate_step=plan.phase is Phase.GATE,
        )
        cache.before_forward()
