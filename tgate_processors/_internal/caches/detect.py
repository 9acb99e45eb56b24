"""Caches and patches of others on the same denoiser: found at every call, and refused by name if not supported."""

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

_ADAPTERS: tuple[type[DiffusersHookAdapter], ...] = (
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
    deepcache_helper: Any = None,
    *,
    calls_per_step: int = 1,
    reason: str | None = None,
    gates_cross: bool = True,
    cfg_half: str | None = None,
) -> list[CacheAdapter]:
    """
    Find the caches on a denoiser. Refuse those that keep tensors of the whole batch and are not supported, and patches
    that exchange tokens between the layers.

    Args:
        denoiser (`torch.nn.Module`): The denoiser.
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        deepcache_helper (`DeepCacheSDHelper`, *optional*): The DeepCache helper that runs in T-GATE's order.
        calls_per_step (`int`, *optional*, defaults to 1): Calls of the denoiser that guidance is made of.
        reason (`str`, *optional*): Why no cache of diffusers can run together with T-GATE here, if none can.
        gates_cross (`bool`, *optional*, defaults to `True`): Whether cross-attention is gated.
        cfg_half (`str`, *optional*): The active half, if the user has chosen it.

    Returns:
        `list` of `CacheAdapter`: Those that run together with T-GATE.

    Raises:
        ValueError: If one cannot. The message names it and says what to do.
    """
    inner = getattr(denoiser, "_orig_mod", denoiser)
    modules = list(inner.modules())
    if cache_dit.is_enabled(inner):
        _check_cache_dit(inner, schedule, calls_per_step, reason)
    _check_tome(modules, schedule)
    _check_hypertile(modules, schedule)
    hooks = list(stateful_hooks(modules))
    for _, name, hook in hooks:
        why = (
            FasterCacheAdapter.incompatibility(schedule, gates_cross=gates_cross, cfg_half=cfg_half)
            if FasterCacheAdapter.matches(hook)
            else None
        )
        _check_hook(name, hook, schedule, calls_per_step, reason or why)
    for module in modules if deepcache_helper is None else ():
        _check_deepcache(module)
    found = [(kind(hook), module) for module, _, hook in hooks if (kind := _adapter_for(hook)) is not None]
    hooked = {weight for _, module in found for weight in module.parameters()}
    covers_most_weights = bool(found) and 2 * _numel(hooked) > _numel(inner.parameters())
    for adapter, _ in found:
        adapter.covers_most_weights = covers_most_weights
    others: list[CacheAdapter] = [adapter for adapter, _ in found]
    return [*others, cache_dit.DBCacheAdapter(inner)] if cache_dit.is_enabled(inner) else others


def reject_caches_on_controlnet(module: torch.nn.Module) -> None:
    """
    Refuse every cache on a ControlNet, which is not told where the batch changes.

    Args:
        module (`torch.nn.Module`): A ControlNet.

    Raises:
        ValueError: If there is one. The message names it and says what to do.
    """
    inner = getattr(module, "_orig_mod", module)
    found = [type(hook).__name__ for _, _, hook in stateful_hooks(inner.modules())]
    if cache_dit.is_enabled(inner):
        found.append("cache-dit")
    if found:
        raise ValueError(
            f"T-GATE cannot run together with {found[0]} on {type(inner).__name__}: it keeps tensors of the batch or "
            "counts calls, T-GATE halves the batch and leaves calls out, and only caches on the denoiser are told. "
            "Take it out, or call remove_tgate(pipe)."
        )


def _numel(weights: Iterable[torch.nn.Parameter]) -> int:
    """How many numbers these weights have."""
    return sum(weight.numel() for weight in weights)


def _adapter_for(hook: Any) -> type[DiffusersHookAdapter] | None:
    """The adapter for a hook, if there is one."""
    return next((kind for kind in _ADAPTERS if kind.matches(hook)), None)


