"""What the attention layers of one run keep, and what they did in the last forward."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch

from ..plan.forward_plan import CachedPart
from ..plan.step_plan import Action
from .budget import LayerSizes, MemoryBudget, sizes_of
from .compiled import is_exposed, lies_in_compiled_code
from .layers import GatedLayers
from .processor import UNFIT, part_of
from .state import LayerActions, Slot, TGateState


class CachedOutput(NamedTuple):
    """An output that is kept, how often it had been written to when it was, and whether self-attention gave it."""

    tensor: torch.Tensor
    version: int | None
    is_self: bool


class AttentionCache:
    """
    The kept outputs of a run. Nobody else can write to them, and nothing is copied where nobody could.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        layers (`GatedLayers`): The attention layers of the denoiser.

    Attributes:
        halved_inside (`bool`): Whether layers may find the second half of a batch that was given whole.
        declined (`set` of `Slot`): The gates of cross-attention that is computed in every step, beyond the budget.
        passed (`int`): Bytes of cross-attention that was computed in the last forward, and not kept.
    """

    def __init__(self, state: TGateState, layers: GatedLayers) -> None:
        self.layers = layers
        self.halved_inside = False
        self.signals = LayerActions()
        self.kept: dict[Slot, CachedOutput] = {}
        self.declined: set[Slot] = set()
        self.passed = 0
        self._budget: MemoryBudget[Slot] | None = None
        # How many layers did what, by whether it is self-attention and whether it was reused.
        self.did: Counter[tuple[bool, bool]] = Counter()
        self._state = state
        self._layer_of: dict[Slot, Any] = {}
        self._in_forward: set[Slot] = set()
        self._compiled_slots: set[Slot] = set()
        self._sizes: dict[Slot, LayerSizes] = {}
        self._lent: dict[Slot, torch.Tensor] = {}
        self._is_compiled: bool | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(kept.tensor.nbytes for kept in self.kept.values())

    @property
    def outputs(self) -> AttentionCache:
        """What the gates talk to, as of a run: a cache takes its place where none is announced."""
        return self

    def forget(self) -> None:
        """Hold nothing, and choose anew."""
        self.signals.rest()
        # A forward that failed has left these as they were in it.
        self._lent.clear()
        self._state.compiled.rest()
        for slot in self.layers.slots:
            slot.tensor = None
        self.kept.clear()
        self.declined.clear()
        self._sizes.clear()
        if self._budget is not None:
            self._budget.forget()

    def limit(self, most: int | None) -> None:
        """A loop begins, in which cross-attention keeps so many bytes at most."""
        self._budget = None if most is None else MemoryBudget[Slot](most)

    @property
    def least(self) -> int | None:
        """The bytes that the first layer needs, if any is beyond the budget."""
        return self._budget.least if self._budget is not None and self.declined else None

    @property
    def cross_kept(self) -> int:
        """How many layers hold an output of cross-attention."""
        return sum(not kept.is_self for kept in self.kept.values())

    def missing(self) -> list[str]:
        """The layers with cross-attention that hold no output, but for those that are beyond the budget."""
        there = self.kept.keys() | self.declined
        return [name for name, slot in self.layers.expected().items() if slot not in there]

    def silent(self) -> list[str]:
        """The layers with cross-attention that hold an output, but whose gate was not called in the last forward."""
        heard = self._in_forward | self._compiled_slots
        return [name for name, slot in self.layers.expected().items() if slot not in heard]

    def before_forward(self) -> None:
        """A forward begins: put what is reused where compiled code finds it."""
        self.did.clear()
        self.passed = 0
        self._in_forward.clear()
        self._state.compiled.take(self.signals)
        if self._budget is not None:
            self._tell_compiled(self.signals.cross_attention)
        for slot in self._compiled_slots & self.kept.keys():
            kept = self.kept[slot]
            action = self.signals.self_attention if kept.is_self else self.signals.cross_attention
            if action is Action.REUSE:
                exposed = is_exposed(self.layers.of(slot), slot)
                slot.tensor = self._lent[slot] = kept.tensor.clone() if exposed else kept.tensor
            elif action is Action.COMPUTE:
                del self.kept[slot]

    def after_forward(self) -> None:
        """A forward has ended: copy what compiled code has stored, which its next call may write to, one by one."""
        self._state.compiled.rest()
        self._hear_compiled()
        for slot in self.layers.slots:
            tensor, slot.tensor = slot.tensor, None
            if tensor is not None and self._lent.get(slot) is not tensor:
                self._compiled_slots.add(slot)
                if self._is_within(slot, self._sizes.get(slot)):
                    self._keep(slot, tensor.clone(), not self.layers.is_cross_attention(slot))
        self._lent.clear()

    def reused(self, slot: Slot, attn: Any, hidden_states: torch.Tensor, is_self: bool) -> torch.Tensor | None:
        """
        The kept output of a layer, if it fits this forward.

        Args:
            slot (`Slot`): The gate of the layer.
            attn (`Attention`): The layer.
            hidden_states (`torch.Tensor`): What the layer is given, shape `(batch, tokens, channels)`.
            is_self (`bool`): Whether it attends to itself.

        Raises:
            ValueError: If somebody has written to what is kept, or cross-attention would have to compute on a half.
        """
        self._enter(slot, attn)
        if slot in self.declined:
            return None
        kept = self.kept.get(slot)
        rows, tokens = hidden_states.shape[:2]
        half = self.halved_inside and kept is not None and kept.tensor.shape[:2] == (2 * rows, tokens)
        if kept is not None and (half or kept.tensor.shape[:2] == (rows, tokens)):
            if kept.version is not None and kept.tensor._version != kept.version:
                raise ValueError(
                    f"T-GATE: what {self.layers.name_of(attn)} keeps was written to in place by somebody else. Write "
                    "to a copy of a layer's output, or call remove_tgate(pipe) to use this pipeline."
                )
            self.did[is_self, True] += 1
            tensor = kept.tensor[rows:] if half else kept.tensor
            return tensor.clone() if is_exposed(attn, slot) else tensor
        if self.signals.half and not is_self:
            raise ValueError(f"T-GATE: in {self.layers.name_of(attn)} {UNFIT}")
        return None

    def computed(
        self,
        slot: Slot,
        attn: Any,
        output: torch.Tensor,
        action: Action,
        is_self: bool,
        hidden_states: torch.Tensor,
        context: Any,
    ) -> None:
        """
        A layer has computed its output: keep it if it is to be kept.

        Args:
            slot (`Slot`): The gate of the layer.
            attn (`Attention`): The layer.
            output (`torch.Tensor`): What it gives out, shape `(batch, tokens, channels)`.
            action (`Action`): What it was to do.
            is_self (`bool`): Whether it attends to itself.
            hidden_states (`torch.Tensor`): What it was given.
            context (`torch.Tensor` or a sequence): What it attends to, if not to itself.
        """
        if action is not Action.REUSE:
            self._enter(slot, attn, keeps=action is Action.STORE)
        self.did[is_self, False] += 1
        if action is Action.COMPUTE:
            self.kept.pop(slot, None)
            self.passed += 0 if is_self else output.nbytes
            return
        if self._budget is not None and not is_self:
            # Half steps leave the choice as it is.
            if action is Action.REUSE and slot in self.declined:
                return
            if not self._is_within(slot, sizes_of(hidden_states, context, output)):
                return
        tensor = part_of(output, self.signals.part)
        if tensor is output and is_exposed(attn, slot):
            tensor = output.clone()
        self._keep(slot, tensor, is_self)

    def counts(self) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
        """Whether cross-attention was computed and reused in the last forward, and whether self-attention was."""
        if self._compiled_slots or (not self.did and not self.layers.layout.joint and self._lies_in_compiled_code()):
            actions = self.signals.cross_attention, self.signals.self_attention
            cross, own = ((action is not Action.REUSE, action is Action.REUSE) for action in actions)
            if cross[1] and self.declined:
                cross = True, self.cross_kept > 0
            return cross, own
        cross, own = ((self.did[is_self, False] > 0, self.did[is_self, True] > 0) for is_self in (False, True))
        return cross, own

    def _lies_in_compiled_code(self) -> bool:
        """Whether the layers lie in compiled code, from where they cannot report."""
        if self._is_compiled is None:
            self._is_compiled = lies_in_compiled_code(self.layers.denoiser)
        return self._is_compiled

    def _enter(self, slot: Slot, attn: Any, keeps: bool = True) -> None:
        """A gate was called: it has to be that of one layer, and that layer has to run once in a forward."""
        if self._layer_of.setdefault(slot, attn) is not attn:
            raise ValueError(
                "T-GATE: one TGateAttnProcessor serves several attention layers: make one for each entry of "
                "`denoiser.attn_processors`."
            )
        if keeps and slot in self._in_forward:
            raise ValueError(
                f"T-GATE: {self.layers.name_of(attn)} ran twice in one call of the denoiser, and one kept output does "
                "not serve both (windows of frames, tiles). Call remove_tgate(pipe) to use this pipeline."
            )
        self._in_forward.add(slot)

    def _is_within(self, slot: Slot, sizes: LayerSizes | None) -> bool:
        """Whether a layer keeps its output within the budget. For it, others may have to give up theirs."""
        budget = self._budget
        if budget is None or sizes is None:
            return True
        nbytes = sizes.nbytes // (1 if self.signals.part is CachedPart.ALL else 2)
        budget.meet(slot, self.layers.saved(slot, sizes), nbytes, self.layers.place(slot))
        self.declined.discard(slot)
        held = [each for each, kept in self.kept.items() if not kept.is_self]
        for each in (*budget.known, *held):
            if each not in budget:
                self.kept.pop(each, None)
                self.declined.add(each)
        return slot in budget

    def _tell_compiled(self, action: Action) -> None:
        """A forward begins: tell compiled code which of its layers are beyond the budget."""
        assert self._budget is not None
        if action is Action.STORE:
            for slot, sizes in self._sizes.items():
                if slot not in self._budget.known:
                    self._is_within(slot, sizes)
        for slot in self.layers.expected().values():
            slot.action = Action.COMPUTE if slot in self.declined else action

    def _hear_compiled(self) -> None:
        """A forward has ended: hear of compiled code how large its layers are."""
        if self._budget is None:
            return
        for slot in self.layers.expected().values():
            slot.action = Action.COMPUTE
            sizes, slot.sizes = slot.sizes, None
            if sizes is not None:
                self._in_forward.add(slot)
                # In half steps those that compute are half as large.
                if slot.tensor is not None or slot not in self._sizes:
                    self._sizes[slot] = sizes

    def _keep(self, slot: Slot, tensor: torch.Tensor, is_self: bool) -> None:
        """Keep an output."""
        # Tensors of inference mode do not count how often they are written to.
        self.kept[slot] = CachedOutput(tensor, None if tensor.is_inference() else tensor._version, is_self)
