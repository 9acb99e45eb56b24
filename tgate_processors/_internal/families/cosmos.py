"""Cosmos 1, 2 and 2.5: guidance by two calls, of which the difference is added to the conditional one."""

from __future__ import annotations

from typing import Any

import torch

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes


def _cosmos(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes: Shapes = {
        "hidden_states": (batch, config.in_channels, size.frames, size.height, size.width),
        "timestep": (batch, 1, size.frames, 1, 1) if size.given else (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.text_embed_dim),
    }
    if config.concat_padding_mask:
        shapes["padding_mask"] = torch.empty(1, 1, size.height * 8, size.width * 8, device="meta")
    return shapes


_GIVEN = ("Cosmos2VideoToWorldPipeline", "Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline")

COSMOS = (
    Family(
        "CosmosTransformer3DModel",
        "transformer",
        "conditional",
        InputShapes(_cosmos, tokens=512, frames=121, frame_scale=8, given=_GIVEN),
        Layout(calls=2, apart=True, keeps_cross=False, scale_beyond=1.0),
    ),
)
