"""Denoisers with joint attention, of which guidance alone is gated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes

# Tokens of CLIP, before those of T5.
_CLIP = 77
_ERNIE = ("text_bth", "text_lens")
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


def flux_shapes(config: Any, batch: int, size: InputSize) -> Shapes:
    """What Flux takes, and those that are built like it."""
    patches = size.height * size.width // 4
    shapes: Shapes = {
        "hidden_states": (batch, patches, config.in_channels),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.joint_attention_dim),
        "img_ids": (patches, 3),
        "txt_ids": (size.tokens, 3),
    }
    if getattr(config, "pooled_projection_dim", None):
        shapes["pooled_projections"] = (batch, config.pooled_projection_dim)
    if getattr(config, "guidance_embeds", False):
        shapes["guidance"] = (batch,)
    return shapes


def _bria(config: Any, batch: int, size: InputSize) -> Shapes:
    # Its pipeline counts pixels of the picture for a patch of the latent.
    return flux_shapes(config, batch, replace(size, height=2 * size.height, width=2 * size.width))


def _flux2(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes = flux_shapes(config, batch, size)
    return shapes | {"img_ids": (shapes["hidden_states"][1], 4), "txt_ids": (size.tokens, 4)}


def _krea2(config: Any, batch: int, size: InputSize) -> Shapes:
    patches = size.height * size.width // 4
    return {
        "hidden_states": (batch, patches, config.in_channels),
        "encoder_hidden_states": (batch, size.tokens, config.num_text_layers, config.text_hidden_dim),
        "timestep": (batch,),
        "position_ids": (size.tokens + patches, 3),
    }


def _prx(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": (batch, config.in_channels, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.context_in_dim),
        "attention_mask": torch.empty(batch, size.tokens, dtype=torch.bool, device="meta"),
    }


def _easy_animate(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": (batch, config.in_channels, size.frames, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.text_embed_dim),
    }


def _ernie(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": (batch, config.in_channels, size.height, size.width),
        "timestep": (batch,),
        "text_bth": (batch, size.tokens, config.text_in_dim),
        "text_lens": torch.empty(batch, dtype=torch.long, device="meta"),
    }


def _ernie_places(part: Any, ids: torch.Tensor) -> torch.Tensor:
    """The table of places of ERNIE-Image, which opens an autocast for its device."""
    return ids.new_empty((*ids.shape[:-1], 1, sum(part.axes_dim)), dtype=torch.float32)


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


def by_values(config: Any, batch: int, size: InputSize) -> Shapes:
    """Refuse to count a denoiser that does not run without values."""
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


def joint_family(
    name: str, inputs: InputShapes, pipelines_without_callback: tuple[str, ...] = (), **layout: Any
) -> Family:
    """A row, with the pipelines that keep their guidance to themselves, but are known to guide by `guidance_scale`."""
    layout_of = Layout(joint=True, keeps_cross=False, **layout)
    return Family(
        name,
        "transformer",
        "conditional",
        inputs,
        layout_of,
        pipelines_without_callback=dict.fromkeys(pipelines_without_callback),
    )


JOINT = (
    joint_family(
        "SD3Transformer2DModel",
        InputShapes(_sd3, tokens=256),
        arguments=("pooled_projections",),
        residuals={"block_controlnet_hidden_states": None},
        beside=("skip_layers",),
    ),
    joint_family("QwenImageTransformer2DModel", InputShapes(_qwen, tokens=512), calls=2, given_last=True),
    joint_family(
        "CogVideoXTransformer3DModel",
        InputShapes(_cogvideox, tokens=226, frames=49, frame_scale=4),
        pipelines_without_callback=tuple(
            f"CogVideoX{name}Pipeline" for name in ("", "ImageToVideo", "VideoToVideo", "FunControl")
        ),
    ),
    joint_family("MochiTransformer3DModel", InputShapes(by_values, tokens=256, frames=19, frame_scale=6)),
    joint_family("Lumina2Transformer2DModel", InputShapes(by_values, tokens=256), calls=2),
    joint_family("ChromaTransformer2DModel", InputShapes(flux_shapes, tokens=512), calls=2),
    joint_family(
        "HunyuanVideoTransformer3DModel", InputShapes(_hunyuan_video, tokens=256, frames=129, frame_scale=4), calls=2
    ),
    joint_family("HunyuanVideoFramepackTransformer3DModel", InputShapes(by_values, tokens=256, frames=33), calls=2),
    joint_family("FluxTransformer2DModel", InputShapes(flux_shapes, tokens=512), calls=2, given_last=True),
    joint_family(
        "AuraFlowTransformer2DModel",
        InputShapes(_aura_flow, tokens=256),
        pipelines_without_callback=("AuraFlowPipeline",),
    ),
    joint_family("CogView3PlusTransformer2DModel", InputShapes(_cogview, tokens=224), arguments=_COGVIEW),
    joint_family("CogView4Transformer2DModel", InputShapes(_cogview, tokens=1024), calls=2),
    # Version 2 itself is distilled; its small ones guide.
    joint_family("Flux2Transformer2DModel", InputShapes(_flux2, tokens=512, scale=16), calls=2, given_last=True),
    joint_family("Krea2Transformer2DModel", InputShapes(_krea2, tokens=512), calls=2, scale_beyond=1.0),
    joint_family(
        "OvisImageTransformer2DModel",
        InputShapes(flux_shapes, tokens=256),
        pipelines_without_callback=("OvisImagePipeline",),
        calls=2,
    ),
    joint_family("BriaTransformer2DModel", InputShapes(_bria, tokens=128, scale=16)),
    joint_family(
        "PRXTransformer2DModel",
        InputShapes(_prx, tokens=256),
        pipelines_without_callback=("PRXPipeline", "PRXPixelPipeline"),
    ),
    joint_family(
        "ErnieImageTransformer2DModel",
        InputShapes(_ernie, tokens=256, instead={"pos_embed": _ernie_places}),
        ("ErnieImagePipeline",),
        arguments=_ERNIE,
    ),
    joint_family(
        "EasyAnimateTransformer3DModel",
        InputShapes(_easy_animate, tokens=256, frames=49, frame_scale=4),
        arguments=("inpaint_latents", "control_latents"),
    ),
)
