"""TaylorSeer: between computed steps, the output of a module is extrapolated from those before."""

from __future__ import annotations

from typing import Any

from .diffusers_hooks import DiffusersHookAdapter


class TaylorSeerAdapter(DiffusersHookAdapter):
    """
    Adapts the hook of one module.

    A full step after half steps is computed, whatever the interval says. The output of the skipped half was last
    computed longer ago than the other's, so its slope is over a longer time than the cache takes it to be. With
    sequential CFG, skipped calls were not counted by the cache, so the count is set right.
    """

    supported_calls_per_step = (1, 2)
    batched_attributes = ("taylor_factors", "inactive_shapes")
    required_attributes = ("current_step", "last_update_step")

    def __init__(self, hook: Any) -> None:
        super().__init__(hook)
        self._half_since: int | None = None
        self._saved_interval: int | None = None
        self._slope_ratio: float | None = None

    @classmethod
    def matches(cls, hook: Any) -> bool:
        """Whether a hook is of this kind."""
        asked = ("cache_interval", "_measure_should_compute")
        return super().matches(hook) and all(hasattr(hook, name) for name in asked)

    def reset(self) -> None:
        """Release cached tensors, and undo what a forward that failed has left."""
        super().reset()
        self._restore_interval()

    def on_half_batch(self, active_half: int) -> None:
        """Leave the active half in the cache, and stash the other one."""
        super().on_half_batch(active_half)
        self._half_since = None if self.state is None else self.state.last_update_step

    def on_full_batch(self) -> None:
        """Join both halves again, and have the next step computed."""
        super().on_full_batch()
        state = self.state
        if state is None or state.last_update_step is None or self._half_since is None:
            return
        now = state.current_step + 1
        self._slope_ratio = (now - state.last_update_step) / (now - self._half_since)
        self._force_compute()

    def on_resume_second_call(self) -> None:
        """Count the skipped calls, and have the next step computed."""
        super().on_resume_second_call()
        now = max((state.current_step for state in self.states), default=None)
        for state in self.states:
            state.current_step = now
        self._force_compute()

    def on_step_end(self) -> None:
        """The computed step is over: correct the slope of the half that was skipped."""
        if self._saved_interval is None:
            return
        self._restore_interval()
        ratio, self._slope_ratio = self._slope_ratio, None
        for factors in self.state.taylor_factors.values() if ratio is not None else ():
            for order in range(1, len(factors)):
                rows = factors[order].chunk(2)[1 - self._active_half]
                # Of higher orders, nothing is known.
                rows.mul_(ratio if order == 1 else 0)

    def _force_compute(self) -> None:
        """Have the next step computed."""
        self._saved_interval, self.hook.cache_interval = self.hook.cache_interval, 1

    def _restore_interval(self) -> None:
        """Restore the interval of the hook."""
        if self._saved_interval is not None:
            self.hook.cache_interval, self._saved_interval = self._saved_interval, None

    def will_hit(self) -> bool:
        """Whether the next forward extrapolates."""
        if not self.states or not self.covers_most_weights:
            return False
        computes, state = self.hook._measure_should_compute()
        # `_measure_should_compute` has counted a step.
        state.current_step -= 1
        return not computes

    def was_hit(self) -> bool:
        """Whether the last forward extrapolated."""
        states = self.active_states
        repeated = all(state.last_update_step != state.current_step for state in states)
        return self.covers_most_weights and bool(states) and repeated
