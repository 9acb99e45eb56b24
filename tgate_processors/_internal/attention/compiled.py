"""What can be seen of a layer from outside: whether it lies in compiled code, and who can write to its output."""

from __future__ import annotations

from typing import Any

import torch

from .state import Slot


def lies_in_compiled_code(denoiser: Any) -> bool:
    """Whether a denoiser, or some part of it, is compiled."""
    parts = [denoiser, *getattr(denoiser, "_orig_mod", denoiser).modules()]
    return hasattr(denoiser, "_orig_mod") or any(map(_is_compiled, parts))


def is_exposed(attn: Any, slot: Slot) -> bool:
    """Whether somebody else can write to what a layer gives out: its hooks, its callers, its own processor."""
    hooked = attn._forward_hooks or "forward" in vars(attn) or torch.nn.modules.module._global_forward_hooks
    return bool(hooked) or not slot.own


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module was compiled in place, perhaps behind what a run has put there to skip calls."""
    found = getattr(module, "_compiled_call_impl", None)
    return getattr(found, "behind", found) is not None
