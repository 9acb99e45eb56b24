"""All families, and which of them a denoiser is of."""

from __future__ import annotations

import torch

from .cross_attention import CROSS_ATTENTION
from .family import Family
from .joint import JOINT
from .unets import UNETS

FAMILIES: tuple[Family, ...] = (*UNETS, *CROSS_ATTENTION, *JOINT)


def family_of(denoiser: torch.nn.Module) -> Family | None:
    """The family of a denoiser, if it is known."""
    # `torch.compile(pipe.unet)` wraps the module.
    names = [base.__name__ for base in type(getattr(denoiser, "_orig_mod", denoiser)).__mro__]
    return next((family for family in FAMILIES if family.denoiser_class in names), None)


def supported_names(*, joint: bool) -> str:
    """The denoisers that are known, for messages; those with joint attention where they can be gated."""
    return ", ".join(family.denoiser_class for family in FAMILIES if joint or not family.layout.joint)
