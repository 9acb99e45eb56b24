"""Kandinsky 3: a UNet whose blocks list their attention. Kandinsky 5 and 6: guidance by two calls; 6 has sound too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes


def _kandinsky3(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "sample": (batch, config.in_channels, size.height, size.width),
        "timestep": (),
        "encoder_hidden_states": (batch, size.tokens, config.encoder_hid_dim),
        "encoder_attention_mask": (batch, size.tokens),
    }


def _kandinsky5(config: Any, batch: int, size: InputSize) -> Shapes:
    # Beside the latents stand those of a given picture, and which frames are given.
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    _, height, width = config.patch_size
    sides = (size.frames, size.height // height, size.width // width)
    return {
        "hidden_states": (batch, size.frames, size.height, size.width, channels),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.in_text_dim),
        "pooled_projections": (batch, config.in_text_dim2),
        "visual_rope_pos": [torch.empty(side, dtype=torch.long, device="meta") for side in sides],
        "text_rope_pos": torch.empty(size.tokens, dtype=torch.long, device="meta"),
    }


def _kandinsky6(config: Any, batch: int, size: InputSize) -> Shapes:
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    # 24 frames of the video a second, of which all but the first are four to one of the latent; and of the sound 44100
    # samples, of which 1024 are one of the latent.
    audio = math.ceil((4 * (size.frames - 1) + 1) / 24 * 44100 / 1024)
    return {
        "hidden_states": (batch, size.frames, size.height, size.width, channels),
        "audio_hidden_states": (batch, audio, config.in_audio_dim),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.in_text_dim),
        "pooled_projections": (batch, config.in_text_dim2),
    }


def _of_video_and_sound(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Both, but for a picture that is given, which is the last frame of the video."""
    is_given = given.get("visual_token_type_ids") is not None
    return [tensors[0][:, :-1], *tensors[1:]] if is_given else tensors


KANDINSKY = (
    Family(
        "Kandinsky3UNet",
        "unet",
        "conditional",
        InputShapes(_kandinsky3, tokens=128),
        Layout(
            # All its layers say that they are cross-attention.
            cross=tuple(f"attentions.{place}.attention" for place in range(1, 10)),
            # It pools the text for the embedding of the time.
            never=("add_time_condition",),
            scale_beyond=1.0,
        ),
    ),
    Family(
        "Kandinsky5Transformer3DModel",
        "transformer",
        "conditional",
        InputShapes(_kandinsky5, tokens=512, frames=121, frame_scale=4),
        Layout(
            cross=("cross_attention",),
            # The text is refined here, in a small part of the time.
            never=("text_transformer_blocks",),
            calls=2,
            asks_scale=True,
            keeps_cross=False,
        ),
        # They tell their steps, and guide where `guidance_scale` is above 1.
        pipelines_without_callback=dict.fromkeys(f"Kandinsky5{kind}Pipeline" for kind in ("T2V", "I2V", "T2I", "I2I")),
    ),
    Family(
        "Kandinsky6Transformer3DModel",
        "transformer",
        "conditional",
        InputShapes(_kandinsky6, tokens=1024, frames=121, frame_scale=4),
        Layout(
            cross=("cross_attention",),
            # What the latter two attend to is the other of video and sound.
            never=("text_transformer_blocks", "va_cross_attention", "av_cross_attention"),
            calls=2,
            guided=_of_video_and_sound,
            # A video may be made without its sound.
            part_of={"audio_dec_block": "audio_hidden_states"},
            keeps_cross=False,
        ),
    ),
)
