"""Lumina-Next: the conditional half first, and layers that give out their heads one by one."""

from __future__ import annotations

from typing import Any

import torch

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes


def _lumina(config: Any, batch: int, size: InputSize) -> Shapes:
    # A table of angles for every place of the picture, of which the model takes what it needs.
    side = 384
    half = config.hidden_size // config.num_attention_heads // 2
    return {
        "hidden_states": (batch, config.in_channels, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.cross_attention_dim),
        "encoder_mask": (batch, size.tokens),
        "image_rotary_emb": torch.empty(side, side, half, dtype=torch.complex64, device="meta"),
        "cross_attention_kwargs": {},
    }


LUMINA = (
    Family(
        "LuminaNextDiT2DModel",
        "transformer",
        "conditional",
        InputShapes(_lumina, tokens=256),
        Layout(arguments=("encoder_mask",), conditional_first=True),
    ),
)
