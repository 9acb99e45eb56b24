"""The attention processor that wraps another one and stores or reuses its output."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, ClassVar

import torch

from ..plan.forward_plan import CachedPart
from ..plan.step_plan import Action
from .budget import measure_layer
from .state import Slot, TGateState


class TGateAttnProcessor:
    r"""
    Attention processor that wraps another one: it calls that one, caches its output, or returns the cached output.

    Other code finds the processor that it expects: the class derives from the class of `original`, the attributes
    (scales, weights, attention backend) are shared with `original`, and `__call__` has the same signature. Make one
    for each attention layer.

    Args:
        original (`AttentionProcessor`):
            The processor that computes. It still does all attention mathematics.
        state (`TGateState`):
            The run that the layer belongs to, `TGateCallback(...).state`.

    Raises:
        TypeError: If `original` is not an attention processor or `state` is not a `TGateState`.
        ValueError: When run, if one processor serves several attention layers.

    Example:

    ```py
    >>> from diffusers.models.attention_processor import AttnProcessor2_0
    >>> from tgate_processors import TGateAttnProcessor, TGateCallback, TGateSchedule

    >>> callback = TGateCallback(TGateSchedule(gate_step=10))
    >>> processor = TGateAttnProcessor(AttnProcessor2_0(), callback.state)
    >>> isinstance(processor, AttnProcessor2_0)
    True
    ```

    Source: T-GATE (https://arxiv.org/abs/2404.02747): the output of cross-attention, shape `(batch, tokens, channels)`,
    is averaged over the halves of classifier-free guidance at the gate step and reused afterwards; where guidance is
    predicted, it is that of the half that goes on.
    """

    # Slots, not attributes: `__dict__` is the one of `original`, and removal must leave nothing in it.
    __slots__ = ("original", "slot", "state")
    original: Any
    slot: Slot
    state: TGateState
    wrapped_class: ClassVar[type]

    def __new__(cls, original: Any, state: TGateState) -> TGateAttnProcessor:
        if not callable(original) or inspect.isclass(original) or inspect.isbuiltin(original):
            raise TypeError(
                f"original={original!r} is of type {type(original).__name__}, not an attention processor: pass the "
                "one of a layer, as in `denoiser.attn_processors`."
            )
        if not isinstance(state, TGateState):
            raise TypeError(f"state={state!r} is of type {type(state).__name__}: pass the `state` of a TGateCallback.")
        base = type(original).wrapped_class if isinstance(original, TGateAttnProcessor) else type(original)
        processor: TGateAttnProcessor = object.__new__(_gated_processor_class(base))
        slot = state.new_slot(is_diffusers_processor(original))
        # Not by plain assignment: a module among the processors would register `original` as a part of itself.
        attributes = {"original": original, "state": state, "slot": slot}
        if not isinstance(processor, _AttributeProxy):
            attributes["__dict__"] = original.__dict__
        for name, value in attributes.items():
            object.__setattr__(processor, name, value)
        return processor

    def __init__(self, original: Any, state: TGateState) -> None:
        # The `__init__` of the wrapped class has run already, on `original`.
        pass

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.state.by_hand:
            return _as_it_is, (self.original,)
        return TGateAttnProcessor, (self.original, self.state)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Some of the wrapped classes define their own.
        return self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = copy.deepcopy(self.original, memo)
        if self.state.by_hand:
            copied = TGateAttnProcessor(copied, copy.deepcopy(self.state, memo))
        memo[id(self)] = copied
        return copied


class _AttributeProxy:
    """Passes attributes on to a processor that cannot be subclassed: a function, an object with slots."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "original"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in TGateAttnProcessor.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.original, name, value)


def _as_it_is(original: Any) -> Any:
    """What a gate is in a pickle: its original. A gated pipeline that is unpickled puts in gates of its own."""
    return original


def is_diffusers_processor(processor: Any) -> bool:
    """Whether a processor is diffusers' own, which never mixes the samples of a batch and does not count its calls."""
    return type(_unwrap(processor)).__module__.split(".")[0] == "diffusers"


def is_plain_callable(processor: Any) -> bool:
    """Whether a processor is a mere callable (a function, an object with slots), without a class to go by."""
    unwrapped = _unwrap(processor)
    if is_diffusers_processor(unwrapped):
        return False
    return (
        inspect.isroutine(unwrapped) or isinstance(unwrapped, functools.partial) or not hasattr(unwrapped, "__dict__")
    )


def _unwrap(processor: Any) -> Any:
    """The processor inside all gates."""
    while isinstance(processor, TGateAttnProcessor):
        processor = processor.original
    return processor


def _gated_call(self: Any, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute, compute and store, or reuse, as the run says."""
    if getattr(attn, "residual_connection", False):
        # The output holds the residual, which is another one in every step.
        return self.original(attn, hidden_states, *args, **kwargs)
    # Stable Audio 3 calls it `context`.
    context = kwargs.get("encoder_hidden_states", kwargs.get("context", args[0] if args else None))
    # The layer's own flag is missing or wrong in several models; what it attends to is not.
    is_self = context is None or context is hidden_states
    if torch.compiler.is_compiling():
        return _compiled_call(self, None if is_self else context, attn, hidden_states, args, kwargs)
    run = self.state.current() or self.state.first_step_cache
    if run is None:
        return self.original(attn, hidden_states, *args, **kwargs)
    cache = run.attention_cache
    action = cache.actions.self_attention if is_self else cache.actions.cross_attention
    if action is Action.REUSE:
        cached = cache.get(self.slot, attn, hidden_states, is_self)
        if cached is not None:
            return cached
    output = self.original(attn, hidden_states, *args, **kwargs)
    cache.put(self.slot, attn, output, action, is_self, hidden_states, context)
    return output


def _compiled_call(self: Any, context: Any, attn: Any, hidden_states: torch.Tensor, args: Any, kwargs: Any) -> Any:
    """`_gated_call` in compiled code, which cannot ask for its thread, and is compiled anew if it counts anything."""
    actions, slot = self.state.compiled_actions, self.slot
    is_self = context is None
    action = actions.self_attention if is_self else slot.action or actions.cross_attention
    if action is Action.REUSE:
        if slot.tensor is not None and slot.tensor.shape[:2] == hidden_states.shape[:2]:
            return slot.tensor
        if actions.on_half_batch and not is_self:
            raise ValueError(MISMATCH_MESSAGE)
    output = self.original(attn, hidden_states, *args, **kwargs)
    if not is_self and slot.action is not None:
        slot.sizes = measure_layer(hidden_states, context, output)
    if action is not Action.COMPUTE:
        slot.tensor = select_part(output, actions.part)
    return output


MISMATCH_MESSAGE = (
    "a cross-attention layer would have to compute on half of the batch, which holds half of the text, because what it "
    "keeps does not fit: blocks that change their size inside the denoiser cannot be gated. Call remove_tgate(pipe) to "
    "use this pipeline."
)


def select_part(output: torch.Tensor, part: CachedPart) -> torch.Tensor:
    """The part of an output that is cached: the output itself, or a new tensor."""
    if part is CachedPart.ALL:
        return output
    if part is CachedPart.MEAN:
        return mean_of_halves(output)
    half = output.shape[0] // 2
    return (output[:half] if part is CachedPart.FIRST else output[half:]).clone()


def mean_of_halves(output: torch.Tensor) -> torch.Tensor:
    """Mean of the unconditional and the conditional half of a batch."""
    half = output.shape[0] // 2
    return torch.lerp(output[:half], output[half:], 0.5)


@functools.cache
def _gated_processor_class(base: type) -> type:
    """The class of the gated processors that wrap a `base`."""

    # `Attention.forward` drops the keyword arguments that this signature does not name.
    def __call__(self: Any, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return _gated_call(self, attn, hidden_states, *args, **kwargs)

    functools.update_wrapper(__call__, base.__call__)
    __call__.__signature__ = inspect.signature(base.__call__)  # type: ignore[attr-defined]

    # diffusers re-creates processors as `type(processor)()`: what it wants then is one of the wrapped type.
    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    # The name holds that of the wrapped type, because diffusers looks for "XFormers" and the like in it.
    name = f"{TGateAttnProcessor.__name__}[{base.__name__}]"
    body = {"__slots__": (), "__call__": __call__, "__new__": __new__, "wrapped_class": base, "__doc__": base.__doc__}
    if not base.__dictoffset__:
        return type(name, (_AttributeProxy, TGateAttnProcessor), body)
    try:
        return type(name, (TGateAttnProcessor, base), body)
    except TypeError:
        # Functions cannot be subclassed.
        return type(name, (_AttributeProxy, TGateAttnProcessor), body)
