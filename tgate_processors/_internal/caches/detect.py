"""Caches and patches of others on the same denoiser: found at every call, and refused by name where they do not go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import diffusers
import torch

from ..plan.schedule import TGateSchedule
from . import cache_dit
from .adapter import CacheAdapter
from .diffusers_hooks import DiffusersHookAdapter, stateful_hooks
from .faster_cache import FasterCacheAdapter
from .first_block_cache import FirstBlockCacheAdapter
from .mag_cache import MagCacheAdapter
from .pyramid_attention_broadcast import PyramidAttentionBroadcastAdapter
from .sea_cache import SeaCacheAdapter
from .taylorseer import TaylorSeerAdapter

_KNOWN: tuple[type[DiffusersHookAdapter], ...] = (
    FirstBlockCacheAdapter,
    TaylorSeerAdapter,
    MagCacheAdapter,
    PyramidAttentionBroadcastAdapter,
    FasterCacheAdapter,
    SeaCacheAdapter,
)


def detect_caches(
    denoiser: torch.nn.Module,
    schedule: TGateSchedule,
    helper: Any = None,
    *,
    calls: int = 1,
    alone: str | None = None,
    gates_cross: bool = True,
    cfg_half: str | None = None,
) -> list[CacheAdapter]:
    """
    Find the caches on a denoiser, and refuse what keeps tensors of the whole batch and is not supported, or exchanges
    tokens between the layers.

    Args:
        denoiser (`torch.nn.Module`): The denoiser.
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        helper (`DeepCacheSDHelper`, *optional*): The DeepCache helper that runs in T-GATE's order.
        calls (`int`, *optional*, defaults to 1): Calls of the denoiser that guidance is made of.
        alone (`str`, *optional*): Why no cache of diffusers runs together with T-GATE here, if none does.
        gates_cross (`bool`, *optional*, defaults to `True`): Whether cross-attention is gated.
        cfg_half (`str`, *optional*): The half of guidance that was asked for.

    Returns:
        `list` of `CacheAdapter`: Those that run together with T-GATE.

    Raises:
        ValueError: If one does not. The message names it and says what to do.
    """
    inner = getattr(denoiser, "_orig_mod", denoiser)
    modules = list(inner.modules())
    if cache_dit.is_there(inner):
        _check_cache_dit(inner, schedule, calls, alone)
    _check_tome(modules, schedule)
    _check_hypertile(modules, schedule)
    hooks = list(stateful_hooks(modules))
    for _, name, hook in hooks:
        why = (
            FasterCacheAdapter.why_not(schedule, gates_cross=gates_cross, cfg_half=cfg_half)
            if FasterCacheAdapter.knows(hook)
            else None
        )
        _check_hook(name, hook, schedule, calls, alone or why)
    for module in modules if helper is None else ():
        _check_deepcache(module)
    found = [(kind(hook), module) for module, _, hook in hooks if (kind := _kind_of(hook)) is not None]
    hooked = {weight for _, module in found for weight in module.parameters()}
    is_most = bool(found) and 2 * _numel(hooked) > _numel(inner.parameters())
    for adapter, _ in found:
        adapter.is_most = is_most
    others: list[CacheAdapter] = [adapter for adapter, _ in found]
    return [*others, cache_dit.DBCacheAdapter(inner)] if cache_dit.is_there(inner) else others


def check_before(module: torch.nn.Module) -> None:
    """
    Refuse every cache on what the pipeline calls before its denoiser: it is not told where the batch changes.

    Args:
        module (`torch.nn.Module`): A ControlNet.

    Raises:
        ValueError: If there is one. The message names it and says what to do.
    """
    inner = getattr(module, "_orig_mod", module)
    found = [type(hook).__name__ for _, _, hook in stateful_hooks(inner.modules())]
    if cache_dit.is_there(inner):
        found.append("cache-dit")
    if found:
        raise ValueError(
            f"T-GATE cannot run beside {found[0]} on {type(inner).__name__}: it keeps tensors of the batch or counts "
            "calls, T-GATE halves the batch and leaves calls out, and only caches on the denoiser are told. Take it "
            "out, or call remove_tgate(pipe)."
        )


def _numel(weights: Iterable[torch.nn.Parameter]) -> int:
    """Numbers in these weights."""
    return sum(weight.numel() for weight in weights)


def _kind_of(hook: Any) -> type[DiffusersHookAdapter] | None:
    """What a hook is known as."""
    return next((kind for kind in _KNOWN if kind.knows(hook)), None)


def _check_hook(name: str, hook: Any, schedule: TGateSchedule, calls: int, alone: str | None) -> None:
    """A stateful hook of diffusers' hook registry."""
    subject = f"{type(hook).__name__} ({name!r})"
    kind = _kind_of(hook)
    if alone is None and kind is not None and calls not in kind.calls:
        alone = (
            "guidance of this pipeline is two calls of the denoiser, and what that cache keeps of a call that T-GATE "
            "leaves out is not known here"
            if calls > 1
            else "guidance of this pipeline is in one batch, and what that cache keeps of it is not known here"
        )
    if kind is None:
        alone = (
            "how that cache keeps tensors of the batch, which T-GATE halves, is not known here "
            f"(diffusers {diffusers.__version__})"
        )
    if alone is not None:
        raise ValueError(
            f"T-GATE cannot run beside {subject} on the same denoiser: {alone}. Take it out (disable_cache() where the "
            f"model has it, else HookRegistry's remove_hook({name!r}) on each module), or call remove_tgate(pipe)."
        )
    _check_intervals(subject, schedule)


