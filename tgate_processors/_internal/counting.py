"""Counting: the forwards of a denoiser without weights, by torch's counter, and a run made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .call import Call
from .families import family_of
from .families.family import InputSize
from .halving import joined, sample_of
from .layers import Layers, attention_modules
from .layout import Layout, Seen, see
from .processor import TGateAttnProcessor
from .report import TGateReport
from .run import Run
from .schedule import Action, TGateSchedule
from .state import Signals, Slot, TGateState
from .steps import Timeline
from .twin import make_inputs

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
        width (`int`): Numbers that the denoiser itself gives out, a variance left out.
    """

    forwards: dict[tuple[bool, bool], Forward]
    cross_width: int
    self_width: int
    width: int


class Recorder:
    """Takes the place of a run, for forwards that belong to none: does as told and keeps what it is given."""

    def __init__(self) -> None:
        self.signals = Signals()
        self._kept: dict[Slot, torch.Tensor] = {}

    @property
    def outputs(self) -> Recorder:
        """What the gates talk to, as of a run."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def reused(self, slot: Slot, attn: Any, hidden_states: torch.Tensor, is_self: bool) -> torch.Tensor | None:
        """The kept output of a layer."""
        return self._kept.get(slot)

    def computed(self, slot: Slot, attn: Any, output: torch.Tensor, action: Action, is_self: bool) -> None:
        """A layer has computed its output."""
        if action is Action.STORE:
            self._kept[slot] = output
        else:
            self._kept.pop(slot, None)


def count_forwards(
    module: Any,
    make: Callable[[], dict[str, Any]],
    ways: Sequence[tuple[Action, Action]],
    layout: Layout | None = None,
) -> Iterator[tuple[Forward, int]]:
    """
    Run a module with T-GATE's processors, one way of doing cross- and self-attention after the other.

    Args:
        module (`torch.nn.Module`): The module.
        make (`Callable`): Makes the inputs of a forward.
        ways (`Sequence` of `tuple`): What cross-attention and self-attention do.
        layout (`Layout`, *optional*): Which layers are never gated.

    Yields:
        `tuple` of `Forward` and `int`: What the forward took, and the bytes held after it.
    """
    state, recorder = TGateState(TGateSchedule()), Recorder()
    layers = attention_modules(module)
    for name, layer in layers.items():
        if layout is None or layout.is_gated(name):
            layer.set_processor(TGateAttnProcessor(layer.processor, state))
    for cross, own in ways:
        recorder.signals.set(cross, own)
        with state.entered(recorder):
            forward = count_forward(module, make())
        yield forward, recorder.nbytes


def measure(twin: Any, size: InputSize) -> Profile:
    """Run a twin with T-GATE's processors in every way in which attention can be computed and reused."""
    ways = (
        (Action.STORE, Action.STORE),
        (Action.STORE, Action.REUSE),
        (Action.REUSE, Action.REUSE),
        (Action.REUSE, Action.COMPUTE),
    )
    forwards, widths, given = {}, [], []

    family = family_of(twin)
    assert family is not None
    several = family.layout.scales

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given.append((joined(output) if several else sample_of(output, see(module, args, kwargs).shape)).numel())

    handle = twin.register_forward_hook(note, with_kwargs=True)
    counted = count_forwards(twin, lambda: make_inputs(twin, 1, size), ways, family.layout)
    for way, (forward, held) in zip(ways, counted, strict=True):
        forwards[way[0] is Action.REUSE, way[1] is Action.REUSE] = forward
        widths.append(held // twin.dtype.itemsize)
    handle.remove()
    # What is computed but not stored is released: after the last forward only cross-attention is held.
    return Profile(forwards, cross_width=widths[-1], self_width=widths[0] - widths[-1], width=given[0])


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


class _Layer(torch.nn.Module):
    """All attention layers of a kind in one: it gives out as much as they do together."""

    def __init__(self, width: int, *, cross: bool) -> None:
        super().__init__()
        self.is_cross_attention = cross
        self.ran = False
        self._width = width
        self.processor: Any = self._compute

    def _compute(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None) -> torch.Tensor:
        self.ran = True
        return hidden_states.new_empty(len(hidden_states), 1, self._width)

    def get_processor(self) -> Any:
        """As every attention layer of diffusers."""
        return self.processor

    def forward(self, picture: torch.Tensor, text: torch.Tensor | None) -> None:
        """Run what stands in the layer."""
        self.ran = False
        self.processor(self, picture, encoder_hidden_states=text)


class _Denoiser(torch.nn.Module):
    """A denoiser of two layers."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.own = _Layer(profile.self_width, cross=False)
        self.cross = _Layer(profile.cross_width, cross=True)

    def set_attn_processor(self, processors: dict[str, Any]) -> None:
        """As every denoiser of diffusers."""
        self.own.processor, self.cross.processor = processors["own.processor"], processors["cross.processor"]

    def forward(self, picture: torch.Tensor) -> None:
        """Run both layers."""
        self.own(picture, None)
        self.cross(picture, torch.empty_like(picture))


class _Announced(Call):
    """A call of which everything is known beforehand."""

    def __init__(self, timeline: Timeline, *, guided: bool, pictures: int) -> None:
        super().__init__(None, {"prompt": [""] * pictures})
        self._timeline = timeline
        self._guides = guided

    @property
    def subject(self) -> str:
        """Whose call it is, for messages."""
        return "the denoiser"

    def timeline(self) -> Timeline:
        """The steps."""
        return self._timeline

    def guided(self) -> bool:
        """Whether guidance is on."""
        return self._guides

    def scale(self, expert: int = 0) -> float:
        """It is all the same without values."""
        return 1.0


def run_schedule(
    profile: Profile,
    schedule: TGateSchedule,
    timeline: Timeline,
    *,
    batch_size: int,
    guided: bool,
    dtype: torch.dtype,
    cross_attention: bool = True,
    joint: bool = False,
) -> tuple[MACs, TGateReport]:
    """
    Go through a run, step by step, with T-GATE's own run and processors and these two layers.

    Args:
        profile (`Profile`): The denoiser.
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        timeline (`Timeline`): Passes of the loop, passes per step, and first passes that repeat step 0.
        batch_size (`int`): Number of pictures.
        guided (`bool`): Whether classifier-free guidance is on.
        dtype (`torch.dtype`): The type of what is stored.
        cross_attention (`bool`, *optional*, defaults to `True`): Whether cross-attention is reused.
        joint (`bool`, *optional*, defaults to `False`): Whether no layer is gated.

    Returns:
        `tuple` of `MACs` and `TGateReport`: What the run takes, and what T-GATE says of it.
    """
    state, denoiser = TGateState(schedule), _Denoiser(profile)
    layers = Layers(denoiser, state, "gate", Layout(joint=joint))
    layers.follow()
    call = _Announced(timeline, guided=guided, pictures=batch_size)
    run = Run(state, call, layers, droppable=True, by_forward=True, cross_attention=cross_attention)
    whole = torch.empty((2 if guided else 1) * batch_size, profile.width, 1, dtype=dtype, device="meta")
    taken = MACs()
    with state.entered(run):
        for _ in range(timeline.passes):
            run.before_forward(Seen(len(whole), tuple(whole.shape[1:]), {"sample": whole}))
            picture = whole[:batch_size] if run.half else whole
            denoiser(picture[:, :1])
            taken += profile.forwards[not denoiser.cross.ran, not denoiser.own.ran].macs * len(picture)
            run.after_forward(picture)
    return taken, run.report
