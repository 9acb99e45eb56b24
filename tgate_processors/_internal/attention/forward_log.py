"""What the attention layers of a denoiser have done in one forward."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..plan.step_plan import Action
from .compiled import has_compiled_code
from .layers import GatedLayers
from .state import LayerActions, Slot


class ForwardLog:
    """
    Which gates were called in a forward, and what their layers did. Compiled code says nothing, but what it stores.

    Attributes:
        counts (`Counter`): How many layers did what, by whether it is self-attention and whether it was reused.
        called_slots (`set` of `Slot`): The gates that were called.
        compiled_slots (`set` of `Slot`): The gates that have ever stored anything from compiled code.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[bool, bool]] = Counter()
        self.called_slots: set[Slot] = set()
        self.compiled_slots: set[Slot] = set()
        self._layer_of: dict[Slot, Any] = {}
        self._has_compiled_code: bool | None = None

    def clear(self) -> None:
        """A forward begins."""
        self.counts.clear()
        self.called_slots.clear()

    def add_call(self, layers: GatedLayers, slot: Slot, attn: Any, *, stores: bool = True) -> None:
        """
        A gate was called: check that it is of one layer, and that this layer stores once in a forward.

        Args:
            layers (`GatedLayers`): The layers of the denoiser, for messages.
            slot (`Slot`): The gate.
            attn (`Attention`): The layer.
            stores (`bool`, *optional*, defaults to `True`): Whether its output is stored or reused.

        Raises:
            ValueError: If it is not.
        """
        if self._layer_of.setdefault(slot, attn) is not attn:
            raise ValueError(
                "T-GATE: one TGateAttnProcessor serves several attention layers: make one for each entry of "
                "`denoiser.attn_processors`."
            )
        if stores and slot in self.called_slots:
            raise ValueError(
                f"T-GATE: {layers.name_of(attn)} ran twice in one call of the denoiser, and one kept output does "
                "not serve both (windows of frames, tiles). Call remove_tgate(pipe) to use this pipeline."
            )
        self.called_slots.add(slot)

    def uncalled_layers(self, layers: GatedLayers) -> list[str]:
        """The layers with cross-attention whose gate was not called."""
        called = self.called_slots | self.compiled_slots
        return [name for name, slot in layers.required().items() if slot not in called]

    def is_silent(self, layers: GatedLayers) -> bool:
        """Whether the layers are part of compiled code, from where they cannot report."""
        if self.compiled_slots:
            return True
        if self.counts or layers.layout.joint:
            return False
        if self._has_compiled_code is None:
            self._has_compiled_code = has_compiled_code(layers.denoiser)
        return self._has_compiled_code

    def reported(self) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
        """Whether cross-attention was computed and reused, and whether self-attention was, as the layers say."""
        cross, own = ((self.counts[is_self, False] > 0, self.counts[is_self, True] > 0) for is_self in (False, True))
        return cross, own


def expected(actions: LayerActions) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
    """The same, as the actions have it."""
    each = actions.cross_attention, actions.self_attention
    cross, own = ((action is not Action.REUSE, action is Action.REUSE) for action in each)
    return cross, own
