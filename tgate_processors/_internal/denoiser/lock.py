"""Changes of what pipelines share: one at a time, whichever thread makes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

_Result = TypeVar("_Result")

_lock: Any = threading.RLock()
_postponed: dict[int, Callable[[], Any]] = {}


def exclusively(change: Callable[[], _Result]) -> _Result:
    """Make a change of a denoiser while no other thread makes one. The change must not ask for another."""
    # Twice, for an interrupt in the first; `with` has a place where one would leave the lock closed.
    try:
        try:
            _lock.acquire()
            return change()
        finally:
            _release()
    finally:
        _release()
        _catch_up()


def soon(change: Callable[[], Any]) -> None:
    """Make a change now, or, if one is under way, after that: the garbage collector comes at any time."""
    _postponed[id(change)] = change
    if not _lock._is_owned():
        _catch_up()


def _release() -> None:
    """Open the lock if this thread has closed it."""
    if _lock._is_owned():
        _lock.release()


def _catch_up() -> None:
    """Make the changes that were postponed. If another thread is making one, it catches up itself."""
    try:
        try:
            while _postponed and _lock.acquire(blocking=False):
                for number, change in list(_postponed.items()):
                    change()
                    _postponed.pop(number, None)
                _release()
        finally:
            _release()
    finally:
        _release()
