"""HunyuanDiT: two texts in one cross-attention, pooled text and sizes besides, a learned variance."""

from __future__ import annotations

from typing import Any

import torch

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes


def _hunyuan(config: Any, batch: int, size: InputSize) -> Shapes:
    # As many tokens as there is padding for.
    tokens, tokens_t5 = config.text_len, config.text_len_t5
    patches = size.height * size.width // config.patch_size**2
    table = torch.empty(patches, config.attention_head_dim, device="meta")
    return {
        "hidden_states": (batch, config.in_channels, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, tokens, config.cross_attention_dim),
        "text_embedding_mask": (batch, tokens),
        "encoder_hidden_states_t5": (batch, tokens_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": (batch, tokens_t5),
        "image_meta_size": (batch, 6),
        "style": torch.empty(batch, dtype=torch.long, device="meta"),
        "image_rotary_emb": [table, table],
    }


_BATCH = ("text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size", "style")

HUNYUAN = (
    Family(
        "HunyuanDiT2DModel",
        "transformer",
        "conditional",
        InputShapes(_hunyuan, tokens=77, text=False),
        Layout(arguments=_BATCH, residuals={"controlnet_block_samples": None}),
    ),
)
