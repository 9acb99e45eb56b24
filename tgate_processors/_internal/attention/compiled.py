"""Whether a layer is part of compiled code, and whether others can write to its output."""

from __future__ import annotations

from typing import Any

import torch

from .state import Slot


def has_compiled_code(denoiser: Any) -> bool:
    """Whether a denoiser, or some part of it, is compiled."""
    parts = [denoiser, *getattr(denoiser, "_orig_mod", denoiser).modules()]
    return hasattr(denoiser, "_orig_mod") or any(map(_is_compiled, parts))


def output_may_be_mutated(attn: Any, slot: Slot) -> bool:
    """Whether others can write to a layer's output: its hooks, its callers, a processor that is not diffusers' own."""
    hooked = attn._forward_hooks or "forward" in vars(attn) or torch.nn.modules.module._global_forward_hooks
    return bool(hooked) or not slot.is_diffusers


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module was compiled in place, perhaps under an interceptor of calls."""
    found = getattr(module, "_compiled_call_impl", None)
    return getattr(found, "wrapped", found) is not None