def _check_hook(name: str, hook: Any, schedule: TGateSchedule, calls_per_step: int, reason: str | None) -> None:
    """Refuse a stateful hook of diffusers' registry that is not supported, and settings that it contradicts."""
    subject = f"{type(hook).__name__} ({name!r})"
    kind = _adapter_for(hook)
    if reason is None and kind is not None and calls_per_step not in kind.supported_calls_per_step:
        reason = (
            "guidance of this pipeline is two calls of the denoiser, and what that cache keeps of a call that T-GATE "
            "leaves out is not known here"
            if calls_per_step > 1
            else "guidance of this pipeline is in one batch, and what that cache keeps of it is not known here"
        )
    if kind is None:
        reason = (
            "how that cache keeps tensors of the batch, which T-GATE halves, is not known here "
            f"(diffusers {diffusers.__version__})"
        )
    if reason is not None:
        raise ValueError(
            f"T-GATE cannot run together with {subject} on the same denoiser: {reason}. Take it out (disable_cache() "
            f"where the model has it, else HookRegistry's remove_hook({name!r}) on each module), or call "
            "remove_tgate(pipe)."
        )
    _check_intervals(subject, schedule)


def _check_cache_dit(
    denoiser: torch.nn.Module, schedule: TGateSchedule, calls_per_step: int, reason: str | None
) -> None:
    """Refuse the package cache-dit where it is not supported."""
    reason = reason or cache_dit.incompatibility(denoiser, calls_per_step)
    if reason is not None:
        raise ValueError(
            f"T-GATE cannot run together with cache-dit on the same denoiser: {reason}. Or call "
            "cache_dit.disable_cache(pipe), or remove_tgate(pipe)."
        )
    _check_intervals("cache-dit", schedule)


def _check_intervals(subject: str, schedule: TGateSchedule) -> None:
    """Refuse to reuse self-attention together with a cache that skips whole blocks."""
    if max(schedule.sp_interval, schedule.fi_interval) > 1:
        raise ValueError(
            f"T-GATE cannot reuse self-attention (sp_interval={schedule.sp_interval}, "
            f"fi_interval={schedule.fi_interval}) together with {subject}, which does that itself. Leave both "
            "intervals at 1, or take the cache out."
        )


def _check_tome(modules: Sequence[torch.nn.Module], schedule: TGateSchedule) -> None:
    """Refuse settings that the package tomesd contradicts, which merges other tokens in every step."""
    # `tomesd.remove_patch` leaves the settings behind.
    patched = (module for module in modules if type(module).__name__ == "ToMeBlock")
    args = getattr(next(patched, None), "_tome_info", {}).get("args", {})
    if args.get("merge_crossattn"):
        raise ValueError(
            "T-GATE cannot run together with ToMe with merge_crossattn=True: each step merges other tokens, so what "
            "cross-attention gave in one step does not fit the next. Leave merge_crossattn at False, or call "
            "tomesd.remove_patch(pipe)."
        )
    if args.get("merge_attn") and max(schedule.sp_interval, schedule.fi_interval) > 1:
        raise ValueError(
            f"T-GATE cannot reuse self-attention (sp_interval={schedule.sp_interval}, "
            f"fi_interval={schedule.fi_interval}) together with ToMe: each step merges other tokens. Leave both "
            "intervals at 1, or call tomesd.remove_patch(pipe)."
        )


def _check_hypertile(modules: Sequence[torch.nn.Module], schedule: TGateSchedule) -> None:
    """Refuse settings that the package HyperTile contradicts, which uses other tiles in every step."""
    tiled = any("_split_sizes" in vars(module) for module in modules)
    if tiled and max(schedule.sp_interval, schedule.fi_interval) > 1:
        raise ValueError(
            f"T-GATE cannot reuse self-attention (sp_interval={schedule.sp_interval}, "
            f"fi_interval={schedule.fi_interval}) together with HyperTile: each step has other tiles. Leave both "
            "intervals at 1, or leave the context of split_attention."
        )


def _check_deepcache(module: torch.nn.Module) -> None:
    """Refuse a DeepCache helper that is enabled but was not passed to `apply_tgate`."""
    forward = vars(module).get("forward")
    if (getattr(forward, "__module__", None) or "").split(".")[0] == "DeepCache":
        raise ValueError(
            "T-GATE found DeepCache enabled on the same denoiser: it keeps tensors of the whole batch, and has to "
            "start afresh where T-GATE halves it. Hand it over, apply_tgate(pipe, ..., deepcache=helper), or call "
            "helper.disable()."
        )
