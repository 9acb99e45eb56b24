"""What is put in place for one call, and how all of it goes again, wherever an interrupt may come."""

from __future__ import annotations

from collections.abc import Callable


class Cleanup:
    """
    What has to be undone at the end of a call.

    Each part is noted before it is done, and can be undone twice. So `end` runs in two `finally` blocks, one inside the
    other: an interrupt in the first one leaves the rest to the second. `contextlib.ExitStack` loses the part that it is
    at.

    Attributes:
        completed (`bool`): Whether the call has come to its end.
    """

    def __init__(self) -> None:
        self.completed = False
        self._undo: list[Callable[[], object]] = []

    def undo(self, part: Callable[[], object]) -> None:
        """Note how a part is undone that is done next. The last one is undone first."""
        self._undo.append(part)

    def end(self) -> None:
        """Undo all parts."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
