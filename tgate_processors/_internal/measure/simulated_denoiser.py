"""A denoiser that runs by its profile: what its layers cache, and the MACs of a forward, without tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..attention.budget import MemoryBudget
from ..plan.forward_plan import CachedPart, CacheKey, ForwardPlan
from ..plan.report_builder import NO_LAYER_COUNTS
from ..plan.step_plan import Action
from .macs import DenoiserProfile, MACs


@dataclass
class _Cached:
    """What the layers of a denoiser have cached: rows of each layer with cross-attention, and of self-attention."""

    cross: dict[int, int] = field(default_factory=dict)
    over_budget: set[int] = field(default_factory=set)
    self_rows: int | None = None
    key: CacheKey | None = None


class SimulatedDenoiser:
    """A denoiser that runs by its profile, without tensors."""

    def __init__(
        self, profile: DenoiserProfile, *, itemsize: int, gates_cross: bool, joint: bool, max_memory: int | None
    ) -> None:
        self._profile = profile
        self._itemsize = itemsize
        self._joint = joint
        # What was asked for; where no layer is gated, nothing is cached for that.
        self.asked_to_gate = gates_cross
        self._gates_cross = gates_cross and not joint
        self._budget: MemoryBudget[int] | None = None if max_memory is None else MemoryBudget(max_memory)
        self.cached = _Cached()
        self.uncached_bytes = 0
        self.counts = NO_LAYER_COUNTS

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of a sample, as far as it matters."""
        return (self._profile.width,)

    @property
    def sample_bytes(self) -> int:
        """Bytes of the output for a sample."""
        return self._profile.width * self._itemsize

    @property
    def template_bytes(self) -> int:
        """Bytes that are held for a sample so that an output can be made."""
        return self._profile.template_width * self._itemsize

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        cached = self.cached
        cross = sum(self._profile.cross[index].width * rows for index, rows in cached.cross.items())
        return (cross + self._profile.self_width * (cached.self_rows or 0)) * self._itemsize

    @property
    def cached_layer_counts(self) -> tuple[int, int]:
        """How many layers have cross-attention cached, and how many would without a budget."""
        return len(self.cached.cross), len(self.cached.cross) + len(self.cached.over_budget)

    @property
    def min_bytes(self) -> int | None:
        """The bytes that the first layer needs, if any is beyond the budget."""
        return self._budget.min_bytes if self._budget is not None and self.cached.over_budget else None

    def release(self) -> None:
        """Another denoiser takes over, or the run has ended."""
        self.cached = _Cached()
        if self._budget is not None:
            self._budget.reset()

    def forward(self, plan: ForwardPlan, rows: int) -> MACs:
        """Run a forward with so many rows, and return its MACs."""
        cached_rows = rows if plan.part is CachedPart.ALL else rows // 2
        reuses_own = not self._joint and plan.self_attention is Action.REUSE and self.cached.self_rows == rows
        computed = list(range(len(self._profile.cross)))
        if plan.cross_attention is Action.REUSE and self._gates_cross:
            computed = [index for index in computed if index not in self.cached.cross]
        elif plan.cross_attention is Action.STORE and self._gates_cross:
            self._store_cross(cached_rows)
        else:
            self.cached.cross.clear()
        if not reuses_own and not self._joint:
            self.cached.self_rows = None if plan.self_attention is Action.COMPUTE else cached_rows
        widths = sum(self._profile.cross[index].width for index in computed)
        is_uncached = plan.cross_attention is Action.COMPUTE and not self._joint
        self.uncached_bytes = widths * rows * self._itemsize if is_uncached else 0
        if not self._joint:
            reused = len(computed) < len(self._profile.cross)
            self.counts = (len(computed) > 0, reused), (not reuses_own, reuses_own)
        return self._macs(computed, reuses_own=reuses_own) * rows

    def _store_cross(self, rows: int) -> None:
        """Every layer caches its output, as far as the budget goes."""
        widths = {index: layer.width * rows * self._itemsize for index, layer in enumerate(self._profile.cross)}
        if self._budget is not None:
            for index, nbytes in widths.items():
                self._budget.offer(index, self._profile.cross[index].saved, nbytes, index)
            self.cached.over_budget = {index for index in widths if index not in self._budget}
        self.cached.cross = {index: rows for index in widths if index not in self.cached.over_budget}

    def _macs(self, computed: list[int], *, reuses_own: bool) -> MACs:
        """MACs of a forward for one sample, in which these layers compute cross-attention."""
        reuses = len(computed) < len(self._profile.cross)
        separately = [self._profile.cross[index].macs for index in computed] if reuses else []
        return sum(separately, start=self._profile.forwards[reuses, reuses_own].macs)
