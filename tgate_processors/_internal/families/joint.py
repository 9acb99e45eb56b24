"""Denoisers with joint attention, of which guidance alone is gated."""

from __future__ import annotations

from typing import Any

import torch

from ..layout import Layout
from .family import Family, Inputs, InputSize, Shapes

# Tokens of CLIP, before those of T5.
_CLIP = 77
_COGVIEW = ("original_size", "target_size", "crop_coords")


def _sd3(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": (batch, config.in_channels, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, _CLIP + size.tokens, config.joint_attention_dim),
        "pooled_projections": (batch, config.pooled_projection_dim),
    }


def _qwen(config: Any, batch: int, size: InputSize) -> Shapes:
    sides = size.height // 2, size.width // 2
    return {
        "hidden_states": (batch, sides[0] * sides[1], config.in_channels),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.joint_attention_dim),
        "img_shapes": [[(1, *sides)]] * batch,
    }


def _cogvideox(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes: Shapes = {
        "hidden_states": (batch, size.frames, config.in_channels, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.text_embed_dim),
    }
    if config.use_rotary_positional_embeddings:
        patches = size.frames // (config.patch_size_t or 1) * size.height * size.width // config.patch_size**2
        table = torch.empty(patches, config.attention_head_dim, device="meta")
        shapes["image_rotary_emb"] = [table, table]
    return shapes


def _flux(config: Any, batch: int, size: InputSize) -> Shapes:
    patches = size.height * size.width // 4
    shapes: Shapes = {
        "hidden_states": (batch, patches, config.in_channels),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.joint_attention_dim),
        "img_ids": (patches, 3),
        "txt_ids": (size.tokens, 3),
    }
    if hasattr(config, "pooled_projection_dim"):
        shapes["pooled_projections"] = (batch, config.pooled_projection_dim)
    if getattr(config, "guidance_embeds", False):
        shapes["guidance"] = (batch,)
    return shapes


def _hunyuan_video(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes: Shapes = {
        "hidden_states": (batch, config.in_channels, size.frames, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.text_embed_dim),
        "encoder_attention_mask": (batch, size.tokens),
        "pooled_projections": (batch, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        shapes["guidance"] = (batch,)
    return shapes


def _by_values(config: Any, batch: int, size: InputSize) -> Shapes:
    raise ValueError(
        "this denoiser reads values of its inputs, and there are none without weights, so its cost cannot be counted. "
        "Gated guidance takes (N + F) / 2N of a run, with F full ones among N steps."
    )


def _aura_flow(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": (batch, config.in_channels, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.joint_attention_dim),
    }


def _cogview(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": (batch, config.in_channels, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.text_embed_dim),
        **dict.fromkeys(_COGVIEW, (batch, 2)),
    }


def _family(name: str, inputs: Inputs, untold: tuple[str, ...] = (), **layout: Any) -> Family:
    """A row, with the pipelines that keep their guidance to themselves, but are known to guide by `guidance_scale`."""
    layout_of = Layout(joint=True, keeps_cross=False, **layout)
    return Family(name, "transformer", "conditional", inputs, layout_of, untold=dict.fromkeys(untold))


JOINT = (
    _family(
        "SD3Transformer2DModel",
        Inputs(_sd3, tokens=256),
        arguments=("pooled_projections",),
        residuals={"block_controlnet_hidden_states": None},
        beside=("skip_layers",),
    ),
    _family("QwenImageTransformer2DModel", Inputs(_qwen, tokens=512), calls=2),
    _family(
        "CogVideoXTransformer3DModel",
        Inputs(_cogvideox, tokens=226, frames=49, frame_scale=4),
        untold=tuple(f"CogVideoX{name}Pipeline" for name in ("", "ImageToVideo", "VideoToVideo", "FunControl")),
    ),
    _family("MochiTransformer3DModel", Inputs(_by_values, tokens=256, frames=19, frame_scale=6)),
    _family("Lumina2Transformer2DModel", Inputs(_by_values, tokens=256), calls=2),
    _family("ChromaTransformer2DModel", Inputs(_flux, tokens=512), calls=2),
    _family("HunyuanVideoTransformer3DModel", Inputs(_hunyuan_video, tokens=256, frames=129, frame_scale=4), calls=2),
    _family("FluxTransformer2DModel", Inputs(_flux, tokens=512), calls=2),
    _family("AuraFlowTransformer2DModel", Inputs(_aura_flow, tokens=256), untold=("AuraFlowPipeline",)),
    _family("CogView3PlusTransformer2DModel", Inputs(_cogview, tokens=224), arguments=_COGVIEW),
    _family("CogView4Transformer2DModel", Inputs(_cogview, tokens=1024), calls=2),
)
