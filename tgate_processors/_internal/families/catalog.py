"""All families, and which of them a denoiser is of."""

from __future__ import annotations

import torch

from .audio import AUDIO
from .cosmos import COSMOS
from .family import Family
from .hunyuan import HUNYUAN
from .joint import JOINT
from .kandinsky import KANDINSKY
from .latte import LATTE
from .ltx import LTX
from .lumina import LUMINA
from .pictures import PICTURES
from .pixart import PIXART
from .sana import SANA
from .unets import UNETS
from .wan import WAN
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    *UNETS,
    *PIXART,
    *SANA,
    *LTX,
    *HUNYUAN,
    *LATTE,
    *LUMINA,
    *KANDINSKY,
    *AUDIO,
    *WAN,
    *COSMOS,
    *JOINT,
    *Z_IMAGE,
    *PICTURES,
)


def family_of(denoiser: torch.nn.Module) -> Family | None:
    """The family of a denoiser, if it is known."""
    # `torch.compile(pipe.unet)` wraps the module.
    names = [base.__name__ for base in type(getattr(denoiser, "_orig_mod", denoiser)).__mro__]
    return next((family for family in FAMILIES if family.denoiser_class in names), None)


def known(*, joint: bool = False) -> str:
    """The denoisers that are known, for messages; those with joint attention only if guidance alone is gated."""
    return ", ".join(family.denoiser_class for family in FAMILIES if joint or not family.layout.joint)
