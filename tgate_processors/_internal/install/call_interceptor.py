"""A call of a denoiser that does not run: where guidance is two calls, the second one of a half step."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.state import TGateState
from ..denoiser.lock import exclusively

# If a module has this attribute, torch calls it in place of hooks and `forward`. A forward hook could not leave the
# forward out, and offloading would replace a `forward` of ours. Copies and pickles leave the attribute out.
_PLACE = "_compiled_call_impl"


class CallInterceptor:
    """
    Stands in front of all calls of a denoiser while runs are on that may leave one out.

    Args:
        denoiser (`torch.nn.Module`): The denoiser.
        behind (`Callable`, *optional*): What `denoiser.compile()` has put in this place.
    """

    def __init__(self, denoiser: torch.nn.Module, behind: Any) -> None:
        self.behind = behind
        self.states: dict[object, TGateState] = {}
        self._denoiser = denoiser

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser, or give what a run has in place of its output."""
        for state in tuple(self.states.values()):
            run = state.current()
            if run is not None and run.skips_next_call(self._denoiser):
                return run.take_skipped_output()
        return (self.behind or self._denoiser._call_impl)(*args, **kwargs)


def stand_in_front(denoiser: torch.nn.Module, state: TGateState, run: object) -> None:
    """Let a run leave out calls of a denoiser. Runs of several threads share the place."""

    def put_in() -> None:
        # Not by attribute, which a compiled denoiser hands on to the one inside.
        front = vars(denoiser).get(_PLACE)
        if not isinstance(front, CallInterceptor):
            front = vars(denoiser)[_PLACE] = CallInterceptor(denoiser, front)
        front.states[run] = state

    exclusively(put_in)


def step_back(denoiser: torch.nn.Module, run: object) -> None:
    """The inverse of `stand_in_front`."""

    def take_out() -> None:
        front = vars(denoiser).get(_PLACE)
        if not isinstance(front, CallInterceptor):
            return
        front.states.pop(run, None)
        # torch reads the place twice in a row; between that no other thread gets its turn.
        if not front.states and front.behind is None:
            del vars(denoiser)[_PLACE]
        elif not front.states:
            vars(denoiser)[_PLACE] = front.behind

    exclusively(take_out)
