"""Adapters for caches of others on the same denoiser: each is notified where T-GATE changes the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence


class CacheAdapter:
    """
    Adapts a cache of another library to T-GATE, for the time of one call.

    Attributes:
        computes_gate_step (`bool`): Whether every layer runs in the gate step, whatever is cached.
        owns_cfg (`bool`): Whether the cache skips half of the batch itself, inside the denoiser.
    """

    computes_gate_step = False
    owns_cfg = False

    def begin_call(self) -> None:
        """A call starts: reset the cache, whatever was before."""
        self.reset()

    def end_call(self) -> None:
        """The call has ended, however it ended. May come twice, and before `begin_call`."""
        self.reset()

    def reset(self) -> None:
        """Release cached tensors, so that the next step is computed."""
        raise NotImplementedError

    def on_gate_step(self) -> None:
        """A step begins whose outputs T-GATE caches."""

    def on_half_batch(self, active_half: int) -> None:
        """
        A forward begins that runs on half of the batch, after one that ran on all of it.

        Args:
            active_half (`int`): The half that runs, 0 or 1.
        """
        raise NotImplementedError

    def on_full_batch(self) -> None:
        """A forward begins that runs on all of the batch, after half steps. What is cached of the other half is old."""
        raise NotImplementedError

    def on_resume_second_call(self) -> None:
        """A full step begins after half steps, with sequential CFG: its second call runs again."""

    def on_skip_second_call(self) -> None:
        """With sequential CFG, the second call of this step is skipped."""

    def on_step_end(self) -> None:
        """A step has ended."""

    def will_hit(self) -> bool:
        """Whether the next forward, on the present batch, is known to compute hardly anything anew."""
        return False

    def was_hit(self) -> bool:
        """Whether the last forward hardly computed anything anew."""
        return False


class CacheAdapters:
    """
    The adapters of all caches, for one call.

    Args:
        adapters (`Sequence`): Those of each denoiser.
        calls_per_step (`int`, *optional*, defaults to 1): Calls of the denoiser that guidance is made of.
    """

    def __init__(self, adapters: Sequence[Sequence[CacheAdapter]] = (), calls_per_step: int = 1) -> None:
        self._by_denoiser = dict(enumerate(adapters))
        self._all = self._by_denoiser.get(0, ())
        self._calls_per_step = calls_per_step
        self._is_half_step = False
        self._batch_size: int | None = None

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def may_skip_gate_step(self) -> bool:
        """Whether layers may not run in the gate step, so that T-GATE caches their outputs in every step before it."""
        return not all(each.computes_gate_step for each in self._all)

    @property
    def owns_cfg(self) -> bool:
        """Whether a cache skips half of the guidance itself, so that layers may get the second half of the batch."""
        return any(each.owns_cfg for each in self._all)

    def begin_call(self, undo: Callable[[Callable[[], object]], None]) -> None:
        """
        A call starts.

        Args:
            undo (`Callable`): Registers what has to be called when the call has ended.
        """
        for each in itertools.chain.from_iterable(self._by_denoiser.values()):
            undo(each.end_call)
            each.begin_call()

    def on_denoiser_switch(self, index: int) -> None:
        """Another denoiser runs from now on, with full steps at first and with caches of its own."""
        self.on_loop_end()
        self._all = self._by_denoiser.get(index, ())

    @property
    def was_half_step(self) -> bool:
        """Whether one half of guidance was skipped in the last step."""
        return self._is_half_step

    def will_hit(self) -> bool:
        """Whether the next forward, on the present batch, is known to compute hardly anything anew."""
        return any(each.will_hit() for each in self._all)

    def was_hit(self) -> bool:
        """Whether the last forward hardly computed anything anew."""
        return any(each.was_hit() for each in self._all)

    def on_step_begin(self, batch_size: int, *, is_half_step: bool, active_half: int, is_gate_step: bool) -> None:
        """
        A step begins.

        Args:
            batch_size (`int`): The batch that the denoiser runs on in it.
            is_half_step (`bool`): Whether one half of guidance is skipped in it.
            active_half (`int`): The half that runs in a half step, 0 or 1.
            is_gate_step (`bool`): Whether T-GATE caches the outputs of the layers.
        """
        before, self._batch_size = self._batch_size, batch_size
        was_half, self._is_half_step = self._is_half_step, is_half_step
        for each in self._all:
            if is_gate_step:
                each.on_gate_step()
            if self._calls_per_step == 1 and is_half_step and not was_half and before == 2 * batch_size:
                each.on_half_batch(active_half)
            elif self._calls_per_step == 1 and was_half and batch_size == 2 * (before or 0):
                each.on_full_batch()
            elif before not in (None, batch_size):
                # Guidance was switched, or the number of samples has changed: what is cached fits neither.
                each.reset()
            elif self._calls_per_step > 1 and was_half and not is_half_step:
                each.on_resume_second_call()

    def on_skip_second_call(self) -> None:
        """With sequential CFG, the second call of this step is skipped."""
        for each in self._all:
            each.on_skip_second_call()

    def on_step_end(self) -> None:
        """The last forward of a step has ended."""
        for each in self._all:
            each.on_step_end()

    def reset(self) -> None:
        """Reset all caches: the next step computes everything, on the whole batch."""
        for each in self._all:
            each.reset()
        self._is_half_step, self._batch_size = False, None

    def on_loop_end(self) -> None:
        """The denoiser has no more steps in this loop: reset its caches if they hold one half of the batch."""
        if self._is_half_step:
            for each in self._all:
                each.reset()
        self._is_half_step, self._batch_size = False, None
