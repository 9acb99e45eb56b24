"""The pipeline that T-GATE is installed in: its temporary class, and the call that runs gated."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any

from ..attention.state import ActiveRun, TGateState
from ..caches.adapter import CacheAdapters
from ..families import ResolvedPipeline
from ..run.run import PipelineRun
from .call_interceptor import stand_in_front, step_back
from .callback_chain import chain, suspend_legacy
from .class_proxy import base_of, call_now, front, give_back, is_front, plain_call
from .cleanup import Cleanup
from .gradient_checkpointing import replay, stop_replaying
from .guiders import GuiderInstallation
from .installation import Installation
from .pipeline_call import call_of
from .recompile_limit import RaisedRecompileLimit

# In the `__dict__` of a pipeline with T-GATE: its installation.
_ATTRIBUTE = "_tgate"
# The published package takes these settings in the call, and some pipelines swallow them. How `apply_tgate` takes them.
_SETTINGS = {
    **{name: f"{name}={{!r}}" for name in ("gate_step", "fi_interval")},
    **{name: f"10, {name}={{!r}}" for name in ("sp_interval", "warm_up", "guidance")},
    "cfg_interval": '10, guidance="predict", cfg_interval={!r}',
    "tolerance": '"auto", tolerance={!r}',
}


def installed(pipe: Any) -> Installation | None:
    """What is installed in a pipeline, if all of it is."""
    found: Installation | None = vars(pipe).get(_ATTRIBUTE)
    return found if is_front(type(pipe)) else None


def install(pipe: Any, installation: Installation, found: ResolvedPipeline | None = None) -> None:
    """Put T-GATE into a pipeline, or nothing of it if that fails. What it was resolved to may be known already."""
    try:
        # The first that comes and the last that goes: whatever is there by an interrupt is taken out by it.
        vars(pipe)[_ATTRIBUTE] = installation
        installation.enter(pipe, found)
        pipe.__class__ = _gated_class(base_of(type(pipe)))
    except BaseException:
        uninstall(pipe)
        raise


def uninstall(pipe: Any) -> None:
    """The inverse of `install`, also of a part of it."""
    installation = vars(pipe).get(_ATTRIBUTE)
    if installation is None:
        return
    if installation.is_running(pipe):
        raise RuntimeError(
            f"T-GATE: {type(pipe).__name__} is running: call apply_tgate and remove_tgate between two calls."
        )
    installation.remove(pipe)
    pipe.__class__ = give_back(type(pipe))
    del vars(pipe)[_ATTRIBUTE]


@functools.cache
def _gated_class(pipeline_class: Any) -> Any:
    """The class of a pipeline with T-GATE: under the same name, with a `__call__` that runs gated."""

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        # Not by the name of the class, which is that of the one before.
        return _rebuild, (pipeline_class,), vars(self)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        vars(self).update(state)
        installation = installed(self)
        if installation is not None:
            installation.come_along(self)

    def __repr__(self: Any) -> str:
        installation, plain = installed(self), pipeline_class.__repr__(self)
        return plain if installation is None else f"{plain}\nwith T-GATE: {installation.state.schedule!r}"

    gated = _gated(plain_call(pipeline_class), pipeline_class)
    copying = {"__reduce_ex__": __reduce_ex__, "__setstate__": __setstate__}
    return front(pipeline_class, {"__call__": gated, "__repr__": __repr__, **copying})


def _rebuild(pipeline_class: Any) -> Any:
    """An empty pipeline with T-GATE, to be filled from a pickle or a copy."""
    gated = _gated_class(pipeline_class)
    return gated.__new__(gated)


def _gated(call: Callable[..., Any], base: Any = None) -> Callable[..., Any]:
    """The call of a pipeline, and what it wraps (the one with gradients), gated; with what others wrap around it."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = _bind(self, call, args, kwargs)
        if bound is None:
            return call(self, *args, **kwargs)
        now = call if base is None else call_now(base, __call__, call)
        if inspect.isgeneratorfunction(call):
            return _step_by_step(self, now, bound)
        ending = Cleanup()
        # Twice, for an interrupt in the first.
        try:
            try:
                state, run = _begin(self, bound, ending, wrapped=now is not call)
                ending.undo(functools.partial(state.leave, state.current()))
                state.enter(run)
                output = now(*bound.args, **bound.kwargs)
                ending.completed = True
                return output
            finally:
                ending.end()
        finally:
            ending.end()

    functools.update_wrapper(__call__, call)
    __call__.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    del __call__.__wrapped__  # type: ignore[attr-defined]
    if hasattr(call, "__wrapped__"):
        __call__.__wrapped__ = _gated(call.__wrapped__)  # type: ignore[attr-defined]
    return __call__


