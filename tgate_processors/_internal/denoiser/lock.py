"""Changes of what pipelines share: one at a time, whichever thread makes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

_Result = TypeVar("_Result")

_lock = threading.Lock()
_postponed: dict[int, Callable[[], Any]] = {}


def exclusively(change: Callable[[], _Result]) -> _Result:
    """Make a change of a denoiser while nobody else makes one. It must not ask for another."""
    try:
        with _lock:
            return change()
    finally:
        _catch_up()


def soon(change: Callable[[], Any]) -> None:
    """Make a change now, or, if one is under way, after that: the garbage collector comes at any time."""
    _postponed[id(change)] = change
    if not _lock.locked():
        _catch_up()


def _catch_up() -> None:
    """Make the changes that were postponed."""
    while _postponed:
        for number, change in list(_postponed.items()):
            try:
                with _lock:
                    change()
            finally:
                _postponed.pop(number, None)
