"""
UNets: Stable Diffusion, SDXL and what is built around them, AnimateDiff, Stable Video Diffusion, I2VGen-XL,
text-to-video.
"""

from __future__ import annotations

from typing import Any

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes, first


def _unet(config: Any, batch: int, size: InputSize) -> Shapes:
    width = getattr(config, "encoder_hid_dim", None) or first(config.cross_attention_dim)
    shapes: Shapes = {
        # With ControlNet-XS they are fixed.
        "sample": (batch, getattr(config, "in_channels", 4), size.height, size.width),
        "timestep": (),
        "encoder_hidden_states": (batch, size.tokens, width),
    }
    if config.time_cond_proj_dim is not None:
        shapes["timestep_cond"] = (batch, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        # Of the embedding only the width counts, not which part of it is text and which the sizes of the picture.
        text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes["added_cond_kwargs"] = {"text_embeds": (batch, text), "time_ids": (batch, 6)}
    return shapes


def _motion(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes = _unet(config, batch, size)
    _, *text = shapes["encoder_hidden_states"]
    # Every frame has the text for itself.
    return shapes | {
        "sample": (batch, config.in_channels, size.frames, size.height, size.width),
        "encoder_hidden_states": (batch * size.frames, *text),
    }


def _video(config: Any, batch: int, size: InputSize) -> Shapes:
    ids = config.projection_class_embeddings_input_dim // config.addition_time_embed_dim
    return {
        "sample": (batch, size.frames, config.in_channels, size.height, size.width),
        "timestep": (),
        "encoder_hidden_states": (batch, size.tokens, first(config.cross_attention_dim)),
        "added_time_ids": (batch, ids),
    }


def _with_control(config: Any, batch: int, size: InputSize) -> Shapes:
    # The control is a picture, and every level of its embedding but the first halves the sides.
    scale = 2 ** (len(config.ctrl_conditioning_embedding_out_channels) - 1)
    picture = (batch, config.ctrl_conditioning_channels, scale * size.height, scale * size.width)
    return _unet(config, batch, size) | {"controlnet_cond": picture}


def _frames(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "sample": (batch, config.in_channels, size.frames, size.height, size.width),
        "timestep": (),
        "encoder_hidden_states": (batch, size.tokens, config.cross_attention_dim),
    }


def _picture_video(config: Any, batch: int, size: InputSize) -> Shapes:
    sample = (batch, config.in_channels, size.frames, size.height, size.width)
    return {
        "sample": sample,
        "timestep": (),
        "fps": (batch,),
        "image_latents": sample,
        "image_embeddings": (batch, config.cross_attention_dim),
        "encoder_hidden_states": (batch, size.tokens, config.cross_attention_dim),
    }


UNETS = (
    Family(
        "UNet2DConditionModel",
        "unet",
        "unconditional",
        InputShapes(_unet, tokens=77),
        pipelines_without_callback={
            "AudioLDMPipeline": None,
            "MusicLDMPipeline": None,
            "StableDiffusionAdapterPipeline": None,
            # Its unconditional half has no boxes.
            "StableDiffusionGLIGENPipeline": "conditional",
            "StableDiffusionImageVariationPipeline": None,
            "StableDiffusionLatentUpscalePipeline": None,
            "StableDiffusionUpscalePipeline": None,
            "StableDiffusionXLAdapterPipeline": None,
            "StableDiffusionXLInstructPix2PixPipeline": None,
            # Their unconditional half has no picture.
            "StableUnCLIPImg2ImgPipeline": "conditional",
            "StableUnCLIPPipeline": "conditional",
        },
    ),
    Family("UNetMotionModel", "unet", "unconditional", InputShapes(_motion, tokens=77, frames=16)),
    Family(
        "UNetSpatioTemporalConditionModel",
        "unet",
        "conditional",
        InputShapes(_video, tokens=1, frames=25, text=False),
    ),
    Family(
        "I2VGenXLUNet",
        "unet",
        "conditional",
        InputShapes(_picture_video, tokens=77, frames=16),
        Layout(arguments=("fps", "image_latents", "image_embeddings")),
        pipelines_without_callback={"I2VGenXLPipeline": None},
    ),
    Family(
        "UNet3DConditionModel",
        "unet",
        "conditional",
        InputShapes(_frames, tokens=77, frames=16),
        pipelines_without_callback=dict.fromkeys(("TextToVideoSDPipeline", "VideoToVideoSDPipeline")),
    ),
    # UNet and control in one. The cross-attention of the control is computed in every step, as that of any ControlNet;
    # the call says in which steps it runs at all.
    Family(
        "UNetControlNetXSModel",
        "unet",
        "conditional",
        InputShapes(_with_control, tokens=77),
        Layout(arguments=("controlnet_cond",), never=("ctrl_",)),
    ),
)
