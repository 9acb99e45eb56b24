"""Undoes at the end of a call all that was set up for it, wherever an interrupt may come."""

from __future__ import annotations

from collections.abc import Callable


class Cleanup:
    """
    What has to be undone at the end of a call.

    Each part is added before it is done, and can be undone twice. So `run` is called in two `finally` blocks, one
    inside the other: an interrupt in the first one leaves the rest to the second. `contextlib.ExitStack` loses the part
    that it is at.

    Attributes:
        completed (`bool`): Whether the call has come to its end.
    """

    def __init__(self) -> None:
        self.completed = False
        self._undo: list[Callable[[], object]] = []

    def add(self, part: Callable[[], object]) -> None:
        """Add how the part that is done next is undone. The last one is undone first."""
        self._undo.append(part)

    def run(self) -> None:
        """Undo all parts."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