def _bind(pipe: Any, call: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> inspect.BoundArguments | None:
    """The arguments of a call by name; nothing if they do not fit, as the pipeline's own error names itself."""
    installation = installed(pipe)
    if installation is None or installation.comes_back(pipe):
        return None
    if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call):
        raise ValueError(
            f"T-GATE: the call of {type(pipe).__name__} is asynchronous, and T-GATE gates calls that run in one thread "
            "from their start to their end. Await it in a plain function, or call remove_tgate(pipe) to use it."
        )
    signature = inspect.signature(call)
    for name, form in _SETTINGS.items():
        if name in kwargs and name not in signature.parameters:
            raise TypeError(
                f"{name}={kwargs[name]!r} is not an argument of the call: set it beforehand, for all calls, with "
                f"apply_tgate(pipe, {form.format(kwargs[name])})."
            )
    if "lcm" in kwargs and "lcm" not in signature.parameters:
        raise TypeError(
            "lcm is not an argument of the call: T-GATE sees from the call whether guidance is on. Leave it out, and "
            "give settings to apply_tgate(pipe, gate_step=...)."
        )
    try:
        return signature.bind(pipe, *args, **kwargs)
    except TypeError:
        return None


def _begin(
    pipe: Any, bound: inspect.BoundArguments, ending: Cleanup, *, wrapped: bool = False
) -> tuple[TGateState, ActiveRun]:
    """Have a run for a call, whose arguments get the clock."""
    installation = installed(pipe)
    assert installation is not None
    state = installation.state
    installation.begin_call(pipe, ending, wrapped=wrapped)
    if isinstance(installation, GuiderInstallation):
        if bound.arguments.get("callback_on_step_end") is not None:
            chain(pipe, installation.state, bound, is_diffusers_loop=True)
        return state, installation.guide(pipe, ending)
    found, layers, caches, forwards = installation.follow(pipe)
    call = call_of(found, pipe, _given(bound))
    if not found.counts_forwards:
        chain(pipe, installation.state, bound, is_diffusers_loop=found.is_diffusers_loop)
    suspend_legacy(state, bound)
    adapters = CacheAdapters(caches, found.family.layout.calls)
    run = PipelineRun(
        state,
        call,
        layers,
        can_skip_half=found.kept_half is not None and not adapters.owns_cfg,
        counts_forwards=found.counts_forwards,
        caches=adapters,
        cross_attention=installation.cross_attention,
        forwards=forwards,
    )
    ending.undo(lambda: installation.end_run(pipe, run, layers, completed=ending.completed))
    room = RaisedRecompileLimit()
    ending.undo(room.close)
    room.open()
    for denoiser in found.denoisers:
        ending.undo(functools.partial(stop_replaying, denoiser, run))
        replay(denoiser, state, run)
        if found.family.layout.calls > 1:
            ending.undo(functools.partial(step_back, denoiser, run))
            stand_in_front(denoiser, state, run)
    adapters.begin_call(ending.undo)
    return state, run


def _step_by_step(pipe: Any, call: Callable[..., Any], bound: inspect.BoundArguments) -> Generator[Any, Any, Any]:
    """Run a call that yields: T-GATE steps aside whenever the consumer runs."""
    ending = Cleanup()
    try:
        try:
            state, run = _begin(pipe, bound, ending)
            inner = call(*bound.args, **bound.kwargs)
            resume, value = inner.send, None
            while True:
                try:
                    # The consumer may ask for every item in another thread.
                    with state.entered(run):
                        item = resume(value)
                except StopIteration as stop:
                    ending.completed = True
                    return stop.value
                try:
                    resume, value = inner.send, (yield item)
                except GeneratorExit:
                    inner.close()
                    raise
                except BaseException as error:
                    resume, value = inner.throw, error
        finally:
            ending.end()
    finally:
        ending.end()


def _given(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments of a call by name, those that it swallows too, with their defaults."""
    parameters = bound.signature.parameters
    given = {name: parameter.default for name, parameter in parameters.items()}
    given.update(bound.arguments)
    swallowing = [name for name, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    for name in swallowing:
        given.update(bound.arguments.get(name, {}))
    return given
