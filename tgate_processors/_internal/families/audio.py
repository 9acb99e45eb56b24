"""Stable Audio: text and duration in one cross-attention, the duration besides."""

from __future__ import annotations

from typing import Any

import torch

from ..layout import Layout
from .family import Family, Inputs, InputSize, Shapes


def _stable_audio(config: Any, batch: int, size: InputSize) -> Shapes:
    # The duration stands behind the text, by its begin and its end, and before the latents, as one token more.
    table = torch.empty(config.sample_size + 1, config.attention_head_dim // 2, device="meta")
    return {
        "hidden_states": (batch, config.in_channels, config.sample_size),
        "timestep": (1,),
        "encoder_hidden_states": (batch, size.tokens + 2, config.cross_attention_input_dim),
        "global_hidden_states": (batch, 1, config.global_states_input_dim),
        "rotary_embedding": [table, table],
    }


AUDIO = (
    Family(
        "StableAudioDiTModel",
        "transformer",
        "conditional",
        Inputs(_stable_audio, tokens=128, sized=False),
        # Without a negative prompt the unconditional half attends to nothing: its output is zero, and a mean would be
        # half of the text.
        Layout(arguments=("global_hidden_states",), mean=False),
        untold={"StableAudioPipeline": None},
    ),
)
