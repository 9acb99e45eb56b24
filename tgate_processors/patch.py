"""`apply_tgate` and its inverse: check everything, then install; take out exactly what was put in."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any, TypeVar

import diffusers

from .callback import TGateCallback
from .deepcache import DeepCacheOrder, check_helper
from .families import attention_modules, find_family
from .processor import TGateAttnProcessor
from .run import PipelineRun
from .schedule import CFGHalf, TGateSchedule
from .state import TGateReport, TGateState

Pipeline = TypeVar("Pipeline")

# Lives in the `__dict__` of a pipeline while T-GATE is applied to it.
_ATTRIBUTE = "_tgate"
# In the generated class of such a pipeline: its class before.
_BASE = "_tgate_base"


def apply_tgate(
    pipe: Pipeline,
    gate_step: int | float = 10,
    *,
    sp_interval: int = 1,
    fi_interval: int = 1,
    warm_up: int = 0,
    cfg_half: CFGHalf | None = None,
    deepcache: Any = None,
) -> Pipeline:
    r"""
    Apply T-GATE to a pipeline, in place. Afterwards call the pipeline as ever.

    Cross-attention is computed in the first `gate_step` steps; then its kept output is reused and classifier-free
    guidance is dropped. Steps are those that really run, so `strength`, `denoising_start`/`denoising_end` and custom
    timesteps are taken into account. A second call replaces the settings of the first.

    Args:
        pipe (`DiffusionPipeline`):
            The pipeline. Its class, denoiser hooks and attention processors change until [`remove_tgate`].
        gate_step (`int` or `float`, *optional*, defaults to `10`):
            Number of steps in which cross-attention is computed, or, as a `float` in (0, 1), their share of the steps
            that really run.
        sp_interval (`int`, *optional*, defaults to `1`):
            Before the gate, self-attention is computed every `sp_interval` steps. `1` computes it in every step.
        fi_interval (`int`, *optional*, defaults to `1`):
            After the gate, self-attention is computed every `fi_interval` steps. `1` computes it in every step.
        warm_up (`int`, *optional*, defaults to `0`):
            Number of first steps in which self-attention is always computed.
        cfg_half (`str`, *optional*):
            The half of classifier-free guidance that is computed after the gate, `"unconditional"` or `"conditional"`.
            It matters for what is not cross-attention: SDXL's pooled embeddings and sizes, PixArt's masks, SVD's
            conditioning. Defaults to what the published implementation does: `"conditional"` for Stable Video
            Diffusion, `"unconditional"` for the others; in a ControlNet's `guess_mode` to `"conditional"`, the half
            with the control.
        deepcache (`DeepCacheSDHelper`, *optional*):
            A parametrised DeepCache helper of this pipeline, enabled or not, to run together with T-GATE.

    Returns:
        `DiffusionPipeline`: `pipe` itself.

    Raises:
        TypeError: If `pipe` is not a pipeline, or a setting is of the wrong kind.
        ValueError: If a setting is out of range, or the pipeline cannot be gated (the message says why).

    Example:

    ```py
    >>> from tgate_processors import apply_tgate, remove_tgate

    >>> pipe = apply_tgate(pipe, gate_step=10)
    >>> image = pipe(prompt, num_inference_steps=25).images[0]
    >>> pipe = remove_tgate(pipe)
    ```

    Source: T-GATE (https://arxiv.org/abs/2404.02747).
    """
    _check_pipeline(pipe)
    schedule = TGateSchedule(gate_step, sp_interval, fi_interval, warm_up)
    callback = TGateCallback(schedule, cfg_half=cfg_half)
    callback.settle()
    find_family(pipe)
    if deepcache is not None:
        check_helper(deepcache, pipe)
    remove_tgate(pipe)
    installation = _Installation(callback, None if deepcache is None else DeepCacheOrder(deepcache))
    try:
        installation.install(pipe)
    except BaseException:
        installation.remove()
        raise
    vars(pipe)[_ATTRIBUTE] = installation
    pipe.__class__ = _gated_class(type(pipe))  # type: ignore[arg-type]
    return pipe


def remove_tgate(pipe: Pipeline) -> Pipeline:
    r"""
    Take T-GATE out of a pipeline: class, hooks and attention processors are the objects that they were.

    An attention processor that was installed after [`apply_tgate`] stays. Without T-GATE nothing happens.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.

    Returns:
        `DiffusionPipeline`: `pipe` itself.

    Raises:
        TypeError: If `pipe` is not a pipeline.
        RuntimeError: If called while the pipeline runs, say by a callback.

    Example:

    ```py
    >>> from tgate_processors import apply_tgate, is_tgate_applied, remove_tgate

    >>> is_tgate_applied(remove_tgate(apply_tgate(pipe)))
    False
    ```
    """
    if not is_tgate_applied(pipe):
        return pipe
    installation: _Installation = vars(pipe)[_ATTRIBUTE]
    if installation.callback.running:
        raise RuntimeError(f"{type(pipe).__name__} is running: call apply_tgate and remove_tgate between two calls.")
    installation.remove()
    del vars(pipe)[_ATTRIBUTE]
    pipe.__class__ = vars(type(pipe)).get(_BASE, type(pipe))
    return pipe


def is_tgate_applied(pipe: Any) -> bool:
    r"""
    Tell whether T-GATE is applied to a pipeline.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.

    Returns:
        `bool`: `True` between [`apply_tgate`] and [`remove_tgate`].

    Raises:
        TypeError: If `pipe` is not a pipeline.

    Example:

    ```py
    >>> from tgate_processors import is_tgate_applied

    >>> is_tgate_applied(pipe)
    False
    ```
    """
    _check_pipeline(pipe)
    return _ATTRIBUTE in vars(pipe)


def get_tgate_report(pipe: Any) -> TGateReport:
    r"""
    Tell what T-GATE did in the last call of a pipeline.

    Args:
        pipe (`DiffusionPipeline`): A pipeline with T-GATE applied.

    Returns:
        `TGateReport`: Steps computed and reused, denoiser forwards at full and half batch, bytes held.

    Raises:
        TypeError: If `pipe` is not a pipeline.
        ValueError: If T-GATE is not applied to it.

    Example:

    ```py
    >>> from tgate_processors import apply_tgate, get_tgate_report

    >>> image = apply_tgate(pipe, gate_step=10)(prompt, num_inference_steps=25).images[0]
    >>> get_tgate_report(pipe).half_batch_forwards
    15
    ```
    """
    if not is_tgate_applied(pipe):
        raise ValueError(f"T-GATE is not applied to this {type(pipe).__name__}: call apply_tgate(pipe) before the run.")
    installation: _Installation = vars(pipe)[_ATTRIBUTE]
    return installation.callback.state.report


def _check_pipeline(pipe: Any) -> None:
    """Refuse what is not a pipeline."""
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise TypeError(
            f"pipe is a {type(pipe).__name__}, not a diffusers pipeline: give the DiffusionPipeline, not one of its "
            "parts."
        )


class _Installation:
    """What `apply_tgate` has put into a pipeline."""

    def __init__(self, callback: TGateCallback, deepcache: DeepCacheOrder | None) -> None:
        self.callback = callback
        self.callback.before_step = deepcache.before_step if deepcache else None
        self.deepcache = deepcache
        self._attribute = ""
        self._denoiser: Any = None
        self._controlnet: Any = None
        self._layers: dict[str, Any] = {}

    def install(self, pipe: Any) -> None:
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
    installation: _Installation | None = vars(pipe).get(_ATTRIBUTE)
    try:
        bound = inspect.signature(call).bind(pipe, *args, **kwargs)
    except TypeError:
        # The pipeline's own error names itself.
        installation = None
    if installation is None:
        return call(pipe, *args, **kwargs)
    installation.install(pipe)
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
