"""What is put into a denoiser, and how it is taken out again."""

from __future__ import annotations

from typing import Any

from .callback import TGateCallback
from .deepcache import DeepCacheOrder
from .families import attention_modules, check_half, check_mode, find_family
from .processor import TGateAttnProcessor
from .state import TGateState


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
        self.callback.check_layers = self._check_layers
        self._attribute = ""
        self._denoiser: Any = None
        self._controlnet: Any = None
        self._layers: dict[str, Any] = {}
        self._gates: list[Any] = []
        self._in_loop: list[Any] = []

    def follow(self, pipe: Any) -> None:
        """Stand in front of every attention processor that is not ours yet; follow an exchanged denoiser."""
        check_mode(pipe)
        now = getattr(pipe, self._attribute, None), getattr(pipe, "controlnet", None)
        if self._denoiser is None or now[0] is not self._denoiser or now[1] is not self._controlnet:
            found = find_family(pipe)
            self.remove()
            self._attribute, self._denoiser, self._controlnet = found.attribute, found.denoiser, found.controlnet
            hooks, half = self.callback.hooks, self.callback.cfg_half
            check_half(pipe, found, half)
            hooks.install(found.denoiser, half, found.kept_half, found.controlnet)
        # Anew in every call: an IP-Adapter may bring layers of its own.
        denoiser: Any = self._denoiser
        self._layers = attention_modules(denoiser)
        state = self.callback.state
        self._replace_processors(
            {
                name: TGateAttnProcessor(layer.processor, state)
                for name, layer in self._layers.items()
                if _gate_of(layer.processor, state) is None
            }
        )
        self._gates = self._processors()
        self._in_loop = []

    def recover(self) -> None:
        """After a failure, put back what the pipeline itself exchanges for a call (perturbed-attention guidance)."""
        for index, layer in enumerate(self._layers.values()):
            gate, in_loop = self._gates[index], (self._in_loop or self._processors())[index]
            if layer.processor is not gate and layer.processor is in_loop:
                layer.processor = gate

    def remove(self) -> None:
        """Take the hooks out and put the processors back that ours stand in front of."""
        self.callback.hooks.remove()
        if self._denoiser is None:
            return
        self._layers = attention_modules(self._denoiser)
        originals = {}
        for name, layer in self._layers.items():
            gate = _gate_of(layer.processor, self.callback.state)
            if gate is layer.processor:
                originals[name] = gate.original
            elif gate is not None:
                _bypass(layer.processor, gate)
        self._replace_processors(originals)
        # What `fuse_qkv_projections` has put aside.
        aside = getattr(self._denoiser, "original_attn_processors", None) or {}
        for name, processor in aside.items():
            gate = _gate_of(processor, self.callback.state)
            if gate is processor:
                aside[name] = gate.original
            elif gate is not None:
                _bypass(processor, gate)
        self._denoiser = None
        self._layers = {}

    def _check_layers(self) -> None:
        """Find out what was exchanged between two steps."""
        now = self._processors()
        if not self._in_loop:
            self._in_loop = now
        exchanged = [
            name
            for name, old, new in zip(self._layers, self._in_loop, now, strict=True)
            if old is not new and not self._keeps_gate(old, new)
        ]
        if exchanged:
            raise RuntimeError(
                f"{len(exchanged)} attention processors were replaced while the pipeline runs, {exchanged[0]} with a "
                f"{type(self._layers[exchanged[0]].processor).__name__}: what they kept is gone. Load adapters and set "
                "processors between two calls, or call remove_tgate(pipe) before."
            )

    def _keeps_gate(self, old: Any, new: Any) -> bool:
        """Whether our processor stays, and another pipeline's came before it or went."""
        state = self.callback.state
        gate = _gate_of(old, state)
        return gate is not None and gate is _gate_of(new, state)

    def _processors(self) -> list[Any]:
        """What stands in the attention layers at present."""
        return [layer.processor for layer in self._layers.values()]

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
