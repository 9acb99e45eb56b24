"""
Wan: guidance by two calls; version 2.2 has two denoisers, one for much noise and one for little. AnyFlow guides in one
batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes


def _wan(config: Any, batch: int, size: InputSize) -> Shapes:
    _, height, width = config.patch_size
    tokens = size.frames * (size.height // height) * (size.width // width)
    shapes: Shapes = {
        "hidden_states": (batch, config.in_channels, size.frames, size.height, size.width),
        "timestep": (batch, tokens) if size.given else (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.text_dim),
    }
    if getattr(config, "image_dim", None) is not None:
        # The first picture, or with places of their own the first and the last one.
        pictures = batch if getattr(config, "pos_embed_seq_len", None) is None else 2 * batch
        shapes["encoder_hidden_states_image"] = (pictures, size.picture, config.image_dim)
    return shapes


def _vace(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes = _wan(config, batch, size)
    return shapes | {"control_hidden_states": (batch, config.vace_in_channels, *shapes["hidden_states"][2:])}


def _any_flow(config: Any, batch: int, size: InputSize) -> Shapes:
    # Frames before channels, and a time for each of them.
    times = (batch, size.frames)
    shapes = _wan(config, batch, size) | {"timestep": times, "r_timestep": times}
    return shapes | {"hidden_states": (*times, config.in_channels, size.height, size.width)}


def _animate(config: Any, batch: int, size: InputSize) -> Shapes:
    # The picture to be animated is one frame more.
    hidden = (batch, config.in_channels, size.frames + 1, size.height, size.width)
    side = config.motion_encoder_size
    shapes = _wan(config, batch, size) | {"hidden_states": hidden}
    return shapes | {
        "pose_hidden_states": (batch, config.latent_channels, size.frames, *hidden[3:]),
        "face_pixel_values": (batch, 3, 4 * (size.frames - 1) + 1, side, side),
    }


# The keys of a picture that the video begins with have a softmax of their own beside that of the text.
_LAYOUT = Layout(calls=2, apart=True, keeps_cross=False)
# Faces are no text: what is seen of them changes from frame to frame.
_ANIMATE = replace(_LAYOUT, never=("face_adapter",))
_SIZES: dict[str, Any] = {"tokens": 512, "frames": 81, "frame_scale": 4}
_INPUTS = InputShapes(_wan, **_SIZES)
_VACE_INPUTS = InputShapes(_vace, **_SIZES)
_ANIMATE_INPUTS = InputShapes(_animate, **_SIZES | {"frames": 77})

WAN = (
    Family("WanTransformer3DModel", "transformer", "conditional", _INPUTS, _LAYOUT, second="transformer_2"),
    Family("WanVACETransformer3DModel", "transformer", "conditional", _VACE_INPUTS, _LAYOUT, second="transformer_2"),
    Family("WanAnimateTransformer3DModel", "transformer", "conditional", _ANIMATE_INPUTS, _ANIMATE),
    Family("SkyReelsV2Transformer3DModel", "transformer", "conditional", _INPUTS, _LAYOUT),
    # It asks for the precision of its device in every forward, which the meta device does not have.
    Family("HeliosTransformer3DModel", "transformer", "conditional", None, _LAYOUT),
    Family("ChronoEditTransformer3DModel", "transformer", "conditional", _INPUTS, _LAYOUT),
    Family(
        "AnyFlowTransformer3DModel",
        "transformer",
        "conditional",
        InputShapes(_any_flow, **_SIZES),
        Layout(arguments=("r_timestep",), cross=("attn2",), keeps_cross=False),
    ),
)
