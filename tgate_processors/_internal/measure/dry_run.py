"""A run without a network: T-GATE's own run and processors, over layers of which is known what they take."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.budget import LayerSizes
from ..attention.layers import GatedLayers
from ..attention.state import Slot, TGateState
from ..denoiser.inputs import DenoiserInputs
from ..denoiser.spec import Layout
from ..plan.report import TGateReport
from ..plan.schedule import TGateSchedule
from ..plan.steps import Timeline
from ..run.call import PipelineCall
from ..run.run import PipelineRun
from .macs import DenoiserProfile, MACs


class _Layer(torch.nn.Module):
    """An attention layer, or several in one: it gives out as much as they do together."""

    def __init__(self, width: int, *, cross: bool, saved: int = 0) -> None:
        super().__init__()
        self.is_cross_attention = cross
        self.ran = False
        self.saved = saved
        self._width = width
        self.processor: Any = self._compute

    def _compute(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None) -> torch.Tensor:
        self.ran = True
        return hidden_states.new_empty(len(hidden_states), 1, self._width)

    def get_processor(self) -> Any:
        """As every attention layer of diffusers."""
        return self.processor

    def set_processor(self, processor: Any) -> None:
        """Likewise."""
        self.processor = processor

    def forward(self, picture: torch.Tensor, text: torch.Tensor | None) -> None:
        """Run what stands in the layer."""
        self.ran = False
        self.processor(self, picture, encoder_hidden_states=text)


class _Denoiser(torch.nn.Module):
    """A denoiser of attention layers alone, with those for self-attention in one."""

    def __init__(self, profile: DenoiserProfile) -> None:
        super().__init__()
        self.own = _Layer(profile.self_width, cross=False)
        self.cross = torch.nn.ModuleList(_Layer(layer.width, cross=True, saved=layer.saved) for layer in profile.cross)
        self._profile = profile

    def forward(self, picture: torch.Tensor) -> MACs:
        """Run all layers, and tell what such a forward takes for one picture."""
        self.own(picture, None)
        text = torch.empty_like(picture)
        for layer in self.cross:
            layer(picture, text)
        ran = [counted.macs for layer, counted in zip(self.cross, self._profile.cross, strict=True) if layer.ran]
        reuses = len(ran) < len(self.cross)
        return sum(ran if reuses else (), start=self._profile.forwards[reuses, not self.own.ran].macs)


class _Layers(GatedLayers):
    """The layers of such a denoiser, which know what they save."""

    def saved(self, slot: Slot, sizes: LayerSizes) -> int:
        """What the layer of a gate saves."""
        saved: int = self.of(slot).saved
        return saved


class _Announced(PipelineCall):
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

    def guides(self) -> bool:
        """Whether guidance is on."""
        return self._guides

    def scale(self, expert: int = 0) -> float:
        """It is all the same without values."""
        return 1.0


def run_schedule(
    profile: DenoiserProfile,
    schedule: TGateSchedule,
    timeline: Timeline,
    *,
    batch_size: int,
    guided: bool,
    dtype: torch.dtype,
    cross_attention: bool = True,
    joint: bool = False,
    max_memory: int | None = None,
    takes_over: int | None = None,
) -> tuple[MACs, TGateReport]:
    """
    Go through a run, step by step, with T-GATE's own run and processors and these layers.

    Args:
        profile (`DenoiserProfile`): The denoiser.
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        timeline (`Timeline`): Passes of the loop, passes per step, and first passes that repeat step 0.
        batch_size (`int`): Number of pictures.
        guided (`bool`): Whether classifier-free guidance is on.
        dtype (`torch.dtype`): The type of what is stored.
        cross_attention (`bool`, *optional*, defaults to `True`): Whether cross-attention is reused.
        joint (`bool`, *optional*, defaults to `False`): Whether no layer is gated.
        max_memory (`int`, *optional*): Most bytes of kept cross-attention.
        takes_over (`int`, *optional*): The pass from which another denoiser of the same size runs.

    Returns:
        `tuple` of `MACs` and `TGateReport`: What the run takes, and what T-GATE says of it.
    """
    state = TGateState(schedule, max_memory)
    denoisers = [_Denoiser(profile) for _ in range(1 if takes_over is None else 2)]
    layers = [_Layers(denoiser, state, "gate", Layout(joint=joint)) for denoiser in denoisers]
    for each in layers:
        each.follow()
    call = _Announced(timeline, guided=guided, pictures=batch_size)
    run = PipelineRun(state, call, layers, droppable=True, counts_forwards=True, cross_attention=cross_attention)
    whole = torch.empty((2 if guided else 1) * batch_size, profile.width, 1, dtype=dtype, device="meta")
    taken = MACs()
    with state.entered(run):
        for index in range(timeline.passes):
            denoiser = denoisers[0 if takes_over is None or index < takes_over else 1]
            run.before_forward(DenoiserInputs(len(whole), tuple(whole.shape[1:]), {"sample": whole}), denoiser=denoiser)
            picture = whole[:batch_size] if run.half else whole
            taken += denoiser(picture[:, :1]) * len(picture)
            run.after_forward(picture)
    return taken, run.report
