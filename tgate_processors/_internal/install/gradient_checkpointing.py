"""Gradient checkpointing: blocks that are computed again in `backward` do what they did in the forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..attention.state import LayerActions, Slot, TGateState
from ..denoiser.lock import exclusively

if TYPE_CHECKING:
    from ..attention.cache import CachedOutput
    from ..run.run import PipelineRun

# The attribute of a block with the function that checkpoints it.
_CHECKPOINT_FUNC = "_gradient_checkpointing_func"


class ReplayCache:
    """
    A forward of a run, for the blocks that are computed again when the run is over.

    Args:
        run (`PipelineRun`): The run, whose present actions and cached outputs are remembered.
    """

    def __init__(self, run: PipelineRun) -> None:
        self.actions = LayerActions()
        self.actions.copy_from(run.attention_cache.actions)
        self._cached: dict[Slot, CachedOutput] = dict(run.attention_cache.cached)

    @property
    def nbytes(self) -> int:
        """Bytes held on top of the run's."""
        return 0

    @property
    def attention_cache(self) -> ReplayCache:
        """Itself: it takes the place of a run."""
        return self

    def get(self, slot: Slot, attn: Any, hidden_states: torch.Tensor, is_self: bool) -> torch.Tensor | None:
        """The output of the layer in the forward, if it was a cached one."""
        cached = self._cached.get(slot)
        return cached.tensor if cached is not None and cached.tensor.shape[:2] == hidden_states.shape[:2] else None

    def put(self, *args: Any) -> None:
        """Nothing is cached twice."""


class _RecomputedBlock:
    """A block that is called once in the forward and again in `backward`."""

    def __init__(self, block: Any, state: TGateState) -> None:
        self._block = block
        self._state = state
        self._replay = ReplayCache(state.current())
        self._ran = False

    def __call__(self, *args: Any) -> Any:
        if not self._ran:
            self._ran = True
            return self._block(*args)
        with self._state.entered(self._replay):
            return self._block(*args)


class _CheckpointReplayer:
    """Wraps the function that checkpoints a block, for all runs of its denoiser."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.states: dict[object, TGateState] = {}

    def __call__(self, block: Any, *args: Any) -> Any:
        state = next((state for state in tuple(self.states.values()) if state.current() is not None), None)
        return self.wrapped(block if state is None else _RecomputedBlock(block, state), *args)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has no runs.
        return _as_it_is, (self.wrapped,)


def _as_it_is(function: Any) -> Any:
    """The wrapped function, for copies."""
    return function


def replay_checkpoints(denoiser: torch.nn.Module, state: TGateState, run: object) -> None:
    """Have the checkpointed blocks of a denoiser replay their forward of a run."""
    blocks = [module for module in denoiser.modules() if getattr(module, "gradient_checkpointing", False)]

    def put_in() -> None:
        for block in filter(_has_checkpoint_func, blocks):
            found = vars(block)[_CHECKPOINT_FUNC]
            if not isinstance(found, _CheckpointReplayer):
                found = vars(block)[_CHECKPOINT_FUNC] = _CheckpointReplayer(found)
            found.states[run] = state

    if blocks:
        exclusively(put_in)


def stop_replaying_checkpoints(denoiser: torch.nn.Module, run: object) -> None:
    """The inverse of `replay_checkpoints`."""
    found = [
        block for block in denoiser.modules() if isinstance(vars(block).get(_CHECKPOINT_FUNC), _CheckpointReplayer)
    ]

    def take_out() -> None:
        for block in found:
            replaying = vars(block)[_CHECKPOINT_FUNC]
            if isinstance(replaying, _CheckpointReplayer):
                replaying.states.pop(run, None)
                if not replaying.states:
                    vars(block)[_CHECKPOINT_FUNC] = replaying.wrapped

    if found:
        exclusively(take_out)


def has_unpatchable_checkpointing(denoiser: torch.nn.Module) -> bool:
    """Whether the function that checkpoints blocks cannot be replaced, as in older versions of diffusers."""
    return torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) and not _has_checkpoint_func(module)
        for module in denoiser.modules()
    )


class WholeDenoiserCheckpointGuard:
    """Refuses to compute a gated forward again as a whole, recognised by its input."""

    def __init__(self) -> None:
        self._samples = WeakTensorKeyDictionary()

    def record(self, sample: torch.Tensor) -> None:
        """Remember the input of a gated forward."""
        if torch.is_grad_enabled():
            self._samples[sample] = True

    def check(self, sample: Any) -> None:
        """Refuse a forward outside a run in which `backward` computes a gated one again."""
        if isinstance(sample, torch.Tensor) and sample in self._samples and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "T-GATE: the whole denoiser is checkpointed, and `backward` computes it again when the run is over and "
                "nothing is kept any more. Checkpoint its blocks instead, denoiser.enable_gradient_checkpointing(), or "
                "call remove_tgate(pipe)."
            )


def _has_checkpoint_func(block: torch.nn.Module) -> bool:
    """Whether a block is checkpointed by a function that can be exchanged."""
    return callable(vars(block).get(_CHECKPOINT_FUNC))
