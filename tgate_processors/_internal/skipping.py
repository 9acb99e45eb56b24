"""A call of a denoiser that does not run: where guidance is two calls, the second one of a half step."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .state import TGateState

_lock = threading.Lock()
# If a module has this attribute, torch calls it in place of hooks and `forward`. A forward hook could not leave the
# forward out, and offloading would replace a `forward` of ours. Copies and pickles leave the attribute out.
_PLACE = "_compiled_call_impl"


class Front:
    """
    Stands in front of all calls of a denoiser while runs are on that may leave one out.

    Args:
        denoiser (`torch.nn.Module`): The denoiser.
        behind (`Callable`, *optional*): What `denoiser.compile()` has put in this place.
    """

    def __init__(self, denoiser: torch.nn.Module, behind: Any) -> None:
        self.behind = behind
        self.states: list[TGateState] = []
        self._denoiser = denoiser

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser, or give what a run has in place of its output."""
        for state in tuple(self.states):
            run = state.current()
            if run is not None and run.skips(self._denoiser):
                return run.skipped()
        return (self.behind or self._denoiser._call_impl)(*args, **kwargs)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module was compiled in place."""
    found = getattr(module, _PLACE, None)
    return (found.behind if isinstance(found, Front) else found) is not None


@contextmanager
def skipping(denoisers: Iterable[torch.nn.Module], state: TGateState) -> Iterator[None]:
    """Let the runs of a state leave out calls of these denoisers."""
    entered = []
    try:
        for denoiser in denoisers:
            _enter(denoiser, state)
            entered.append(denoiser)
        yield
    finally:
        for denoiser in entered:
            _leave(denoiser, state)


def _enter(denoiser: torch.nn.Module, state: TGateState) -> None:
    """Stand in front of a denoiser; runs of several threads share the place."""
    with _lock:
        # Not by attribute, which a compiled denoiser hands on to the one inside.
        front = vars(denoiser).get(_PLACE)
        if not isinstance(front, Front):
            front = vars(denoiser)[_PLACE] = Front(denoiser, front)
        front.states.append(state)


def _leave(denoiser: torch.nn.Module, state: TGateState) -> None:
    """The inverse of `_enter`."""
    with _lock:
        front = vars(denoiser)[_PLACE]
        front.states.remove(state)
        if front.states:
            return
        if front.behind is None:
            del vars(denoiser)[_PLACE]
        else:
            vars(denoiser)[_PLACE] = front.behind
