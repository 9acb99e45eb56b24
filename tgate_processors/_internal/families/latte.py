"""Latte and Allegro: transformers of videos by frames, whose layers have to be set one by one."""

from __future__ import annotations

from typing import Any

import torch

from .family import Family, InputShapes, InputSize, Shapes


def _latte(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": (batch, config.in_channels, size.frames, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.caption_channels),
    }


def _allegro(config: Any, batch: int, size: InputSize) -> Shapes:
    patches = size.frames * size.height * size.width // (config.patch_size_t * config.patch_size**2)
    # Tables of cosines and sines for every axis, and the places of the patches on it.
    table = torch.empty(max(size.frames, size.height, size.width), config.attention_head_dim // 3, device="meta")
    places = torch.empty(1, patches, dtype=torch.long, device="meta")
    return _latte(config, batch, size) | {
        "encoder_hidden_states": (batch, 1, size.tokens, config.caption_channels),
        "encoder_attention_mask": (batch, size.tokens),
        "image_rotary_emb": [[[table, table]] * 3, [places] * 3],
    }


LATTE = (
    Family("LatteTransformer3DModel", "transformer", "conditional", InputShapes(_latte, tokens=120, frames=16)),
    Family(
        "AllegroTransformer3DModel",
        "transformer",
        "conditional",
        InputShapes(_allegro, tokens=512, frames=88, frame_scale=4),
        # It tells its steps, but keeps its guidance to itself.
        pipelines_without_callback={"AllegroPipeline": None},
    ),
)
