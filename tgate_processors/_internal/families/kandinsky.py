"""Kandinsky 3: a UNet whose blocks list their attention. Kandinsky 5: guidance by two calls."""

from __future__ import annotations

from typing import Any

import torch

from ..layout import Layout
from .family import Family, Inputs, InputSize, Shapes


def _kandinsky3(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "sample": (batch, config.in_channels, size.height, size.width),
        "timestep": (),
        "encoder_hidden_states": (batch, size.tokens, config.encoder_hid_dim),
        "encoder_attention_mask": (batch, size.tokens),
    }


def _kandinsky5(config: Any, batch: int, size: InputSize) -> Shapes:
    # Beside the latents stand those of a given picture, and which frames are given.
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    _, height, width = config.patch_size
    sides = (size.frames, size.height // height, size.width // width)
    return {
        "hidden_states": (batch, size.frames, size.height, size.width, channels),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.in_text_dim),
        "pooled_projections": (batch, config.in_text_dim2),
        "visual_rope_pos": [torch.empty(side, dtype=torch.long, device="meta") for side in sides],
        "text_rope_pos": torch.empty(size.tokens, dtype=torch.long, device="meta"),
    }


KANDINSKY = (
    Family(
        "Kandinsky3UNet",
        "unet",
        "conditional",
        Inputs(_kandinsky3, tokens=128),
        Layout(
            # All its layers say that they are cross-attention.
            cross=tuple(f"attentions.{place}.attention" for place in range(1, 10)),
            # It pools the text for the embedding of the time.
            never=("add_time_condition",),
            scale_beyond=1.0,
        ),
    ),
    Family(
        "Kandinsky5Transformer3DModel",
        "transformer",
        "conditional",
        Inputs(_kandinsky5, tokens=512, frames=121, frame_scale=4),
        Layout(
            cross=("cross_attention",),
            # The text is refined here, in a small part of the time.
            never=("text_transformer_blocks",),
            calls=2,
            keeps_cross=False,
        ),
        # They tell their steps, and guide where `guidance_scale` is above 1.
        untold=dict.fromkeys(f"Kandinsky5{kind}Pipeline" for kind in ("T2V", "I2V", "T2I", "I2I")),
    ),
)
