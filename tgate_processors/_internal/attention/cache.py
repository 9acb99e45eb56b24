"""The cached outputs of the attention layers of one run, and what the layers did in the last forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..plan.forward_plan import CachedPart
from ..plan.step_plan import Action
from .budget import LayerSizes, MemoryBudget, measure_layer
from .compiled import output_may_be_mutated
from .forward_log import ForwardLog, expected
from .layers import GatedLayers
from .processor import MISMATCH_MESSAGE, select_part
from .state import LayerActions, Slot, TGateState


class CachedOutput(NamedTuple):
    """A cached output, its version counter at the time, and whether it is of self-attention."""

    tensor: torch.Tensor
    version: int | None
    is_self: bool


class AttentionCache:
    """
    The cached outputs of a run. Others cannot write to them; they are copied only where others could.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        layers (`GatedLayers`): The attention layers of the denoiser.

    Attributes:
        sees_half_inside (`bool`): Whether layers may find the second half of a batch that was given whole.
        over_budget (`set` of `Slot`): The gates of cross-attention that is computed in every step, beyond the budget.
        uncached_bytes (`int`): Bytes of cross-attention that was computed in the last forward and not cached.
    """

    def __init__(self, state: TGateState, layers: GatedLayers) -> None:
        self.layers = layers
        self.sees_half_inside = False
        self.actions = LayerActions()
        self.cached: dict[Slot, CachedOutput] = {}
        self.over_budget: set[Slot] = set()
        self.uncached_bytes = 0
        self._budget: MemoryBudget[Slot] | None = None
        self._state = state
        self._sizes: dict[Slot, LayerSizes] = {}
        self._lent_tensors: dict[Slot, torch.Tensor] = {}
        self._log = ForwardLog()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(cached.tensor.nbytes for cached in self.cached.values())

    @property
    def attention_cache(self) -> AttentionCache:
        """Itself: a cache takes the place of a run where none has begun."""
        return self

    def reset(self) -> None:
        """Release cached tensors, and choose layers anew."""
        self.actions.reset()
        # A forward that failed has left these behind.
        self._lent_tensors.clear()
        self._state.compiled_actions.reset()
        for slot in self.layers.slots:
            slot.tensor = None
        self.cached.clear()
        self.over_budget.clear()
        self._sizes.clear()
        if self._budget is not None:
            self._budget.reset()

    def set_budget(self, max_bytes: int | None) -> None:
        """A loop begins, in which cached cross-attention takes so many bytes at most."""
        self._budget = None if max_bytes is None else MemoryBudget[Slot](max_bytes)

    def agree_on_budget(self, agree: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """
        A forward has ended: select the same layers as the other processes, by the sizes in the one with most tokens.

        Args:
            agree (`Callable`): Makes the largest numbers of all processes from those of each.
            device (`torch.device`): Where the processes exchange them.
        """
        if self._budget is None or self.actions.cross_attention is not Action.STORE:
            return
        slots = list(self.layers.required().values())
        own = [self._budget.offered(slot) for slot in slots]
        agreed = agree(torch.tensor(own, dtype=torch.int64, device=device)).tolist()
        self._budget.select_by([(slot, *numbers) for slot, numbers in zip(slots, agreed, strict=True)])
        self._release_over_budget(self._budget)

    @property
    def min_bytes(self) -> int | None:
        """The bytes that the first layer needs, if any is beyond the budget."""
        return self._budget.min_bytes if self._budget is not None and self.over_budget else None

    @property
    def num_cached_cross(self) -> int:
        """How many layers have an output of cross-attention cached."""
        return sum(not cached.is_self for cached in self.cached.values())

    def missing_layers(self) -> list[str]:
        """The layers with cross-attention that have no output cached, except those beyond the budget."""
        held = self.cached.keys() | self.over_budget
        return [name for name, slot in self.layers.required().items() if slot not in held]

    def uncalled_layers(self) -> list[str]:
        """The layers with cross-attention whose gate was not called in the last forward."""
        return self._log.uncalled_layers(self.layers)

    def before_forward(self) -> None:
        """A forward begins: put what is reused where compiled code finds it."""
        self._log.clear()
        self.uncached_bytes = 0
        self._state.compiled_actions.copy_from(self.actions)
        if self._budget is not None:
            self._push_to_compiled(self.actions.cross_attention)
        for slot in self._log.compiled_slots & self.cached.keys():
            cached = self.cached[slot]
            action = self.actions.self_attention if cached.is_self else self.actions.cross_attention
            if action is Action.REUSE:
                exposed = output_may_be_mutated(self.layers.module_of(slot), slot)
                slot.tensor = self._lent_tensors[slot] = cached.tensor.clone() if exposed else cached.tensor
            elif action is Action.COMPUTE:
                del self.cached[slot]

    def after_forward(self) -> None:
        """A forward has ended: copy what compiled code has stored, which its next call may write to, one by one."""
        self._state.compiled_actions.reset()
        self._pull_from_compiled()
        for slot in self.layers.slots:
            tensor, slot.tensor = slot.tensor, None
            if tensor is not None and self._lent_tensors.get(slot) is not tensor:
                self._log.compiled_slots.add(slot)
                if self._fits_budget(slot, self._sizes.get(slot)):
                    self._store(slot, tensor.clone(), not self.layers.is_cross_attention(slot))
        self._lent_tensors.clear()

    def get(self, slot: Slot, attn: Any, hidden_states: torch.Tensor, is_self: bool) -> torch.Tensor | None:
        """
        The cached output of a layer, if it fits this forward.

        Args:
            slot (`Slot`): The gate of the layer.
            attn (`Attention`): The layer.
            hidden_states (`torch.Tensor`): The input of the layer, shape `(batch, tokens, channels)`.
            is_self (`bool`): Whether it attends to itself.

        Raises:
            ValueError: If others have written to what is cached, or cross-attention would have to compute on a half.
        """
        self._log.add_call(self.layers, slot, attn)
        if slot in self.over_budget:
            return None
        cached = self.cached.get(slot)
        rows, tokens = hidden_states.shape[:2]
        half = self.sees_half_inside and cached is not None and cached.tensor.shape[:2] == (2 * rows, tokens)
        if cached is not None and (half or cached.tensor.shape[:2] == (rows, tokens)):
            if cached.version is not None and cached.tensor._version != cached.version:
                raise ValueError(
                    f"T-GATE: what {self.layers.name_of(attn)} keeps was written to in place by somebody else. Write "
                    "to a copy of a layer's output, or call remove_tgate(pipe) to use this pipeline."
                )
            self._log.counts[is_self, True] += 1
            tensor = cached.tensor[rows:] if half else cached.tensor
            return tensor.clone() if output_may_be_mutated(attn, slot) else tensor
        if self.actions.on_half_batch and not is_self:
            raise ValueError(f"T-GATE: in {self.layers.name_of(attn)} {MISMATCH_MESSAGE}")
        return None

    def put(
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
        A layer has computed its output: cache it if it is to be stored.

        Args:
            slot (`Slot`): The gate of the layer.
            attn (`Attention`): The layer.
            output (`torch.Tensor`): The output, shape `(batch, tokens, channels)`.
            action (`Action`): What the layer was to do.
            is_self (`bool`): Whether it attends to itself.
            hidden_states (`torch.Tensor`): The input of the layer.
            context (`torch.Tensor` or a sequence): What it attends to, if not to itself.
        """
        if action is not Action.REUSE:
            self._log.add_call(self.layers, slot, attn, stores=action is Action.STORE)
        self._log.counts[is_self, False] += 1
        if action is Action.COMPUTE:
            self.cached.pop(slot, None)
            self.uncached_bytes += 0 if is_self else output.nbytes
            return
        if self._budget is not None and not is_self:
            # Half steps leave the choice as it is.
            if action is Action.REUSE and slot in self.over_budget:
                return
            if not self._fits_budget(slot, measure_layer(hidden_states, context, output)):
                return
        tensor = select_part(output, self.actions.part)
        if tensor is output and output_may_be_mutated(attn, slot):
            tensor = output.clone()
        self._store(slot, tensor, is_self)

    def last_forward_counts(self) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
        """Whether cross-attention was computed and reused in the last forward, and whether self-attention was."""
        if not self._log.is_silent(self.layers):
            return self._log.reported()
        cross, own = expected(self.actions)
        if cross[1] and self.over_budget:
            cross = True, self.num_cached_cross > 0
        return cross, own

    def _fits_budget(self, slot: Slot, sizes: LayerSizes | None) -> bool:
        """Whether the output of a layer fits the budget; others may have to give up theirs for it."""
        budget = self._budget
        if budget is None or sizes is None:
            return True
        nbytes = sizes.nbytes // (1 if self.actions.part is CachedPart.ALL else 2)
        budget.offer(slot, self.layers.saved_macs(slot, sizes), nbytes, self.layers.index_of(slot))
        self.over_budget.discard(slot)
        self._release_over_budget(budget)
        return slot in budget

    def _release_over_budget(self, budget: MemoryBudget[Slot]) -> None:
        """Release the outputs of layers that are not selected."""
        held = [each for each, cached in self.cached.items() if not cached.is_self]
        for each in (*budget.candidates, *held):
            if each not in budget:
                self.cached.pop(each, None)
                self.over_budget.add(each)

    def _push_to_compiled(self, action: Action) -> None:
        """A forward begins: set the action of each layer for compiled code, by the budget."""
        assert self._budget is not None
        if action is Action.STORE:
            for slot, sizes in self._sizes.items():
                if slot not in self._budget.candidates:
                    self._fits_budget(slot, sizes)
        for slot in self.layers.required().values():
            slot.action = Action.COMPUTE if slot in self.over_budget else action

    def _pull_from_compiled(self) -> None:
        """A forward has ended: read the sizes that compiled code has measured."""
        if self._budget is None:
            return
        for slot in self.layers.required().values():
            slot.action = Action.COMPUTE
            sizes, slot.sizes = slot.sizes, None
            if sizes is not None:
                self._log.called_slots.add(slot)
                # In half steps those that compute are half as large.
                if slot.tensor is not None or slot not in self._sizes:
                    self._sizes[slot] = sizes

    def _store(self, slot: Slot, tensor: torch.Tensor, is_self: bool) -> None:
        """Cache an output."""
        # Tensors of inference mode do not count how often they are written to.
        self.cached[slot] = CachedOutput(tensor, None if tensor.is_inference() else tensor._version, is_self)
