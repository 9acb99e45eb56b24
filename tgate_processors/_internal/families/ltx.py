"""LTX-Video: the latents of a video as one row of tokens. LTX-2: those of its sound besides."""

from __future__ import annotations

from typing import Any

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes


def _ltx(config: Any, batch: int, size: InputSize) -> Shapes:
    tokens = size.frames * size.height * size.width
    return {
        "hidden_states": (batch, tokens, config.in_channels),
        "encoder_hidden_states": (batch, size.tokens, config.caption_channels),
        "timestep": (batch, tokens) if size.given else (batch,),
        "encoder_attention_mask": (batch, size.tokens),
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
    }


def _ltx2(config: Any, batch: int, size: InputSize) -> Shapes:
    widths = [config.caption_channels] * 2
    if not config.use_prompt_embeddings:
        widths = [config.cross_attention_dim, config.audio_cross_attention_dim]
    # 24 frames of the video a second, of which all but the first are eight to one of the latent.
    seconds = ((size.frames - 1) * config.vae_scale_factors[0] + 1) / 24
    per_second = config.audio_sampling_rate / config.audio_hop_length / config.audio_scale_factor
    audio = round(seconds * per_second)
    shapes = _ltx(config, batch, size)
    if size.crossed:
        shapes["use_cross_timestep"] = True
    return shapes | {
        "encoder_hidden_states": (batch, size.tokens, widths[0]),
        "audio_encoder_hidden_states": (batch, size.tokens, widths[1]),
        "audio_encoder_attention_mask": (batch, size.tokens),
        "audio_hidden_states": (batch, audio, config.audio_in_channels),
        "audio_num_frames": audio,
        "audio_timestep": (batch,),
        "sigma": (batch,),
    }


_AUDIO = ("audio_hidden_states", "audio_encoder_hidden_states", "audio_encoder_attention_mask", "audio_timestep")
_MORE = ("sigma", "audio_sigma", "video_coords", "audio_coords", "video_self_attention_mask", "video_keyframes_mask")
_GIVEN = ("LTXImageToVideoPipeline", "LTXConditionPipeline")
_GIVEN2 = tuple(f"LTX2{kind}Pipeline" for kind in ("ImageToVideo", "Condition", "InContext", "HDR"))

LTX = (
    Family(
        "LTXVideoTransformer3DModel",
        "transformer",
        "conditional",
        InputShapes(_ltx, tokens=128, frames=161, scale=32, frame_scale=8, given=_GIVEN),
        # Its layers have no flag that says which of them attend to the text.
        Layout(arguments=("video_coords",), cross=("attn2",)),
    ),
    Family(
        "LTX2VideoTransformer3DModel",
        "transformer",
        "conditional",
        InputShapes(_ltx2, tokens=1024, frames=121, scale=32, frame_scale=8, further=True, given=_GIVEN2),
        Layout(
            arguments=(*_AUDIO, *_MORE),
            cross=("attn2",),
            # What these attend to is the other of video and sound.
            never=("audio_to_video_attn", "video_to_audio_attn"),
            beside=("spatio_temporal_guidance_blocks", "isolate_modalities"),
            # Video and sound.
            guided=lambda tensors, given: tensors,
            scales=("_guidance_scale", "_audio_guidance_scale"),
            keeps_cross=False,
        ),
    ),
)
