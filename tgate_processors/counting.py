"""Counting: the forwards of a denoiser without weights, by torch's counter, and a run made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .families import attention_modules
from .processor import TGateAttnProcessor
from .schedule import Action, Phase, TGateSchedule
from .state import TGateReport, TGateState
from .twin import InputSize, make_inputs

# The layers that published MACs count.
_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass(frozen=True)
class MACs:
    r"""
    Multiply-accumulates.

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
class Forward:
    """What one forward took: MACs, and the parameters of the modules that ran."""

    macs: MACs
    parameters: int


@dataclass(frozen=True)
class Profile:
    """
    What a denoiser takes for one picture.

    Args:
        forwards (`dict`): The forwards, by whether cross-attention and self-attention are reused in them.
        cross_width (`int`): Numbers that all cross-attention layers give out.
        self_width (`int`): Numbers that all self-attention layers give out.
    """

    forwards: dict[tuple[bool, bool], Forward]
    cross_width: int
    self_width: int


def measure(twin: Any, size: InputSize) -> Profile:
    """Run a twin with T-GATE's processors in every way in which attention can be computed and reused."""
    state = TGateState(TGateSchedule())
    layers = attention_modules(twin)
    twin.set_attn_processor({name: TGateAttnProcessor(layer.processor, state) for name, layer in layers.items()})
    forwards, widths = {}, []
    for cross, own in (
        (Action.STORE, Action.STORE),
        (Action.STORE, Action.REUSE),
        (Action.REUSE, Action.REUSE),
        (Action.REUSE, Action.COMPUTE),
    ):
        state.cross_attention, state.self_attention = cross, own
        forwards[cross is Action.REUSE, own is Action.REUSE] = count_forward(twin, make_inputs(twin, 1, size))
        widths.append(state.nbytes // twin.dtype.itemsize)
    # What is computed and not stored is let go of: the last forward leaves cross-attention alone.
    return Profile(forwards, cross_width=widths[-1], self_width=widths[0] - widths[-1])


def count_forward(module: torch.nn.Module, inputs: dict[str, Any]) -> Forward:
    """Run a module once and count."""
    counter = FlopCounterMode(display=False)
    ran: set[torch.nn.Parameter] = set()
    in_layers = 0

    def before(part: torch.nn.Module, args: Any) -> None:
        nonlocal in_layers
        ran.update(part.parameters(recurse=False))
        if isinstance(part, _LAYERS):
            in_layers -= counter.get_total_flops()

    def after(part: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal in_layers
        if isinstance(part, _LAYERS):
            in_layers += counter.get_total_flops()

    # By module and not by operation: what attention's products are called depends on the version and the device.
    handles = [part.register_forward_pre_hook(before) for part in module.modules()]
    handles += [part.register_forward_hook(after) for part in module.modules()]
    try:
        with torch.no_grad(), counter:
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    in_attention = counter.get_total_flops() - in_layers
    return Forward(MACs(in_layers // 2, in_attention // 2), sum(parameter.numel() for parameter in ran))


class _Layers:
    """All attention layers of a kind in one: they give out as much as they do together."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.ran = False

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.ran = True
        return hidden_states.new_empty(len(hidden_states), 1, self.width)


def run_schedule(
    profile: Profile,
    schedule: TGateSchedule,
    timeline: tuple[int, int, int],
    *,
    batch_size: int,
    guided: bool,
    dtype: torch.dtype,
) -> tuple[MACs, TGateReport]:
    """
    Go through a run, step by step, with T-GATE's own state and processors and these two layers.

    Args:
        profile (`Profile`): The denoiser.
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        timeline (`tuple`): Passes of the loop, passes per step, and first passes that repeat step 0.
        batch_size (`int`): Number of pictures.
        guided (`bool`): Whether classifier-free guidance is on.
        dtype (`torch.dtype`): The type of what is stored.

    Returns:
        `tuple` of `MACs` and `TGateReport`: What the run takes, and what T-GATE says of it.
    """
    state = TGateState(schedule)
    cross, own = _Layers(profile.cross_width), _Layers(profile.self_width)
    gated_cross, gated_own = TGateAttnProcessor(cross, state), TGateAttnProcessor(own, state)
    taken = MACs()
    state.begin(*timeline)
    while state.running:
        plan = state.enter(guided)
        halves = 2 if guided and plan.phase is not Phase.FIDELITY_IMPROVING else 1
        picture = torch.empty(halves * batch_size, 1, 1, dtype=dtype, device="meta")
        text = torch.empty_like(picture)
        cross.ran = own.ran = False
        gated_own(own, picture)  # type: ignore[operator]
        gated_cross(cross, picture, text)  # type: ignore[operator]
        taken += profile.forwards[not cross.ran, not own.ran].macs * (halves * batch_size)
        state.advance()
    return taken, state.report
