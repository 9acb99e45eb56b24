"""What is put into a pipeline, and how it is taken out again."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

from .callback import TGateCallback
from .deepcache import DeepCacheOrder
from .families import attention_modules, find_family
from .processor import TGateAttnProcessor
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


class Installation:
    """
    What is installed in a pipeline besides its class.

    Args:
        callback (`TGateCallback`): The clock.
        deepcache (`DeepCacheOrder`, *optional*): The order of a DeepCache helper.
    """

    def __init__(self, callback: TGateCallback, deepcache: DeepCacheOrder | None) -> None:
        self.callback = callback
        self.callback.before_step = deepcache.before_step if deepcache else None
        self.deepcache = deepcache
        self._attribute = ""
        self._denoiser: Any = None
        self._controlnet: Any = None
        self._layers: dict[str, Any] = {}

    def follow(self, pipe: Any) -> None:
        """Stand in front of every attention processor that is not ours yet; follow an exchanged denoiser."""
        now = getattr(pipe, self._attribute, None), getattr(pipe, "controlnet", None)
        if self._denoiser is None or now[0] is not self._denoiser or now[1] is not self._controlnet:
            found = find_family(pipe)
            self.remove()
            self._attribute, self._denoiser, self._controlnet = found.attribute, found.denoiser, found.controlnet
            self._layers = attention_modules(found.denoiser)
            hooks, half = self.callback.hooks, self.callback.cfg_half
            hooks.install(found.denoiser, half, found.kept_half, found.controlnet)
        state = self.callback.state
        self._replace_processors(
            {
                name: TGateAttnProcessor(layer.processor, state)
                for name, layer in self._layers.items()
                if _gate_of(layer.processor, state) is None
            }
        )

    def remove(self) -> None:
        """Take the hooks out and put the processors back that ours stand in front of."""
        self.callback.hooks.remove()
        if self._denoiser is None:
            return
        originals = {}
        for name, layer in self._layers.items():
            gate = _gate_of(layer.processor, self.callback.state)
            if gate is layer.processor:
                originals[name] = gate.original
            elif gate is not None:
                _bypass(layer.processor, gate)
        self._replace_processors(originals)
        self._denoiser = None
        self._layers = {}

    def _replace_processors(self, processors: dict[str, Any]) -> None:
        """Set the given attention processors and leave the others."""
        if processors:
            current = {name: layer.processor for name, layer in self._layers.items()}
            self._denoiser.set_attn_processor({**current, **processors})


def _gate_of(processor: Any, state: TGateState) -> TGateAttnProcessor | None:
    """Our processor among those that stand in front of each other in a layer of a shared denoiser."""
    while isinstance(processor, TGateAttnProcessor):
        if processor.state is state:
            return processor
        processor = processor.original
    return None


def _bypass(processor: Any, gate: TGateAttnProcessor) -> None:
    """Take a processor out from behind another pipeline's."""
    while processor.original is not gate:
        processor = processor.original
    processor.original = gate.original


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
    installation.follow(pipe)
    callback = installation.callback
    ticks = "callback_on_step_end" in bound.signature.parameters
    if ticks:
        _chain_callback(pipe, callback, bound)
    guidance_scale = bound.arguments.get("guidance_scale", bound.signature.parameters.get("guidance_scale"))
    if isinstance(guidance_scale, inspect.Parameter):
        guidance_scale = guidance_scale.default
    callback.start(PipelineRun(pipe, guidance_scale), by_forward=not ticks)
    try:
        with installation.deepcache.running() if installation.deepcache else contextlib.nullcontext():
            return call(*bound.args, **bound.kwargs)
    finally:
        callback.reset()


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
    if isinstance(users, (PipelineCallback, MultiPipelineCallbacks)):
        bound.arguments["callback_on_step_end"] = MultiPipelineCallbacks([users, callback])
        return
    default = bound.signature.parameters["callback_on_step_end_tensor_inputs"].default
    wanted = bound.arguments.get("callback_on_step_end_tensor_inputs", default) or []
    # The clock compares the batch with the latents; a function that did not ask for them does not get them.
    added = [name for name in ("latents",) if name not in wanted and name in pipe._callback_tensor_inputs]

    def on_step_end(pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        ours = dict(callback_kwargs)
        outputs = {name: value for name, value in callback_kwargs.items() if name not in added}
        if users is not None:
            outputs = users(pipeline, step_index, timestep, outputs)
        callback(pipeline, step_index, timestep, ours)
        return outputs

    bound.arguments["callback_on_step_end"] = on_step_end
    bound.arguments["callback_on_step_end_tensor_inputs"] = [*wanted, *added]