def _check_cache_dit(denoiser: torch.nn.Module, schedule: TGateSchedule, calls: int, alone: str | None) -> None:
    """The package cache-dit."""
    alone = alone or cache_dit.why_not(denoiser, calls)
    if alone is not None:
        raise ValueError(
            f"T-GATE cannot run beside cache-dit on the same denoiser: {alone}. Or call cache_dit.disable_cache(pipe), "
            "or remove_tgate(pipe)."
        )
    _check_intervals("cache-dit", schedule)


def _check_intervals(subject: str, schedule: TGateSchedule) -> None:
    """Refuse to reuse self-attention beside what skips whole blocks."""
    if max(schedule.sp_interval, schedule.fi_interval) > 1:
        raise ValueError(
            f"T-GATE cannot reuse self-attention (sp_interval={schedule.sp_interval}, "
            f"fi_interval={schedule.fi_interval}) beside {subject}, which does that itself. Leave both intervals at 1, "
            "or take the cache out."
        )


def _check_tome(modules: Sequence[torch.nn.Module], schedule: TGateSchedule) -> None:
    """The package tomesd, which merges other tokens in every step."""
    # `tomesd.remove_patch` leaves the settings behind.
    patched = (module for module in modules if type(module).__name__ == "ToMeBlock")
    args = getattr(next(patched, None), "_tome_info", {}).get("args", {})
    if args.get("merge_crossattn"):
        raise ValueError(
            "T-GATE cannot run beside ToMe with merge_crossattn=True: each step merges other tokens, so what "
            "cross-attention gave in one step does not fit the next. Leave merge_crossattn at False, or call "
            "tomesd.remove_patch(pipe)."
        )
    if args.get("merge_attn") and max(schedule.sp_interval, schedule.fi_interval) > 1:
        raise ValueError(
            f"T-GATE cannot reuse self-attention (sp_interval={schedule.sp_interval}, "
            f"fi_interval={schedule.fi_interval}) beside ToMe: each step merges other tokens. Leave both intervals at "
            "1, or call tomesd.remove_patch(pipe)."
        )


def _check_hypertile(modules: Sequence[torch.nn.Module], schedule: TGateSchedule) -> None:
    """The package HyperTile, which splits the pictures into other tiles in every step."""
    tiled = any("_split_sizes" in vars(module) for module in modules)
    if tiled and max(schedule.sp_interval, schedule.fi_interval) > 1:
        raise ValueError(
            f"T-GATE cannot reuse self-attention (sp_interval={schedule.sp_interval}, "
            f"fi_interval={schedule.fi_interval}) beside HyperTile: each step has other tiles. Leave both intervals at "
            "1, or leave the context of split_attention."
        )


def _check_deepcache(module: torch.nn.Module) -> None:
    """A DeepCache helper that the user has enabled and not handed over."""
    forward = vars(module).get("forward")
    if (getattr(forward, "__module__", None) or "").split(".")[0] == "DeepCache":
        raise ValueError(
            "T-GATE found DeepCache enabled on the same denoiser: it keeps tensors of the whole batch, and has to "
            "start afresh where T-GATE halves it. Hand it over, apply_tgate(pipe, ..., deepcache=helper), or call "
            "helper.disable()."
        )
