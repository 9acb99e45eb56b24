"""cache-dit's DBCache: if the output of the first blocks has changed little, the middle ones are skipped."""

from __future__ import annotations

import copy
import importlib.metadata
from typing import Any

import torch

from .adapter import CacheAdapter
from .forward_origin import comes_from
from .split import split_halves

# The attributes of a supported context. `pruned_blocks` is an attribute of another kind of cache.
_REQUIRED = (
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
_UNSUPPORTED = ("pruned_blocks",)


def is_enabled(denoiser: torch.nn.Module) -> bool:
    """Whether cache-dit is enabled for a denoiser."""
    # ParaAttention, from which it is descended, leaves the first of these marks too.
    marked = bool(vars(denoiser).get("_is_cached")) and not comes_from(denoiser, "para_attn")
    return marked or "_context_manager" in vars(denoiser)


def incompatibility(denoiser: torch.nn.Module, calls_per_step: int) -> str | None:
    """Why cache-dit cannot run together with T-GATE on a denoiser, if it cannot."""
    config = getattr(_sample_context(denoiser), "cache_config", None)
    if config is None or not all(hasattr(config, name) for name in ("enable_separate_cfg", "steps_computation_policy")):
        return (
            f"how it keeps tensors of the batch, which T-GATE halves, is not known here (cache-dit {_version()}); "
            "DBCache of cache-dit 1.5 is"
        )
    if bool(config.enable_separate_cfg) is not (calls_per_step > 1):
        kinds = ("one call of the denoiser", "two calls of the denoiser, one after the other")
        return (
            f"guidance of this pipeline is {kinds[calls_per_step > 1]}, which "
            f"enable_separate_cfg={config.enable_separate_cfg} contradicts: pass "
            f"DBCacheConfig(enable_separate_cfg={calls_per_step > 1})"
        )
    if config.steps_computation_policy == "static":
        return (
            'steps_computation_policy="static" repeats steps by their numbers, and full steps of T-GATE have to be '
            'computed: pass "dynamic"'
        )
    return None


class DBCacheAdapter(CacheAdapter):
    """
    Adapts the contexts of a denoiser, one for each list of blocks.

    A full step after half steps is computed, so nothing of the skipped half is stashed. Calibrators are reset where the
    batch changes. With sequential CFG, cache-dit tells the two calls apart by counting, so skipped ones are counted
    too.

    Args:
        denoiser (`torch.nn.Module`): The denoiser.
    """

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self._denoiser: Any = denoiser
        self._skipped_step = -1

    @property
    def contexts(self) -> list[Any]:
        """The contexts of this call; before the first forward there are none."""
        there = self._manager._cached_context_manager
        return [there[name] for name in self._denoiser._context_names if name in there]

    def begin_call(self) -> None:
        """Count from the start."""
        self._begin()

    def end_call(self) -> None:
        """Release cached tensors, if the cache was not disabled in the call."""
        if is_enabled(self._denoiser):
            self._begin()

    def reset(self) -> None:
        """Have the next step computed."""
        for context in self.contexts:
            context.clear_buffers()
            for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
                if calibrator is not None:
                    calibrator.reset_cache()

    def on_half_batch(self, active_half: int) -> None:
        """Leave the active half in the cache."""
        if any(context.has_calibrators() for context in self.contexts):
            self.reset()
        for context in self.contexts:
            context.buffers, _ = split_halves(context.buffers, active_half)

    def on_full_batch(self) -> None:
        """Have the next step computed."""
        self.reset()

    def on_resume_second_call(self) -> None:
        """Have both calls of the next step computed."""
        self.reset()

    def on_skip_second_call(self) -> None:
        """Count the skipped call."""
        for context in self.contexts:
            context.mark_step_begin()
            self._skipped_step = context.get_current_step()

    def was_hit(self) -> bool:
        """Whether the middle blocks were skipped in the last step, in each of its calls that ran."""
        contexts = self.contexts
        return bool(contexts) and all(self._was_hit(context) for context in contexts)

    def _was_hit(self, context: Any) -> bool:
        """Whether the middle blocks of one list were skipped in the last step."""
        step = context.get_current_step()
        both = bool(context.cache_config.enable_separate_cfg) and step != self._skipped_step
        return step in context.cached_steps and (not both or step in context.cfg_cached_steps)

    @property
    def _manager(self) -> Any:
        """cache-dit's manager of the contexts."""
        return self._denoiser._context_manager

    def _begin(self) -> None:
        """Make the contexts anew."""
        self._skipped_step = -1
        for context in self.contexts:
            self._manager.reset_context(context.name, *context._init_args, **context._init_kwargs)


def _sample_context(denoiser: Any) -> Any:
    """A context made by the denoiser's manager, if it is of a supported kind."""
    manager: Any = getattr(denoiser, "_context_manager", None)
    asked = ("_cached_context_manager", "new_context", "reset_context")
    if not all(hasattr(manager, name) for name in asked) or not hasattr(denoiser, "_context_names"):
        return None
    aside = copy.copy(manager)
    aside._cached_context_manager = {}
    context = aside.new_context(**getattr(denoiser, "_context_kwargs", {}))
    known = all(hasattr(context, name) for name in _REQUIRED) and not any(
        hasattr(context, name) for name in _UNSUPPORTED
    )
    return context if known and hasattr(context, "_init_kwargs") else None


def _version() -> str:
    """The version of cache-dit that is installed."""
    try:
        return importlib.metadata.version("cache-dit")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
