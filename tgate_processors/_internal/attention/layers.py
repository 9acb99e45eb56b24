"""The attention layers of a denoiser, and the gates around their processors: how they are put in and taken out."""

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
    The attention layers of a denoiser in one call of a pipeline, gated or not.

    The gates stay from call to call, and copies of the pipeline share them; this object is of one call.

    Args:
        denoiser (`torch.nn.Module`): The denoiser.
        state (`TGateState`): What the gates of the pipeline share.
        custom_processors (`str`, *optional*):
            What happens to processors that are not diffusers' own, `"leave"` or `"gate"`. `None` leaves them too, but
            refuses mere callables.
        layout (`Layout`, *optional*): Which of them attend to the text, and which are never gated.
    """

    def __init__(
        self,
        denoiser: Any,
        state: TGateState,
        custom_processors: CustomProcessors | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.layout = layout or Layout()
        self._state = state
        self._custom_processors = custom_processors
        self._modules: dict[str, Any] = {}
        self._processors_at_start: list[Any] = []
        self._processors_in_loop: list[Any] = []
        self._name_by_slot: dict[Slot, str] = {}
        # The gates of cross-attention in this loop, and the layers that do not run in this forward.
        self._cross_by_name: dict[str, Slot] = {}
        self._inactive: set[str] = set()

    @property
    def slots(self) -> list[Slot]:
        """The gates."""
        return list(self._name_by_slot)

    def discover(self) -> None:
        """Find the layers; an IP-Adapter may have added some."""
        self._modules = attention_modules(self.denoiser)

    def gate_all(self) -> None:
        """A call starts: wrap every processor that has no gate yet."""
        self.discover()
        self._gate(list(self._modules))
        self._processors_at_start = self._processors()

    def regate_replaced(self) -> list[str]:
        """
        The loop starts: wrap the processors that the call itself has set in the place of gates.

        Returns:
            `list` of `str`: The layers because of which the batch is left whole: cross-attention without a gate, and
            processors that may mix the samples of a batch.
        """
        started = dict(zip(self._modules, self._processors_at_start, strict=False))
        gated = [name for name in self._cross_attention_names() if self._find_gate(started.get(name)) is not None]
        lost = [name for name in gated if self._find_gate(self._modules[name].processor) is None]
        if lost:
            exclusively(lambda: self._gate(lost))
        self._processors_in_loop = self._processors()
        gates = {name: self._find_gate(layer.processor) for name, layer in self._modules.items()}
        self._name_by_slot = {gate.slot: name for name, gate in gates.items() if gate is not None}
        cross = set(self._cross_attention_names())
        self._cross_by_name = {name: slot for slot, name in self._name_by_slot.items() if name in cross}
        return [
            name
            for name, layer in self._modules.items()
            if gates[name] is None and (name in cross or not self._is_batch_safe(name, layer))
        ]

    def set_active(self, arguments: Mapping[str, Any]) -> None:
        """A forward with these arguments begins: note the layers that do not run in it."""
        may_not_run = self._modules if self.layout.optional_layers else ()
        self._inactive = {name for name in may_not_run if self.layout.is_inactive(name, arguments)}

    def required(self) -> dict[str, Slot]:
        """The gates of active cross-attention: each has to have an output cached before one half is skipped."""
        return {name: slot for name, slot in self._cross_by_name.items() if name not in self._inactive}

    def module_of(self, slot: Slot) -> Any:
        """The layer of a gate."""
        return self._modules[self._name_by_slot[slot]]

    def saved_macs(self, slot: Slot, sizes: LayerSizes) -> int:
        """Multiply-accumulates that the layer of a gate saves by reusing its cross-attention."""
        return saved_macs(self.module_of(slot), sizes)

    def index_of(self, slot: Slot) -> int:
        """The place of a gate among all gates."""
        return list(self._name_by_slot).index(slot)

    def is_cross_attention(self, slot: Slot) -> bool:
        """Whether the layer of a gate has cross-attention."""
        return self.layout.is_cross_attention(self._name_by_slot[slot], self.module_of(slot))

    def check_not_replaced(self) -> None:
        """Refuse processors that were exchanged between two steps."""
        now = self._processors()
        exchanged = [
            name
            for name, old, new in zip(self._modules, self._processors_in_loop, now, strict=True)
            if old is not new and not self._still_gated(old, new)
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

    def restore_after_error(self) -> None:
        """After a failure, put back what the pipeline itself exchanges for a call (perturbed-attention guidance)."""
        in_loop = self._processors_in_loop or self._processors()
        for layer, gate, last in zip(self._modules.values(), self._processors_at_start, in_loop, strict=False):
            if layer.processor is not gate and layer.processor is last and self._find_gate(last) is None:
                layer.processor = gate

    def ungate_all(self) -> None:
        """The inverse of `gate_all`: put the wrapped processors back."""
        self.discover()
        originals = {}
        for name, layer in self._modules.items():
            gate = self._find_gate(layer.processor)
            if gate is layer.processor:
                originals[name] = gate.original
            elif gate is not None:
                _unlink(layer.processor, gate)
        self._set_processors(originals)
        # The processors that `fuse_qkv_projections` has saved.
        saved = getattr(self.denoiser, "original_attn_processors", None) or {}
        for name, processor in saved.items():
            gate = self._find_gate(processor)
            if gate is processor:
                saved[name] = gate.original
            elif gate is not None:
                _unlink(processor, gate)

    def _gate(self, names: list[str]) -> None:
        """Wrap the processors of these layers in gates, except those that stay ungated."""
        gates = {}
        for name in names:
            processor = self._modules[name].processor
            may = self._find_gate(processor) is None and self._can_gate(name, processor)
            if may and self.layout.is_gateable(name):
                gates[name] = TGateAttnProcessor(processor, self._state)
        self._set_processors(gates)

    def _can_gate(self, name: str, processor: Any) -> bool:
        """Whether to gate a processor; for some custom ones the user has to say."""
        if self._custom_processors is None and is_plain_callable(processor):
            raise ValueError(
                f"T-GATE: the attention processor of {name.removesuffix('.processor')} is {processor!r}, and T-GATE "
                "cannot tell whether it mixes the samples of a batch or counts its calls. Call "
                'apply_tgate(pipe, custom_processors="gate") to gate it like diffusers\' own, or '
                'custom_processors="leave" to leave it alone.'
            )
        return self._custom_processors == "gate" or is_diffusers_processor(processor)

    def _is_batch_safe(self, name: str, layer: Any) -> bool:
        """Whether a processor without a gate is known not to mix the samples of a batch."""
        return self._can_gate(name, layer.processor) if self.layout.joint else is_diffusers_processor(layer.processor)

    def _cross_attention_names(self) -> list[str]:
        """The names of the layers with cross-attention."""
        return [name for name, layer in self._modules.items() if self.layout.is_cross_attention(name, layer)]

    def _still_gated(self, old: Any, new: Any) -> bool:
        """Whether our gate stays, and only another pipeline's gate around it has come or gone."""
        gate = self._find_gate(old)
        return gate is not None and gate is self._find_gate(new)

    def _find_gate(self, processor: Any) -> TGateAttnProcessor | None:
        """Our gate among the gates of a layer, several where pipelines share a denoiser."""
        while isinstance(processor, TGateAttnProcessor):
            if processor.state is self._state:
                return processor
            processor = processor.original
        return None

    def _processors(self) -> list[Any]:
        """The present processors of the attention layers."""
        return [layer.processor for layer in self._modules.values()]

    def _set_processors(self, processors: dict[str, Any]) -> None:
        """Set the given attention processors and leave the others."""
        if processors and hasattr(self.denoiser, "set_attn_processor"):
            current = {name: layer.processor for name, layer in self._modules.items()}
            self.denoiser.set_attn_processor({**current, **processors})
            return
        for name, processor in processors.items():
            self._modules[name].set_processor(processor)


def _unlink(processor: Any, gate: TGateAttnProcessor) -> None:
    """Remove a gate from under another pipeline's."""
    while processor.original is not gate:
        processor = processor.original
    processor.original = gate.original
