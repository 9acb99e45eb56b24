"""LTX-Video: the latents of a video as one row of tokens."""

from __future__ import annotations

from typing import Any

from ..layout import Layout
from .family import Family, Inputs, InputSize, Shapes


def _ltx(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": (batch, size.frames * size.height * size.width, config.in_channels),
        "encoder_hidden_states": (batch, size.tokens, config.caption_channels),
        "timestep": (batch,),
        "encoder_attention_mask": (batch, size.tokens),
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
    }


LTX = (
    Family(
        "LTXVideoTransformer3DModel",
        "transformer",
        "conditional",
        Inputs(_ltx, tokens=128, frames=161, scale=32, frame_scale=8),
        # Its layers have no flag that says which of them attend to the text.
        Layout(arguments=("video_coords",), cross=("attn2",)),
    ),
)
