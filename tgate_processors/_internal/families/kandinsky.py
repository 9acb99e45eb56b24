"""Kandinsky 3: a UNet whose blocks keep their attention in one list, self-attention first."""

from __future__ import annotations

from typing import Any

from ..layout import Layout
from .family import Family, Inputs, InputSize, Shapes


def _kandinsky3(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "sample": (batch, config.in_channels, size.height, size.width),
        "timestep": (),
        "encoder_hidden_states": (batch, size.tokens, config.encoder_hid_dim),
        "encoder_attention_mask": (batch, size.tokens),
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
)
