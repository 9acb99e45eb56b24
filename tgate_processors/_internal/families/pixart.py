"""PixArt: text in one stream, T5, a learned variance."""

from __future__ import annotations

from typing import Any

from .family import Family, InputShapes, InputSize, Shapes


def _pixart(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": (batch, config.in_channels, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.caption_channels),
        "encoder_attention_mask": (batch, size.tokens),
        # Unused by those that have no condition on size.
        "added_cond_kwargs": {"resolution": (batch, 2), "aspect_ratio": (batch, 1)},
    }


PIXART = (
    Family(
        "PixArtTransformer2DModel",
        "transformer",
        "unconditional",
        InputShapes(_pixart, tokens=120),
        pipelines_without_callback=dict.fromkeys(
            ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "PixArtSigmaPAGPipeline")
        ),
    ),
)
