"""The denoisers of a run, most often one, and the attention caches of each: one for each call of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..attention.cache import AttentionCache
from ..attention.layers import GatedLayers
from ..attention.state import TGateState
from ..plan.forward_plan import CacheKey


class DenoiserCache:
    """
    One denoiser of a run.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        layers (`GatedLayers`): Its attention layers.
        index (`int`, *optional*, defaults to 0): Its place among the denoisers of the pipeline.

    Attributes:
        per_call (`tuple` of `AttentionCache`): The outputs of its layers, for each call of a step.
        cache_key (`CacheKey`, *optional*): The forward that cached cross-attention.
    """

    def __init__(self, state: TGateState, layers: GatedLayers, index: int = 0) -> None:
        self.layers = layers
        self.index = index
        self.per_call = tuple(AttentionCache(state, layers) for _ in range(layers.layout.calls_per_step))
        self.cache_key: CacheKey | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(cache.nbytes for cache in self.per_call)

    def reset(self) -> None:
        """Release cached tensors."""
        self.cache_key = None
        for cache in self.per_call:
            cache.reset()


class DenoiserCaches:
    """
    The denoisers of a run, and the one that runs now.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        layers (`Sequence` of `GatedLayers`): Their attention layers.

    Attributes:
        active (`DenoiserCache`): The one that runs now.
        call_index (`int`): Which of the calls of the step it is that runs now.
        switched (`bool`): Whether it has taken over from another one in this loop.
    """

    def __init__(self, state: TGateState, layers: Sequence[GatedLayers]) -> None:
        self._all = tuple(DenoiserCache(state, each, index) for index, each in enumerate(layers))
        self.active = self._all[0]
        self.call_index = 0
        self.switched = False

    @property
    def attention_cache(self) -> AttentionCache:
        """The cached outputs of the layers that run now."""
        return self.active.per_call[self.call_index]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(each.nbytes for each in self._all)

    def set_sees_half_inside(self, halved: bool) -> None:
        """Set whether layers may get the second half of a batch that the denoiser was given whole."""
        for each in self._all:
            for cache in each.per_call:
                cache.sees_half_inside = halved

    def __iter__(self) -> Iterator[DenoiserCache]:
        return iter(self._all)

    def find(self, module: Any) -> DenoiserCache | None:
        """The denoiser that is this module, if any is."""
        return next((each for each in self._all if each.layers.denoiser is module), None)

    def activate(self, denoiser: Any) -> bool:
        """
        The first call of a step begins.

        Returns:
            `bool`: Whether another denoiser takes over. The outputs of the one before are released.
        """
        self.call_index = 0
        found = self.find(denoiser) or self.active
        if found is self.active:
            return False
        self.active.reset()
        self.active = found
        return True

    def regate_replaced(self) -> list[str]:
        """The loop starts: wrap processors that the call has set; return the layers that leave guidance whole."""
        return [name for each in self._all for name in each.layers.regate_replaced()]

    def set_budget(self, max_bytes: int | None, *, shared: bool) -> None:
        """Set the most bytes of cached cross-attention, for all calls of a step together if each has its own."""
        for each in self._all:
            for cache in each.per_call:
                cache.set_budget(max_bytes // len(each.per_call) if max_bytes is not None and shared else max_bytes)

    @property
    def cached_layer_counts(self) -> tuple[int, int]:
        """How many layers have cross-attention cached, and how many would without a budget."""
        kept = sum(cache.num_cached_cross for cache in self.active.per_call)
        return kept, kept + sum(len(cache.over_budget) for cache in self.active.per_call)

    def check_not_replaced(self) -> None:
        """Refuse processors that were exchanged between two steps."""
        self.active.layers.check_not_replaced()

    def adopt(self, first: AttentionCache) -> None:
        """Go on with what the layers have cached before the run was there."""
        first.layers = self.active.layers
        self.active.per_call = (first,)

    def reset(self) -> None:
        """Release cached tensors of all denoisers."""
        self.switched = False
        self.call_index = 0
        for each in self._all:
            each.reset()
