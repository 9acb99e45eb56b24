"""The attention processor that stands in front of another one and stores or reuses its output."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, ClassVar

import torch

from .schedule import Action
from .state import Slot, TGateState


class TGateAttnProcessor:
    r"""
    Attention processor that calls the processor it stands in front of, keeps its output, or gives back the kept one.

    It is found as what it replaces: its class derives from the class of `original`, it shares the attributes of
    `original` (scales, weights, attention backend), and its `__call__` has the same signature. Make one for each
    attention layer.

    Args:
        original (`AttentionProcessor`):
            The processor that computes. Remains in charge of all attention mathematics.
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
    is averaged over the halves of classifier-free guidance at the gate step and reused afterwards.
    """

    # Slots, not attributes: `__dict__` is the one of `original`, and removal must leave nothing in it.
    __slots__ = ("original", "slot", "state")
    original: Any
    slot: Slot
    state: TGateState
    tgate_base: ClassVar[type]

    def __new__(cls, original: Any, state: TGateState) -> TGateAttnProcessor:
        if not callable(original) or inspect.isroutine(original) or inspect.isclass(original):
            raise TypeError(
                f"original is a {type(original).__name__}, not an attention processor: give the one of a layer, as in "
                "`denoiser.attn_processors`."
            )
        if not isinstance(state, TGateState):
            raise TypeError(f"state is a {type(state).__name__}: give the `state` of a TGateCallback.")
        base = type(original).tgate_base if isinstance(original, TGateAttnProcessor) else type(original)
        processor: TGateAttnProcessor = object.__new__(_gated_class(base))
        # Not by plain assignment: a module among the processors would register `original` as a part of itself.
        attributes = {"original": original, "state": state, "slot": state.new_slot(), "__dict__": original.__dict__}
        for name, value in attributes.items():
            object.__setattr__(processor, name, value)
        return processor

    def __init__(self, original: Any, state: TGateState) -> None:
        # The `__init__` of the class behind has run already, on `original`.
        pass

    def __reduce__(self) -> tuple[Any, ...]:
        return TGateAttnProcessor, (self.original, self.state)

    def __deepcopy__(self, memo: dict[int, Any]) -> TGateAttnProcessor:
        copied = TGateAttnProcessor(copy.deepcopy(self.original, memo), copy.deepcopy(self.state, memo))
        memo[id(self)] = copied
        return copied


def _gated_call(self: Any, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute, compute and store, or reuse, as the state says."""
    if getattr(attn, "residual_connection", False):
        # The output holds the residual, which must not stand still.
        return self.original(attn, hidden_states, *args, **kwargs)
    state, slot, compiling = self.state, self.slot, torch.compiler.is_compiling()
    # A compiled forward cannot ask for its thread.
    if not compiling and not state.is_mine():
        return self.original(attn, hidden_states, *args, **kwargs)
    context = kwargs.get("encoder_hidden_states", args[0] if args else None)
    # The layer's own flag is missing or wrong in several models; what it attends to is not.
    is_self = context is None or context is hidden_states
    action = state.self_attention if is_self else state.cross_attention
    # Compiled code would be compiled anew for a slot that is empty and for one that is not.
    if not compiling and slot.layer is not None and slot.layer is not attn:
        raise ValueError(
            "one TGateAttnProcessor serves several attention layers: make one for each entry of "
            "`denoiser.attn_processors`."
        )
    if action is Action.REUSE and slot.tensor is not None and slot.tensor.shape[:2] == hidden_states.shape[:2]:
        return slot.tensor
    output = self.original(attn, hidden_states, *args, **kwargs)
    if action is not Action.COMPUTE:
        slot.tensor = _mean_of_halves(output) if state.averaging else output
        slot.layer = attn
        slot.borrowed = compiling
    elif slot.tensor is not None:
        slot.clear()
    return output


def _mean_of_halves(output: torch.Tensor) -> torch.Tensor:
    """Mean of the unconditional and the conditional half of a batch."""
    half = output.shape[0] // 2
    return torch.lerp(output[:half], output[half:], 0.5)


@functools.cache
def _gated_class(base: type) -> type:
    """The class of the gated processors that stand in front of a `base`."""

    # `Attention.forward` drops the keyword arguments that this signature does not name.
    def __call__(self: Any, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return _gated_call(self, attn, hidden_states, *args, **kwargs)

    functools.update_wrapper(__call__, base.__call__)
    __call__.__signature__ = inspect.signature(base.__call__)  # type: ignore[attr-defined]

    # diffusers re-creates processors as `type(processor)()`: what it wants then is a processor of the type behind.
    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    # The name holds that of the type behind, because diffusers looks for "XFormers" and the like in it.
    name = f"{TGateAttnProcessor.__name__}[{base.__name__}]"
    body = {"__slots__": (), "__call__": __call__, "__new__": __new__, "tgate_base": base, "__doc__": base.__doc__}
    return type(name, (TGateAttnProcessor, base), body)
