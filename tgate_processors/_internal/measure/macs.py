"""MACs of the forwards of a denoiser without weights, counted by torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..attention.budget import measure_layer, saved_macs
from ..attention.layers import attention_modules
from ..attention.processor import TGateAttnProcessor
from ..attention.state import LayerActions, Slot, TGateState
from ..denoiser.batch import guided_parts
from ..denoiser.inputs import iter_tensors, read_inputs
from ..denoiser.spec import LayerLayout
from ..families import family_of
from ..plan.schedule import TGateSchedule
from ..plan.step_plan import Action
from .inputs import InputSize
from .meta_model import make_inputs

# The layers that published MACs count.
_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass(frozen=True)
class MACs:
    r"""
    A number of multiply-accumulate operations, split into layers and attention.

    Args:
        layers (`int`): Those of Linear and Conv layers, which is what published MACs count.
        attention (`int`): Those of attention's two products, of queries with keys and of weights with values.
    """

    layers: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.layers + self.attention

    def __add__(self, other: MACs) -> MACs:
        return MACs(self.layers + other.layers, self.attention + other.attention)

    def __mul__(self, times: int) -> MACs:
        return MACs(self.layers * times, self.attention * times)


@dataclass(frozen=True)
class ForwardCost:
    """The cost of one forward: MACs, also of some layers separately, and parameters of the modules that ran."""

    macs: MACs
    parameters: int
    layers: Mapping[str, MACs]


@dataclass(frozen=True)
class CrossAttentionCost:
    """A layer with cross-attention: the size of its output, its MACs, and the MACs that reuse saves."""

    width: int
    macs: MACs
    saved: int


@dataclass(frozen=True)
class DenoiserProfile:
    """
    The cost of a denoiser for one sample.

    Args:
        forwards (`dict`): The forwards, by whether cross-attention and self-attention are reused in them.
        cross (`tuple` of `CrossAttentionCost`): The cross-attention layers.
        self_width (`int`): Numbers that all self-attention layers give out.
        width (`int`): Numbers that the denoiser itself gives out, a variance left out.
        template_width (`int`): All numbers that it gives out, if there is a variance among them, else 0.
    """

    forwards: dict[tuple[bool, bool], ForwardCost]
    cross: tuple[CrossAttentionCost, ...]
    self_width: int
    width: int
    template_width: int = 0


class RecordingCache:
    """Takes the place of a run, for forwards that belong to none: does as told and records what it is given."""

    def __init__(self) -> None:
        self.actions = LayerActions()
        # The layers with cross-attention: the numbers that they give out, and what they save.
        self.cross: dict[Any, tuple[int, int]] = {}
        self._cached: dict[Slot, torch.Tensor] = {}

    @property
    def attention_cache(self) -> RecordingCache:
        """Itself: it takes the place of a run."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self._cached.values())

    def get(self, slot: Slot, attn: Any, hidden_states: torch.Tensor, is_self: bool) -> torch.Tensor | None:
        """The cached output of a layer."""
        return self._cached.get(slot)

    def put(self, slot: Slot, attn: Any, output: torch.Tensor, action: Action, is_self: bool, *given: Any) -> None:
        """A layer has computed its output."""
        if not is_self:
            self.cross[attn] = output.numel(), saved_macs(attn, measure_layer(given[0], given[1], output))
        if action is Action.STORE:
            self._cached[slot] = output
        else:
            self._cached.pop(slot, None)


def count_forwards(
    module: Any,
    new_inputs: Callable[[], dict[str, Any]],
    modes: Sequence[tuple[Action, Action]],
    layout: LayerLayout | None = None,
) -> Iterator[tuple[ForwardCost, RecordingCache]]:
    """
    Run a module with T-GATE's processors, once for each combination of actions.

    Args:
        module (`torch.nn.Module`): The module.
        new_inputs (`Callable`): Makes the inputs of a forward.
        modes (`Sequence` of `tuple`): What cross-attention and self-attention do.
        layout (`LayerLayout`, *optional*): Which layers are never gated.

    Yields:
        `tuple` of `ForwardCost` and `RecordingCache`: What the forward took, and what is held after it.
    """
    state, recorder = TGateState(TGateSchedule()), RecordingCache()
    layers = attention_modules(module)
    for name, layer in layers.items():
        if layout is None or layout.is_gateable(name):
            layer.set_processor(TGateAttnProcessor(layer.processor, state))
    for cross, own in modes:
        recorder.actions.set(cross, own)
        with state.entered(recorder):
            forward = count_forward(module, new_inputs(), layers)
        yield forward, recorder


def profile_denoiser(meta_model: Any, size: InputSize) -> DenoiserProfile:
    """Profile a denoiser without weights, in each way that its attention can be computed and reused."""
    modes = (
        (Action.STORE, Action.STORE),
        (Action.STORE, Action.REUSE),
        (Action.REUSE, Action.REUSE),
        (Action.REUSE, Action.COMPUTE),
    )
    forwards, widths, given = {}, [], []

    family = family_of(meta_model)
    assert family is not None
    layout = family.layout

    def record_output(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        guided = sum(part.numel() for part in guided_parts(output, read_inputs(module, args, kwargs), layout))
        whole = sum(tensor.numel() for tensor in iter_tensors(output))
        given.append((guided, 0 if guided == whole else whole))

    handle = meta_model.register_forward_hook(record_output, with_kwargs=True)
    counted = count_forwards(meta_model, lambda: make_inputs(meta_model, 1, size), modes, layout)
    for mode, (forward, recorder) in zip(modes, counted, strict=True):
        forwards[mode[0] is Action.REUSE, mode[1] is Action.REUSE] = forward
        widths.append(recorder.nbytes // meta_model.dtype.itemsize)
    handle.remove()
    taken, seen = forwards[False, False].layers, recorder.cross
    # In the order of the denoiser, not of its forward.
    layers = ((name, seen[layer]) for name, layer in attention_modules(meta_model).items() if layer in seen)
    cross = tuple(CrossAttentionCost(width, taken[name], saved) for name, (width, saved) in layers)
    # What is computed but not stored is released: after the last forward only cross-attention is held.
    return DenoiserProfile(forwards, cross, widths[0] - widths[-1], *given[0])


def count_forward(
    module: torch.nn.Module, inputs: dict[str, Any], separately: Mapping[str, torch.nn.Module] | None = None
) -> ForwardCost:
    """Run a module once and count MACs, also of some of its parts separately."""
    counter = FlopCounterMode(display=False)
    ran: set[torch.nn.Parameter] = set()
    in_layers = 0
    names = {part: name for name, part in (separately or {}).items()}
    taken: dict[str, MACs] = {}

    def so_far() -> MACs:
        return MACs(in_layers // 2, (counter.get_total_flops() - in_layers) // 2)

    def before(part: torch.nn.Module, args: Any) -> None:
        nonlocal in_layers
        ran.update(part.parameters(recurse=False))
        if isinstance(part, _LAYERS):
            in_layers -= counter.get_total_flops()
        elif part in names:
            taken[names[part]] = so_far() * -1

    def after(part: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal in_layers
        if isinstance(part, _LAYERS):
            in_layers += counter.get_total_flops()
        elif part in names:
            taken[names[part]] += so_far()

    # By module and not by operation: what attention's products are called depends on the version and the device.
    handles = [part.register_forward_pre_hook(before) for part in module.modules()]
    handles += [part.register_forward_hook(after) for part in module.modules()]
    try:
        with torch.no_grad(), counter:
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return ForwardCost(so_far(), sum(parameter.numel() for parameter in ran), taken)
