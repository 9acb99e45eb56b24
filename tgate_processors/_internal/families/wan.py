"""Wan: guidance by two calls; version 2.2 has two denoisers, one for much noise and one for little."""

from __future__ import annotations

from typing import Any

from ..layout import Layout
from .family import Family, Inputs, InputSize, Shapes


def _wan(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": (batch, config.in_channels, size.frames, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.text_dim),
    }


def _vace(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes = _wan(config, batch, size)
    return shapes | {"control_hidden_states": (batch, config.vace_in_channels, *shapes["hidden_states"][2:])}


# The keys of a picture that the video begins with have a softmax of their own beside that of the text.
_LAYOUT = Layout(calls=2, apart=True, keeps_cross=False)
_SIZES: dict[str, Any] = {"tokens": 512, "frames": 81, "frame_scale": 4}
_INPUTS = Inputs(_wan, **_SIZES)
_VACE_INPUTS = Inputs(_vace, **_SIZES)

WAN = (
    Family("WanTransformer3DModel", "transformer", "conditional", _INPUTS, _LAYOUT, second="transformer_2"),
    Family("WanVACETransformer3DModel", "transformer", "conditional", _VACE_INPUTS, _LAYOUT, second="transformer_2"),
    Family("SkyReelsV2Transformer3DModel", "transformer", "conditional", _INPUTS, _LAYOUT),
)
