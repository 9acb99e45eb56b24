"""Skips calls of a denoiser: with sequential CFG, the second one of a half step."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.state import TGateState
from ..denoiser.lock import exclusively

# If a module has this attribute, torch calls it in place of hooks and `forward`. A forward hook could not skip the
# forward, and offloading would replace a `forward` of ours. Copies and pickles leave the attribute out.
_CALL_IMPL = "_compiled_call_impl"


class CallInterceptor:
    """
    Intercepts all calls of a denoiser, for runs that may skip one.

    Args:
        denoiser (`torch.nn.Module`): The denoiser.
        wrapped (`Callable`, *optional*): What `denoiser.compile()` has set under the same name.
    """

    def __init__(self, denoiser: torch.nn.Module, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.states: dict[object, TGateState] = {}
        self._denoiser = denoiser

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser, or return the output that a run has for a skipped call."""
        for state in tuple(self.states.values()):
            run = state.current()
            if run is not None and run.skips_next_call(self._denoiser):
                return run.take_skipped_output()
        return (self.wrapped or self._denoiser._call_impl)(*args, **kwargs)


def intercept_calls(denoiser: torch.nn.Module, state: TGateState, run: object) -> None:
    """Let a run skip calls of a denoiser; runs of several threads share an interceptor."""

    def put_in() -> None:
        # Not by attribute, which a compiled denoiser hands on to the one inside.
        interceptor = vars(denoiser).get(_CALL_IMPL)
        if not isinstance(interceptor, CallInterceptor):
            interceptor = vars(denoiser)[_CALL_IMPL] = CallInterceptor(denoiser, interceptor)
        interceptor.states[run] = state

    exclusively(put_in)


def stop_intercepting(denoiser: torch.nn.Module, run: object) -> None:
    """The inverse of `intercept_calls`."""

    def take_out() -> None:
        interceptor = vars(denoiser).get(_CALL_IMPL)
        if not isinstance(interceptor, CallInterceptor):
            return
        interceptor.states.pop(run, None)
        # torch reads the attribute twice in a row; no other thread runs in between.
        if not interceptor.states and interceptor.wrapped is None:
            del vars(denoiser)[_CALL_IMPL]
        elif not interceptor.states:
            vars(denoiser)[_CALL_IMPL] = interceptor.wrapped

    exclusively(take_out)
