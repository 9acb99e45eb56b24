"""The pipeline that T-GATE is installed in: its temporary class, and the call that runs gated."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any

from ..attention.state import ActiveRun, TGateState
from ..caches.adapter import CacheAdapters
from ..families import ResolvedPipeline
from ..run.intercepted_run import InterceptedRun
from .call_interceptor import intercept_calls, stop_intercepting
from .callback_chain import chain_callback, suspend_in_legacy_callback
from .class_proxy import current_call, is_proxy_class, make_proxy_class, restore_class, unwrapped_call, wrapped_class_of
from .cleanup import Cleanup
from .gradient_checkpointing import replay_checkpoints, stop_replaying_checkpoints
from .guiders import GuiderInstallation
from .installation import Installation
from .misplaced_settings import reject_misplaced_settings
from .pipeline_call import call_of
from .pipeline_check import reject_forecasts
from .recompile_limit import RaisedRecompileLimit, restore_recompile_limit
from .split_batch import split_batch_check

# The attribute of a pipeline with T-GATE that holds its installation.
_TGATE_ATTRIBUTE = "_tgate"


def installed(pipe: Any) -> Installation | None:
    """What is installed in a pipeline, if all of it is."""
    found: Installation | None = vars(pipe).get(_TGATE_ATTRIBUTE)
    return found if is_proxy_class(type(pipe)) else None


def install(pipe: Any, installation: Installation, found: ResolvedPipeline | None = None) -> None:
    """Install T-GATE into a pipeline, or nothing of it if that fails; `found` is given if it was resolved already."""
    try:
        # Set first and deleted last, so that after an interrupt it can uninstall whatever was installed.
        vars(pipe)[_TGATE_ATTRIBUTE] = installation
        installation.attach(pipe, found)
        pipe.__class__ = _gated_pipeline_class(wrapped_class_of(type(pipe)))
    except BaseException:
        uninstall(pipe)
        raise


def uninstall(pipe: Any) -> None:
    """The inverse of `install`, also of a part of it."""
    installation = vars(pipe).get(_TGATE_ATTRIBUTE)
    if installation is None:
        return
    if installation.is_running(pipe):
        raise RuntimeError(
            f"T-GATE: {type(pipe).__name__} is running: call apply_tgate and remove_tgate between two calls."
        )
    installation.uninstall(pipe)
    pipe.__class__ = restore_class(type(pipe))
    del vars(pipe)[_TGATE_ATTRIBUTE]


def replace(pipe: Any, installation: Installation, found: ResolvedPipeline | None = None) -> None:
    """Install in place of what is installed already, which is there again if that fails."""
    before = installed(pipe)
    uninstall(pipe)
    restore_recompile_limit()
    try:
        install(pipe, installation, found)
    except BaseException:
        if before is not None:
            install(pipe, before)
        raise


@functools.cache
def _gated_pipeline_class(pipeline_class: Any) -> Any:
    """The class of a pipeline with T-GATE: under the same name, with a `__call__` that runs gated."""

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        # Not by the name of the class, which is that of the one before.
        return _rebuild, (pipeline_class,), vars(self)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        vars(self).update(state)
        installation = installed(self)
        if installation is not None:
            installation.attach_copy(self)

    def __repr__(self: Any) -> str:
        installation, plain = installed(self), pipeline_class.__repr__(self)
        return plain if installation is None else f"{plain}\nwith T-GATE: {installation.state.schedule!r}"

    gated = _make_call(unwrapped_call(pipeline_class), pipeline_class)
    copying = {"__reduce_ex__": __reduce_ex__, "__setstate__": __setstate__}
    return make_proxy_class(pipeline_class, {"__call__": gated, "__repr__": __repr__, **copying})


def _rebuild(pipeline_class: Any) -> Any:
    """An empty pipeline with T-GATE, to be filled from a pickle or a copy."""
    gated = _gated_pipeline_class(pipeline_class)
    return gated.__new__(gated)


def _make_call(call: Callable[..., Any], base: Any = None) -> Callable[..., Any]:
    """Make the gated call of a pipeline, within the wrappers of others; also of the call that it wraps itself."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = _bind_call(self, call, args, kwargs)
        if bound is None:
            return call(self, *args, **kwargs)
        now = call if base is None else current_call(base, __call__, call)
        if inspect.isgeneratorfunction(call):
            return _drive_generator(self, now, bound)
        cleanup = Cleanup()
        # Twice, for an interrupt in the first.
        try:
            try:
                state, run = _begin_run(self, bound, cleanup, wrapped=now is not call)
                cleanup.add(functools.partial(state.leave, state.current()))
                state.enter(run)
                output = now(*bound.args, **bound.kwargs)
                cleanup.completed = True
                return output
            finally:
                cleanup.run()
        finally:
            cleanup.run()

    functools.update_wrapper(__call__, call)
    __call__.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    del __call__.__wrapped__  # type: ignore[attr-defined]
    if hasattr(call, "__wrapped__"):
        __call__.__wrapped__ = _make_call(call.__wrapped__)  # type: ignore[attr-defined]
    return __call__


