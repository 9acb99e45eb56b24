"""Sana: a small latent, linear self-attention, and cross-attention as the only one whose cost is quadratic."""

from __future__ import annotations

from typing import Any

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes


def _sana(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes: Shapes = {
        "hidden_states": (batch, config.in_channels, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.caption_channels),
        "encoder_attention_mask": (batch, size.tokens),
    }
    if getattr(config, "guidance_embeds", False):
        shapes["guidance"] = (batch,)
    return shapes


def _sana_video(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes = _sana(config, batch, size)
    if size.given:
        sides = (size.frames, size.height, size.width)
        shapes["timestep"] = (batch, 1, *(side // patch for side, patch in zip(sides, config.patch_size, strict=True)))
    return shapes | {"hidden_states": (batch, config.in_channels, size.frames, size.height, size.width)}


SANA = (
    Family(
        "SanaTransformer2DModel",
        "transformer",
        "conditional",
        InputShapes(_sana, tokens=300, scale=32),
        Layout(residuals={"controlnet_block_samples": None}),
    ),
    Family(
        "SanaVideoTransformer3DModel",
        "transformer",
        "conditional",
        InputShapes(_sana_video, tokens=300, frames=81, frame_scale=4, given=("SanaImageToVideoPipeline",)),
        Layout(keeps_cross=False),
    ),
    # It asks for the precision of its device in every forward, which the meta device does not have. Its self-attention
    # is no attention layer of diffusers'.
    Family(
        "SanaWMTransformer3DModel",
        "transformer",
        "conditional",
        None,
        Layout(arguments=("mask", "camera_conditions", "chunk_plucker"), cross=("cross_attn",), keeps_cross=False),
    ),
)
