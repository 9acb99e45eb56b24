"""The attention layers of a denoiser, and the gates in front of them: how they are put there and taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..denoiser.lock import exclusively
from ..denoiser.spec import Layout
from .budget import LayerSizes, saved_macs
from .processor import TGateAttnProcessor, is_diffusers_processor, is_plain_callable
from .state import Slot, TGateState

CustomProcessors = Literal["leave", "gate"]


def attention_modules(denoiser: torch.nn.Module) -> dict[str, Any]:
    """The attention layers of a denoiser, by the keys of `attn_processors`."""
    return {
        f"{name}.processor": module
        # `torch.compile(pipe.unet)` wraps the module.
        for name, module in getattr(denoiser, "_orig_mod", denoiser).named_modules()
        if hasattr(module, "get_processor") and hasattr(module, "processor")
    }


class GatedLayers:
    """
    The attention layers of a denoiser in one call of a pipeline, with and without a gate of it.

    The gates stay from call to call, and copies of the pipeline share them. What is known of the layers is of one call.

    Args:
        denoiser (`torch.nn.Module`): The denoiser.
        state (`TGateState`): What the gates of the pipeline share.
        custom (`str`, *optional*):
            What happens to processors that are not diffusers' own, `"leave"` or `"gate"`. `None` leaves them too, but
            refuses mere callables.
        layout (`Layout`, *optional*): Which of them attend to the text, and which are never gated.
    """

    def __init__(
        self,
        denoiser: Any,
        state: TGateState,
        custom: CustomProcessors | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.layout = layout or Layout()
        self._state = state
        self._custom = custom
        self._modules: dict[str, Any] = {}
        self._at_start: list[Any] = []
        self._in_loop: list[Any] = []
        self._by_slot: dict[Slot, str] = {}
        self._absent: set[str] = set()

    @property
    def slots(self) -> list[Slot]:
        """The gates."""
        return list(self._by_slot)

    def look(self) -> None:
        """Find the layers. An IP-Adapter may bring some of its own."""
        self._modules = attention_modules(self.denoiser)

    def follow(self) -> None:
        """A call starts: stand in front of every processor that is not ours yet."""
        self.look()
        self._gate(list(self._modules))
        self._at_start = self._processors()

    def settle(self) -> list[str]:
        """
        The loop starts: stand in front of what the call itself has set, where gates were.

        Returns:
            `list` of `str`: The layers because of which the batch is left whole: cross-attention without a gate, and
            processors that may mix the samples of a batch.
        """
        started = dict(zip(self._modules, self._at_start, strict=False))
        lost = [name for name in self._cross() if name in started and self._gate_of(started[name]) is not None]
        lost = [name for name in lost if self._gate_of(self._modules[name].processor) is None]
        if lost:
            exclusively(lambda: self._gate(lost))
        self._in_loop = self._processors()
        gates = {name: self._gate_of(layer.processor) for name, layer in self._modules.items()}
        self._by_slot = {gate.slot: name for name, gate in gates.items() if gate is not None}
        return [
            name
            for name, layer in self._modules.items()
            if gates[name] is None
            and (self.layout.is_cross_attention(name, layer) or not self._is_harmless(name, layer))
        ]

    def meet(self, given: Mapping[str, Any]) -> None:
        """A forward with these arguments begins, in which some layers may not run."""
        self._absent = {name for name in self._modules if self.layout.is_inactive(name, given)}

    def expected(self) -> dict[str, Slot]:
        """The gates of all cross-attention: each has to hold an output before a half of the batch is left out."""
        there = {slot: name for slot, name in self._by_slot.items() if name not in self._absent}
        return {name: slot for slot, name in there.items() if self.layout.is_cross_attention(name, self._modules[name])}

    def of(self, slot: Slot) -> Any:
        """The layer of a gate."""
        return self._modules[self._by_slot[slot]]

    def saved(self, slot: Slot, sizes: LayerSizes) -> int:
        """What the layer of a gate saves if it reuses its cross-attention."""
        return saved_macs(self.of(slot), sizes)

    def place(self, slot: Slot) -> int:
        """The place of a gate among all."""
        return list(self._by_slot).index(slot)

    def is_cross_attention(self, slot: Slot) -> bool:
        """Whether the layer of a gate has cross-attention."""
        return self.layout.is_cross_attention(self._by_slot[slot], self.of(slot))

    def check(self) -> None:
        """Refuse processors that were exchanged between two steps."""
        now = self._processors()
        exchanged = [
            name
            for name, old, new in zip(self._modules, self._in_loop, now, strict=True)
            if old is not new and not self._keeps_gate(old, new)
        ]
        if exchanged:
            raise RuntimeError(
                f"T-GATE: {len(exchanged)} attention processors were replaced while the pipeline runs, {exchanged[0]} "
                f"with a {type(self._modules[exchanged[0]].processor).__name__}: what they kept is gone. Load adapters "
                "and set processors between two calls, or call remove_tgate(pipe) before."
            )

    def name_of(self, attn: Any) -> str:
        """What errors call a layer."""
        names = (name for name, module in self._modules.items() if module is attn)
        return next(names, type(attn).__name__).removesuffix(".processor")

    def recover(self) -> None:
        """After a failure, put back what the pipeline itself exchanges for a call (perturbed-attention guidance)."""
        in_loop = self._in_loop or self._processors()
        for layer, gate, last in zip(self._modules.values(), self._at_start, in_loop, strict=False):
            if layer.processor is not gate and layer.processor is last and self._gate_of(last) is None:
                layer.processor = gate

    def remove(self) -> None:
        """The inverse of `follow`: put the processors back that ours stand in front of."""
        self.look()
        originals = {}
        for name, layer in self._modules.items():
            gate = self._gate_of(layer.processor)
            if gate is layer.processor:
                originals[name] = gate.original
            elif gate is not None:
                _bypass(layer.processor, gate)
        self._set(originals)
        # What `fuse_qkv_projections` has put aside.
        aside = getattr(self.denoiser, "original_attn_processors", None) or {}
        for name, processor in aside.items():
            gate = self._gate_of(processor)
            if gate is processor:
                aside[name] = gate.original
            elif gate is not None:
                _bypass(processor, gate)

    def _gate(self, names: list[str]) -> None:
        """Put gates in front of the processors of these layers, but for those that are left alone."""
        gates = {}
        for name in names:
            processor = self._modules[name].processor
            may = self._gate_of(processor) is None and self._may_gate(name, processor)
            if may and self.layout.is_gateable(name):
                gates[name] = TGateAttnProcessor(processor, self._state)
        self._set(gates)

    def _may_gate(self, name: str, processor: Any) -> bool:
        """Whether to gate a processor; for some custom ones the user has to say."""
        if self._custom is None and is_plain_callable(processor):
            raise ValueError(
                f"T-GATE: the attention processor of {name.removesuffix('.processor')} is {processor!r}, and T-GATE "
                "cannot tell whether it mixes the samples of a batch or counts its calls. Call "
                'apply_tgate(pipe, custom_processors="gate") to gate it like diffusers\' own, or '
                'custom_processors="leave" to leave it alone.'
            )
        return self._custom == "gate" or is_diffusers_processor(processor)

    def _is_harmless(self, name: str, layer: Any) -> bool:
        """Whether a processor without a gate of ours leaves the samples of a batch apart, as far as is known."""
        return self._may_gate(name, layer.processor) if self.layout.joint else is_diffusers_processor(layer.processor)

    def _cross(self) -> list[str]:
        """The layers with cross-attention."""
        return [name for name, layer in self._modules.items() if self.layout.is_cross_attention(name, layer)]

    def _keeps_gate(self, old: Any, new: Any) -> bool:
        """Whether our processor stays, and another pipeline's came before it or went."""
        gate = self._gate_of(old)
        return gate is not None and gate is self._gate_of(new)

    def _gate_of(self, processor: Any) -> TGateAttnProcessor | None:
        """Our processor among those that stand in front of each other in a layer of a shared denoiser."""
        while isinstance(processor, TGateAttnProcessor):
            if processor.state is self._state:
                return processor
            processor = processor.original
        return None

    def _processors(self) -> list[Any]:
        """What stands in the attention layers at present."""
        return [layer.processor for layer in self._modules.values()]

    def _set(self, processors: dict[str, Any]) -> None:
        """Set the given attention processors and leave the others."""
        if processors and hasattr(self.denoiser, "set_attn_processor"):
            current = {name: layer.processor for name, layer in self._modules.items()}
            self.denoiser.set_attn_processor({**current, **processors})
            return
        for name, processor in processors.items():
            self._modules[name].set_processor(processor)


def _bypass(processor: Any, gate: TGateAttnProcessor) -> None:
    """Take a processor out from behind another pipeline's."""
    while processor.original is not gate:
        processor = processor.original
    processor.original = gate.original
