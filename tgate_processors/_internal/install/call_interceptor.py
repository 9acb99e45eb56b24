"""Skips calls of a denoiser: those of a forecast step, and with sequential CFG the second one of a half step."""

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
    Intercepts all calls of a denoiser, or of what the pipeline calls before it, for runs that may skip one.

    Args:
        module (`torch.nn.Module`): The denoiser.
        wrapped (`Callable`, *optional*): What `denoiser.compile()` has set under the same name.
    """

    def __init__(self, module: torch.nn.Module, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.states: dict[object, TGateState] = {}
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, or return the output that a run has for a skipped call."""
        # The runs of other threads are not those of this one.
        runs = [run for state in tuple(self.states.values()) if (run := state.current()) is not None]
        for run in runs:
            output = run.skip_call(self._module, args, kwargs)
            if output is not None:
                return output
        output = (self.wrapped or self._module._call_impl)(*args, **kwargs)
        for run in runs:
            run.after_call(self._module, args, kwargs, output)
        return output


def intercept_calls(module: torch.nn.Module, state: TGateState, run: object) -> None:
    """Let a run skip calls of a module; runs of several threads share an interceptor."""

    def put_in() -> None:
        # Not by attribute, which a compiled denoiser hands on to the one inside.
        interceptor = vars(module).get(_CALL_IMPL)
        if not isinstance(interceptor, CallInterceptor):
            interceptor = vars(module)[_CALL_IMPL] = CallInterceptor(module, interceptor)
        interceptor.states[run] = state

    exclusively(put_in)


def stop_intercepting(module: torch.nn.Module, run: object) -> None:
    """The inverse of `intercept_calls`."""

    def take_out() -> None:
        interceptor = vars(module).get(_CALL_IMPL)
        if not isinstance(interceptor, CallInterceptor):
            return
        interceptor.states.pop(run, None)
        # torch reads the attribute twice in a row; no other thread runs in between.
        if not interceptor.states and interceptor.wrapped is None:
            del vars(module)[_CALL_IMPL]
        elif not interceptor.states:
            vars(module)[_CALL_IMPL] = interceptor.wrapped

    exclusively(take_out)
