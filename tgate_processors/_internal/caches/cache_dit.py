"""cache-dit's DBCache: if the first blocks give about what they gave, the residual of the middle ones is kept."""

from __future__ import annotations

import copy
import importlib.metadata
from typing import Any

import torch

from .adapter import CacheAdapter
from .forward_origin import comes_from
from .split import split

# What a context has to have, to be one that is known here. `pruned_blocks` is that of another kind of cache.
_NEEDS = (
    "buffers",
    "cached_steps",
    "cfg_cached_steps",
    "clear_buffers",
    "get_calibrators",
    "get_cfg_calibrators",
    "get_current_step",
    "has_calibrators",
    "mark_step_begin",
)
_UNKNOWN = ("pruned_blocks",)


def is_there(denoiser: torch.nn.Module) -> bool:
    """Whether cache-dit is enabled for a denoiser."""
    # ParaAttention, from which it is descended, leaves the first of these marks too.
    marked = bool(vars(denoiser).get("_is_cached")) and not comes_from(denoiser, "para_attn")
    return marked or "_context_manager" in vars(denoiser)


def why_not(denoiser: torch.nn.Module, calls: int) -> str | None:
    """Why cache-dit does not run together with T-GATE on a denoiser, if so."""
    config = getattr(_probe(denoiser), "cache_config", None)
    if config is None or not all(hasattr(config, name) for name in ("enable_separate_cfg", "steps_computation_policy")):
        return (
            f"how it keeps tensors of the batch, which T-GATE halves, is not known here (cache-dit {_version()}); "
            "DBCache of cache-dit 1.5 is"
        )
    if bool(config.enable_separate_cfg) is not (calls > 1):
        kinds = ("one call of the denoiser", "two calls of the denoiser, one after the other")
        return (
            f"guidance of this pipeline is {kinds[calls > 1]}, which enable_separate_cfg={config.enable_separate_cfg} "
            f"contradicts: give DBCacheConfig(enable_separate_cfg={calls > 1})"
        )
    if config.steps_computation_policy == "static":
        return (
            'steps_computation_policy="static" repeats steps by their numbers, and full steps of T-GATE have to be '
            'computed: give "dynamic"'
        )
    return None


class DBCacheAdapter(CacheAdapter):
    """
    The contexts of a denoiser, one for each list of blocks.

    A full step after half steps is computed, so nothing is laid aside of the half that was left out. Calibrators start
    afresh where the batch changes. Where guidance is two calls, they are told apart by counting, so one that is left
    out is counted too.

    Args:
        denoiser (`torch.nn.Module`): The denoiser.
    """

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self._denoiser: Any = denoiser
        self._left_out = -1

    @property
    def contexts(self) -> list[Any]:
        """What has been kept in this call; before the first one there is none."""
        there = self._manager._cached_context_manager
        return [there[name] for name in self._denoiser._context_names if name in there]

    def begin_call(self) -> None:
        """Count from the start."""
        self._begin()

    def end_call(self) -> None:
        """Hold nothing."""
        # It may have been disabled in the call.
        if is_there(self._denoiser):
            self._begin()

    def start(self) -> None:
        """Have the next step computed."""
        for context in self.contexts:
            context.clear_buffers()
            for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
                if calibrator is not None:
                    calibrator.reset_cache()

    def halve(self, kept: int) -> None:
        """Keep the half that runs."""
        if any(context.has_calibrators() for context in self.contexts):
            self.start()
        for context in self.contexts:
            context.buffers, _ = split(context.buffers, kept)

    def double(self) -> None:
        """Have the next step computed."""
        self.start()

    def catch_up(self) -> None:
        """Have both calls of the next step computed."""
        self.start()

    def leave_out(self) -> None:
        """Count the call that is left out."""
        for context in self.contexts:
            context.mark_step_begin()
            self._left_out = context.get_current_step()

    def repeated(self) -> bool:
        """Whether the middle blocks were skipped in the last step, in each of its calls that ran."""
        contexts = self.contexts
        return bool(contexts) and all(self._repeated(context) for context in contexts)

    def _repeated(self, context: Any) -> bool:
        """Whether it was so with one list of blocks."""
        step = context.get_current_step()
        both = bool(context.cache_config.enable_separate_cfg) and step != self._left_out
        return step in context.cached_steps and (not both or step in context.cfg_cached_steps)

    @property
    def _manager(self) -> Any:
        """What has the contexts."""
        return self._denoiser._context_manager

    def _begin(self) -> None:
        """Make the contexts anew."""
        self._left_out = -1
        for context in self.contexts:
            self._manager.reset_context(context.name, *context._init_args, **context._init_kwargs)


def _probe(denoiser: Any) -> Any:
    """A context as the denoiser's manager makes them, if it is of a kind that is known here."""
    manager: Any = getattr(denoiser, "_context_manager", None)
    asked = ("_cached_context_manager", "new_context", "reset_context")
    if not all(hasattr(manager, name) for name in asked) or not hasattr(denoiser, "_context_names"):
        return None
    aside = copy.copy(manager)
    aside._cached_context_manager = {}
    context = aside.new_context(**getattr(denoiser, "_context_kwargs", {}))
    known = all(hasattr(context, name) for name in _NEEDS) and not any(hasattr(context, name) for name in _UNKNOWN)
    return context if known and hasattr(context, "_init_kwargs") else None


def _version() -> str:
    """Which cache-dit is installed."""
    try:
        return importlib.metadata.version("cache-dit")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
