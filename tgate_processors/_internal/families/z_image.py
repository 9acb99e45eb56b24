"""Z-Image: joint attention, and a batch that is a list with an entry for each sample."""

from __future__ import annotations

from typing import Any

import torch

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes


def _z_image(config: Any, batch: int, size: InputSize) -> Shapes:
    latents: Any = torch.empty(config.in_channels, 1, size.height, size.width, device="meta")
    text: Any = torch.empty(size.tokens, config.cap_feat_dim, device="meta")
    more: Shapes = {}
    if config.siglip_feat_dim is not None:
        # Omni, without a picture.
        latents, text = [latents], [text]
        more = {"siglip_feats": [None] * batch, "image_noise_mask": [[1]] * batch}
    return {"x": [latents] * batch, "t": (batch,), "cap_feats": [text] * batch, **more}


Z_IMAGE = (
    Family(
        "ZImageTransformer2DModel",
        "transformer",
        "conditional",
        InputShapes(_z_image, tokens=512),
        Layout(
            joint=True,
            keeps_cross=False,
            arguments=("t",),
            entries=("x", "cap_feats", "control_context", "siglip_feats", "image_noise_mask"),
            residuals={"controlnet_block_samples": None},
            conditional_first=True,
            scale_beyond=1.0,
        ),
    ),
)
