"""What runs beside T-GATE on the same denoiser and keeps tensors of its batch: told where the batch changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence


class CacheAdapter:
    """
    A cache of somebody else's, for the time of one call.

    Attributes:
        computes_gate (`bool`): Whether every layer runs in the gate step, whatever the cache has.
        keeps_guidance (`bool`): Whether it leaves out half of the batch itself, inside the denoiser.
    """

    computes_gate = False
    keeps_guidance = False

    def begin_call(self) -> None:
        """A call starts: start afresh, whatever was before."""
        self.start()

    def end_call(self) -> None:
        """The call has ended, however it ended. May come twice, and before `begin_call`."""
        self.start()

    def start(self) -> None:
        """Forget what is kept."""
        raise NotImplementedError

    def at_gate(self) -> None:
        """A step begins whose outputs T-GATE keeps."""

    def halve(self, kept: int) -> None:
        """
        A forward begins that runs on half of the batch, where the last one ran on all of it.

        Args:
            kept (`int`): The half that runs, 0 or 1.
        """
        raise NotImplementedError

    def double(self) -> None:
        """The inverse of `halve`: both halves run again, and what the other half has kept is old by now."""
        raise NotImplementedError

    def catch_up(self) -> None:
        """A full step begins after half steps, where guidance is two calls and the second one was left out."""

    def leave_out(self) -> None:
        """The second call of guidance comes now, and does not run."""

    def settle(self) -> None:
        """A step has ended."""

    def repeats(self) -> bool:
        """Whether it is known that the next forward, as the batch is, hardly computes anything anew."""
        return False

    def repeated(self) -> bool:
        """Whether the last forward hardly computed anything anew."""
        return False


class CacheAdapters:
    """
    The adapters of all caches, for one call.

    Args:
        adapters (`Sequence`): Those of each denoiser.
        calls (`int`, *optional*, defaults to 1): Calls of the denoiser that guidance is made of.
    """

    def __init__(self, adapters: Sequence[Sequence[CacheAdapter]] = (), calls: int = 1) -> None:
        self._by_denoiser = dict(enumerate(adapters))
        self._all = self._by_denoiser.get(0, ())
        self._calls = calls
        self._half = False
        self._rows: int | None = None

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def skip_the_gate(self) -> bool:
        """Whether layers may not run in the gate step, so that what they give is to be kept in every step before."""
        return not all(each.computes_gate for each in self._all)

    @property
    def keep_guidance(self) -> bool:
        """Whether the layers may find half of the batch that the denoiser was given, the second one."""
        return any(each.keeps_guidance for each in self._all)

    def begin_call(self, undo: Callable[[Callable[[], object]], None]) -> None:
        """
        A call starts.

        Args:
            undo (`Callable`): Is told what has to be called when the call has ended.
        """
        for each in itertools.chain.from_iterable(self._by_denoiser.values()):
            undo(each.end_call)
            each.begin_call()

    def take_over(self, number: int) -> None:
        """Another denoiser runs from now on, with full steps at first. What its caches keep is of no other one."""
        self.end_loop()
        self._all = self._by_denoiser.get(number, ())

    @property
    def half(self) -> bool:
        """Whether one half of guidance was left out in the last step."""
        return self._half

    def repeats(self) -> bool:
        """Whether it is known that the next forward, as the batch is, hardly computes anything anew."""
        return any(each.repeats() for each in self._all)

    def repeated(self) -> bool:
        """Whether the last forward hardly computed anything anew."""
        return any(each.repeated() for each in self._all)

    def begin_step(self, rows: int, *, half: bool, kept: int, at_gate: bool) -> None:
        """
        A step begins.

        Args:
            rows (`int`): The batch that the denoiser runs on in it.
            half (`bool`): Whether one half of guidance is left out in it.
            kept (`int`): The half that would, 0 or 1.
            at_gate (`bool`): Whether T-GATE keeps what the layers give.
        """
        before, self._rows = self._rows, rows
        was_half, self._half = self._half, half
        for each in self._all:
            if at_gate:
                each.at_gate()
            if self._calls == 1 and half and not was_half and before == 2 * rows:
                each.halve(kept)
            elif self._calls == 1 and was_half and rows == 2 * (before or 0):
                each.double()
            elif before not in (None, rows):
                # Guidance was switched, or there are other pictures: what is kept fits neither.
                each.start()
            elif self._calls > 1 and was_half and not half:
                each.catch_up()

    def leave_out(self) -> None:
        """The second call of guidance comes now, and does not run."""
        for each in self._all:
            each.leave_out()

    def end_step(self) -> None:
        """The last forward of a step has ended."""
        for each in self._all:
            each.settle()

    def begin_afresh(self) -> None:
        """The next step computes everything, on the whole batch."""
        for each in self._all:
            each.start()
        self._half, self._rows = False, None

    def end_loop(self) -> None:
        """A denoiser has no more steps: if it comes back, it is not with the half of its last one."""
        if self._half:
            for each in self._all:
                each.start()
        self._half, self._rows = False, None
