"""TaylorSeer: between computed steps, the output of a module is extrapolated from those before."""

from __future__ import annotations

from typing import Any

from .diffusers_hooks import DiffusersHookAdapter


class TaylorSeerAdapter(DiffusersHookAdapter):
    """
    The hook of one module.

    A full step after half steps is computed, whatever the interval says. The output of the half that was left out was
    last computed longer ago than the other's, so its slope is over a longer time than the cache takes it to be. Where
    guidance is two calls, the one that was left out has not been counted, and catches up.
    """

    calls = (1, 2)
    batch = ("taylor_factors", "inactive_shapes")
    needs = ("current_step", "last_update_step")

    def __init__(self, hook: Any) -> None:
        super().__init__(hook)
        self._left_at: int | None = None
        self._interval: int | None = None
        self._share: float | None = None

    @classmethod
    def knows(cls, hook: Any) -> bool:
        """Whether it is a hook of this kind."""
        asked = ("cache_interval", "_measure_should_compute")
        return super().knows(hook) and all(hasattr(hook, name) for name in asked)

    def start(self) -> None:
        """Forget what is kept, also of a forward that was broken off."""
        super().start()
        self._release()

    def halve(self, kept: int) -> None:
        """Keep the half that runs, and lay the other one aside."""
        super().halve(kept)
        self._left_at = None if self.state is None else self.state.last_update_step

    def double(self) -> None:
        """Put both halves together again, and have the next step computed."""
        super().double()
        state = self.state
        if state is None or state.last_update_step is None or self._left_at is None:
            return
        now = state.current_step + 1
        self._share = (now - state.last_update_step) / (now - self._left_at)
        self._compute()

    def catch_up(self) -> None:
        """Count the calls that were left out, and have the next step computed."""
        super().catch_up()
        now = max((state.current_step for state in self.states), default=None)
        for state in self.states:
            state.current_step = now
        self._compute()

    def settle(self) -> None:
        """The computed step is over: correct the slope of the half that was left out."""
        if self._interval is None:
            return
        self._release()
        share, self._share = self._share, None
        for factors in self.state.taylor_factors.values() if share is not None else ():
            for order in range(1, len(factors)):
                rows = factors[order].chunk(2)[1 - self._kept]
                # Beyond the slope, nothing is known of it.
                rows.mul_(share if order == 1 else 0)

    def _compute(self) -> None:
        """Have the next step computed."""
        self._interval, self.hook.cache_interval = self.hook.cache_interval, 1

    def _release(self) -> None:
        """Give the hook its interval back."""
        if self._interval is not None:
            self.hook.cache_interval, self._interval = self._interval, None

    def repeats(self) -> bool:
        """Whether the next forward extrapolates."""
        if not self.states or not self.is_most:
            return False
        computes, state = self.hook._measure_should_compute()
        # As if it had not been asked.
        state.current_step -= 1
        return not computes

    def repeated(self) -> bool:
        """Whether the last forward extrapolated."""
        ran = self.ran
        repeated = all(state.last_update_step != state.current_step for state in ran)
        return self.is_most and bool(ran) and repeated
