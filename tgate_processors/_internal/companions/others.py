"""Caches and patches of others on the same denoiser: found at every call, and refused by name where they do not go."""

from __future__ import annotations

from typing import Any

import torch

from ..schedule import TGateSchedule


def check_others(denoiser: torch.nn.Module, schedule: TGateSchedule, helper: Any = None) -> None:
    """
    Refuse what keeps tensors of the whole batch, or exchanges tokens between the layers.

    Args:
        denoiser (`torch.nn.Module`): The denoiser.
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        helper (`DeepCacheSDHelper`, *optional*): The DeepCache helper that runs in T-GATE's order.

    Raises:
        ValueError: If there is one. The message names it and says what to do.
    """
    inner = getattr(denoiser, "_orig_mod", denoiser)
    _check_cache_dit(inner)
    _check_tome(inner, schedule)
    for module in inner.modules():
        _check_hooks(module)
        if helper is None:
            _check_deepcache(module)


def has_cache_dit(pipe: Any) -> bool:
    """Whether cache-dit has wrapped the call of the class that a gated pipeline has for the time being."""
    return "_original_call" in vars(type(pipe))


def _check_hooks(module: torch.nn.Module) -> None:
    """The stateful hooks of diffusers' hook registry."""
    registry = vars(module).get("_diffusers_hook")
    for name, hook in getattr(registry, "hooks", {}).items():
        if getattr(hook, "_is_stateful", False):
            raise ValueError(
                f"T-GATE cannot run beside {type(hook).__name__} ({name!r}) on the same denoiser: that cache keeps "
                "tensors of the whole batch, and T-GATE halves it. Take it out (disable_cache() where the model has "
                f"it, else HookRegistry's remove_hook({name!r}) on each module), or call remove_tgate(pipe)."
            )


def _check_cache_dit(denoiser: torch.nn.Module) -> None:
    """The package cache-dit."""
    if vars(denoiser).get("_is_cached") or "_context_manager" in vars(denoiser):
        raise ValueError(
            "T-GATE cannot run beside cache-dit on the same denoiser: it keeps residuals of the whole batch, and "
            "T-GATE halves it. Call cache_dit.disable_cache(pipe), or remove_tgate(pipe)."
        )


def _check_tome(denoiser: torch.nn.Module, schedule: TGateSchedule) -> None:
    """The package tomesd, which merges other tokens in every step."""
    # `tomesd.remove_patch` leaves the settings behind.
    patched = (module for module in denoiser.modules() if type(module).__name__ == "ToMeBlock")
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


def _check_deepcache(module: torch.nn.Module) -> None:
    """A DeepCache helper that the user has enabled and not handed over."""
    forward = vars(module).get("forward")
    if (getattr(forward, "__module__", None) or "").split(".")[0] == "DeepCache":
        raise ValueError(
            "T-GATE found DeepCache enabled on the same denoiser: it keeps tensors of the whole batch, and has to "
            "start afresh where T-GATE halves it. Hand it over, apply_tgate(pipe, ..., deepcache=helper), or call "
            "helper.disable()."
        )
