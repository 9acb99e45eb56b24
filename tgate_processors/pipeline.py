"""The pipeline that T-GATE is installed in: its class for the time being, and the call that runs gated."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

from .callback import TGateCallback
from .compilation import room_for_graphs
from .deepcache import DeepCacheOrder
from .installation import Installation
from .run import PipelineRun
from .state import TGateState

# In the `__dict__` of a pipeline with T-GATE: its installation.
_ATTRIBUTE = "_tgate"
# In the generated class of such a pipeline: its class before.
_BASE = "_tgate_base"


def installed(pipe: Any) -> Installation | None:
    """What is installed in a pipeline."""
    found: Installation | None = vars(pipe).get(_ATTRIBUTE)
    return found


def install(pipe: Any, callback: TGateCallback, deepcache: DeepCacheOrder | None) -> None:
    """Put T-GATE into a pipeline, or nothing of it if that fails."""
    installation = Installation(callback, deepcache)
    try:
        installation.follow(pipe)
    except BaseException:
        installation.remove()
        raise
    vars(pipe)[_ATTRIBUTE] = installation
    pipeline_class: type = type(pipe)
    pipe.__class__ = _gated_class(pipeline_class)


def uninstall(pipe: Any) -> None:
    """The inverse of `install`."""
    vars(pipe).pop(_ATTRIBUTE).remove()
    pipe.__class__ = vars(type(pipe)).get(_BASE, type(pipe))


@functools.cache
def _gated_class(pipeline_class: type) -> type:
    """The class of a pipeline with T-GATE: under the same name, with a `__call__` that runs gated."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _gated_call(self, pipeline_class.__call__, args, kwargs)

    body = {
        "__call__": functools.update_wrapper(__call__, pipeline_class.__call__),
        "__module__": pipeline_class.__module__,
        "__qualname__": pipeline_class.__qualname__,
        "__doc__": pipeline_class.__doc__,
        _BASE: pipeline_class,
    }
    return type(pipeline_class.__name__, (pipeline_class,), body)


def _gated_call(pipe: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a pipeline with T-GATE, and hold nothing when it ends in whatever way."""
    installation = installed(pipe)
    try:
        bound = inspect.signature(call).bind(pipe, *args, **kwargs)
    except TypeError:
        # The pipeline's own error names itself.
        installation = None
    if installation is None:
        return call(pipe, *args, **kwargs)
    callback = installation.callback
    if callback.running:
        raise RuntimeError(
            f"{type(pipe).__name__} is running already, in another thread or in a call of which this is a callback: "
            "give every call that overlaps with another one a pipeline of its own, "
            f"{type(pipe).__name__}.from_pipe(pipe, scheduler=...)."
        )
    installation.follow(pipe)
    ticks = "callback_on_step_end" in bound.signature.parameters
    given = {**{name: p.default for name, p in bound.signature.parameters.items()}, **bound.arguments}
    if ticks:
        _chain_callback(pipe, callback, bound)
    elif bound.arguments.get("callback") is not None:
        bound.arguments["callback"] = _suspending(callback.state, bound.arguments["callback"])
    callback.start(PipelineRun(pipe, given), by_forward=not ticks)
    try:
        deepcache = installation.deepcache.running() if installation.deepcache else contextlib.nullcontext()
        with room_for_graphs(), deepcache:
            return call(*bound.args, **bound.kwargs)
    except BaseException:
        installation.recover()
        raise
    finally:
        callback.reset()


def _suspending(state: TGateState, function: Any) -> Any:
    """A function of the user's that may call other pipelines on the same denoiser."""

    @functools.wraps(function, updated=())
    def suspended(*args: Any, **kwargs: Any) -> Any:
        with state.suspended():
            return function(*args, **kwargs)

    suspended.tensor_inputs = getattr(function, "tensor_inputs", None)  # type: ignore[attr-defined]
    return suspended


def _chain_callback(pipe: Any, callback: TGateCallback, bound: inspect.BoundArguments) -> None:
    """Put the clock behind the user's callback, which sees what it would see without T-GATE."""
    # Not at the top: it would make the import of this package load what `import diffusers` leaves for later.
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    users = bound.arguments.get("callback_on_step_end")
    if any(isinstance(part, TGateCallback) for part in getattr(users, "callbacks", [users])):
        raise ValueError(
            "callback_on_step_end has a TGateCallback, but T-GATE is applied to the pipeline already: leave the "
            "callback out, or call remove_tgate(pipe) first."
        )
    suspended = None if users is None else _suspending(callback.state, users)
    if isinstance(users, (PipelineCallback, MultiPipelineCallbacks)):
        bound.arguments["callback_on_step_end"] = MultiPipelineCallbacks([suspended, callback])
        return
    default = bound.signature.parameters["callback_on_step_end_tensor_inputs"].default
    wanted = bound.arguments.get("callback_on_step_end_tensor_inputs", default) or []
    # The clock compares the batch with the latents; a function that did not ask for them does not get them.
    added = [name for name in ("latents",) if name not in wanted and name in pipe._callback_tensor_inputs]

    def on_step_end(pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        ours = dict(callback_kwargs)
        outputs = {name: value for name, value in callback_kwargs.items() if name not in added}
        if suspended is not None:
            outputs = suspended(pipeline, step_index, timestep, outputs)
        callback(pipeline, step_index, timestep, ours)
        return outputs

    bound.arguments["callback_on_step_end"] = on_step_end
    bound.arguments["callback_on_step_end_tensor_inputs"] = [*wanted, *added]
