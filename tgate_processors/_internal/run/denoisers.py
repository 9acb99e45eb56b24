"""The denoisers of a run, most often one: what each keeps, by the calls that guidance is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..attention.cache import AttentionCache
from ..attention.layers import GatedLayers
from ..attention.state import CachedPart, TGateState


class CacheKey(NamedTuple):
    """The forward that kept cross-attention: rows of what is kept, shape of a sample, and what part of it is kept."""

    rows: int
    shape: tuple[int, ...]
    part: CachedPart


class DenoiserCache:
    """
    One denoiser of a run.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        layers (`GatedLayers`): Its attention layers.
        number (`int`, *optional*, defaults to 0): Its place among the denoisers of the pipeline.

    Attributes:
        by_call (`tuple` of `AttentionCache`): What its layers keep, by the calls of a step.
        stored (`CacheKey`, *optional*): The forward that kept cross-attention.
    """

    def __init__(self, state: TGateState, layers: GatedLayers, number: int = 0) -> None:
        self.layers = layers
        self.number = number
        self.by_call = tuple(AttentionCache(state, layers) for _ in range(layers.layout.calls))
        self.stored: CacheKey | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(outputs.nbytes for outputs in self.by_call)

    def forget(self) -> None:
        """Hold nothing."""
        self.stored = None
        for outputs in self.by_call:
            outputs.forget()


class DenoiserCaches:
    """
    The denoisers of a run, and the one that runs now.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        layers (`Sequence` of `GatedLayers`): Their attention layers.

    Attributes:
        now (`DenoiserCache`): The one that runs now.
        call (`int`): Which of the calls of the step it is that runs now.
        took_over (`bool`): Whether it has taken over from another one in this loop.
    """

    def __init__(self, state: TGateState, layers: Sequence[GatedLayers]) -> None:
        self._all = tuple(DenoiserCache(state, each, number) for number, each in enumerate(layers))
        self.now = self._all[0]
        self.call = 0
        self.took_over = False

    @property
    def outputs(self) -> AttentionCache:
        """What the layers that run now keep."""
        return self.now.by_call[self.call]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(expert.nbytes for expert in self._all)

    def halved_inside(self, halved: bool) -> None:
        """Say whether the layers may find the second half of a batch that was given whole."""
        for expert in self._all:
            for outputs in expert.by_call:
                outputs.halved_inside = halved

    def begin(self, denoiser: Any) -> bool:
        """
        The first call of a step begins.

        Returns:
            `bool`: Whether another denoiser takes over. What the one before has kept is released.
        """
        self.call = 0
        expert = next((each for each in self._all if each.layers.denoiser is denoiser), self.now)
        if expert is self.now:
            return False
        self.now.forget()
        self.now = expert
        return True

    def settle(self) -> list[str]:
        """The loop starts: gate what the call itself has set, and tell the layers that leave guidance whole."""
        return [name for expert in self._all for name in expert.layers.settle()]

    def limit(self, most: int | None, *, shared: bool) -> None:
        """Cross-attention keeps so many bytes at most, for all calls of a step together if each keeps its own."""
        for expert in self._all:
            for outputs in expert.by_call:
                outputs.limit(most // len(expert.by_call) if most is not None and shared else most)

    @property
    def layers_kept(self) -> tuple[int, int]:
        """How many layers hold cross-attention, and how many would without a budget."""
        kept = sum(outputs.cross_kept for outputs in self.now.by_call)
        return kept, kept + sum(len(outputs.declined) for outputs in self.now.by_call)

    def check(self) -> None:
        """Refuse processors that were exchanged between two steps."""
        self.now.layers.check()

    def adopt(self, layers: GatedLayers) -> None:
        """The layers are known now (hand wiring)."""
        self.now.layers = layers
        for outputs in self.now.by_call:
            outputs.layers = layers

    def forget(self) -> None:
        """Hold nothing."""
        self.took_over = False
        self.call = 0
        for expert in self._all:
            expert.forget()