def _bind_call(pipe: Any, call: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> inspect.BoundArguments | None:
    """Bind the arguments of a call; `None` if they do not fit, so that the pipeline raises its own error."""
    installation = installed(pipe)
    if installation is None or installation.is_reentrant_call(pipe):
        return None
    if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call):
        raise ValueError(
            f"T-GATE: the call of {type(pipe).__name__} is asynchronous, and T-GATE gates calls that run in one thread "
            "from their start to their end. Await it in a plain function, or call remove_tgate(pipe) to use it."
        )
    signature = inspect.signature(call)
    reject_misplaced_settings(signature, kwargs)
    try:
        return signature.bind(pipe, *args, **kwargs)
    except TypeError:
        return None


def _begin_run(
    pipe: Any, bound: inspect.BoundArguments, cleanup: Cleanup, *, wrapped: bool = False
) -> tuple[TGateState, ActiveRun]:
    """Begin the run of a call, and chain its step callback into the arguments."""
    installation = installed(pipe)
    assert installation is not None
    state = installation.state
    installation.begin_call(pipe, cleanup, wrapped=wrapped)
    if isinstance(installation, GuiderInstallation):
        if bound.arguments.get("callback_on_step_end") is not None:
            chain_callback(pipe, state, bound, is_diffusers_loop=True)
        return state, installation.gate_guiders(pipe, cleanup)
    found, layers, caches, forwards = installation.refresh(pipe)
    call = call_of(found, pipe, _all_arguments(bound))
    if not found.counts_forwards:
        chain_callback(pipe, state, bound, is_diffusers_loop=found.is_diffusers_loop)
    suspend_in_legacy_callback(state, bound)
    adapters = CacheAdapters(caches, found.family.layout.calls_per_step)
    if adapters:
        reject_forecasts(state.schedule, "another cache on the denoiser counts the steps in which it is called")
    split_batch = split_batch_check(found.denoisers)
    run = InterceptedRun(
        state,
        call,
        layers,
        can_skip_half=found.default_cfg_half is not None and not adapters.owns_cfg,
        counts_forwards=found.counts_forwards,
        caches=adapters,
        cross_attention=installation.cross_attention,
        forwards=forwards,
        can_forecast=not adapters,
        check_rows=split_batch and split_batch.after_forward,
    )
    cleanup.add(lambda: installation.end_run(pipe, run, layers, completed=cleanup.completed))
    if split_batch is not None:
        cleanup.add(split_batch.close)
        split_batch.open()
    room = RaisedRecompileLimit()
    cleanup.add(room.close)
    room.open()
    for denoiser in found.denoisers:
        cleanup.add(functools.partial(stop_replaying_checkpoints, denoiser, run))
        replay_checkpoints(denoiser, state, run)
    for module in (*found.denoisers, *([] if found.controlnet is None else [found.controlnet])):
        cleanup.add(functools.partial(stop_intercepting, module, run))
        intercept_calls(module, state, run)
    adapters.begin_call(cleanup.add)
    return state, run


def _drive_generator(pipe: Any, call: Callable[..., Any], bound: inspect.BoundArguments) -> Generator[Any, Any, Any]:
    """Drive a call that yields: the thread is in no run while the consumer runs."""
    cleanup = Cleanup()
    try:
        try:
            state, run = _begin_run(pipe, bound, cleanup)
            inner = call(*bound.args, **bound.kwargs)
            resume, value = inner.send, None
            while True:
                try:
                    # The consumer may ask for every item in another thread.
                    with state.entered(run):
                        item = resume(value)
                except StopIteration as stop:
                    cleanup.completed = True
                    return stop.value
                try:
                    resume, value = inner.send, (yield item)
                except GeneratorExit:
                    inner.close()
                    raise
                except BaseException as error:
                    resume, value = inner.throw, error
        finally:
            cleanup.run()
    finally:
        cleanup.run()


def _all_arguments(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments of a call by name, those that it swallows too, with their defaults."""
    parameters = bound.signature.parameters
    arguments = {name: parameter.default for name, parameter in parameters.items()}
    arguments.update(bound.arguments)
    swallowing = [name for name, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    for name in swallowing:
        arguments.update(bound.arguments.get(name, {}))
    return arguments
