"""What transformers with joint attention take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .shapes import InputShapes, InputSize, Shapes

_PICTURE = {"hidden_states": "B in_channels H W", "timestep": "B"}
_VIDEO = {"hidden_states": "B in_channels F H W", "timestep": "B"}
_TEXT = {"encoder_hidden_states": "B T text_embed_dim"}
_JOINT_TEXT = {"encoder_hidden_states": "B T joint_attention_dim"}
# Tokens of CLIP stand before those of T5.
_SD3_TEXT = {"encoder_hidden_states": "B 77+T joint_attention_dim", "pooled_projections": "B pooled_projection_dim"}
_COGVIEW = {**_PICTURE, **_TEXT, **dict.fromkeys(("original_size", "target_size", "crop_coords"), "B 2")}
_PRX = {**_PICTURE, "encoder_hidden_states": "B T context_in_dim", "attention_mask": "B T:bool"}
_ERNIE = {**_PICTURE, "text_bth": "B T text_in_dim", "text_lens": "B:long"}
# The picture that is edited, and the one that is drawn.
_JOY = {"hidden_states": "B 2 in_channels 1 H W", "timestep": "B", "encoder_hidden_states": "B T text_dim"}


def _qwen(config: Any, batch: int, size: InputSize) -> Shapes:
    sides = size.height // 2, size.width // 2
    tokens = {"hidden_states": f"B {sides[0] * sides[1]} in_channels", "timestep": "B"}
    return {**tokens, **_JOINT_TEXT, "img_shapes": [[(1, *sides)]] * batch}


def _cogvideox(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes = {"hidden_states": "B F in_channels H W", "timestep": "B", **_TEXT}
    if not config.use_rotary_positional_embeddings:
        return shapes
    patches = size.frames // (config.patch_size_t or 1) * size.height * size.width // config.patch_size**2
    return {**shapes, "image_rotary_emb": [f"{patches} attention_head_dim"] * 2}


def _hunyuan_video(config: Any, batch: int, size: InputSize) -> Shapes:
    guidance = {"guidance": "B"} if config.guidance_embeds else {}
    text = {**_TEXT, "encoder_attention_mask": "B T", "pooled_projections": "B pooled_projection_dim"}
    return {**_VIDEO, **text, **guidance}


def _longcat(config: Any, batch: int, size: InputSize) -> Shapes:
    patches = size.height * size.width // 4
    tokens = {"hidden_states": f"B {patches} in_channels", "timestep": "B", **_JOINT_TEXT}
    guidance = {"guidance": "B"} if getattr(config, "guidance_embeds", False) else {}
    return {**tokens, "img_ids": f"{patches} 3", "txt_ids": "T 3", **guidance}


def _flux(config: Any, batch: int, size: InputSize) -> Shapes:
    pooled = {"pooled_projections": "B pooled_projection_dim"} if getattr(config, "pooled_projection_dim", None) else {}
    return {**_longcat(config, batch, size), **pooled}


def _flux2(config: Any, batch: int, size: InputSize) -> Shapes:
    return {**_flux(config, batch, size), "img_ids": f"{size.height * size.width // 4} 4", "txt_ids": "T 4"}


def _bria(config: Any, batch: int, size: InputSize) -> Shapes:
    # Its pipeline counts pixels of the picture for a patch of the latent.
    return _flux(config, batch, replace(size, height=2 * size.height, width=2 * size.width))


def _fibo(config: Any, batch: int, size: InputSize) -> Shapes:
    layers = ["B T text_encoder_dim"] * (config.num_layers + config.num_single_layers)
    tokens = {"hidden_states": "B H*W in_channels", "timestep": "B", **_JOINT_TEXT}
    return {**tokens, "text_encoder_layers": layers, "img_ids": "H*W 3", "txt_ids": "T 3"}


def _krea2(config: Any, batch: int, size: InputSize) -> Shapes:
    patches = size.height * size.width // 4
    return {
        "hidden_states": f"B {patches} in_channels",
        "timestep": "B",
        "encoder_hidden_states": "B T num_text_layers text_hidden_dim",
        "position_ids": f"T+{patches} 3",
    }


def _z_image(config: Any, batch: int, size: InputSize) -> Shapes:
    latents: Any = "in_channels 1 H W"
    text: Any = "T cap_feat_dim"
    more: dict[str, Any] = {}
    if config.siglip_feat_dim is not None:
        # Omni, without a picture.
        latents, text = [latents], [text]
        more = {"siglip_feats": [None] * batch, "image_noise_mask": [[1]] * batch}
    return {"x": [latents] * batch, "t": "B", "cap_feats": [text] * batch, **more}


def _ernie_places(part: Any, ids: torch.Tensor) -> torch.Tensor:
    """The table of places of ERNIE-Image, which opens an autocast for its device."""
    return ids.new_empty((*ids.shape[:-1], 1, sum(part.axes_dim)), dtype=torch.float32)


def _by_values(config: Any, batch: int, size: InputSize) -> Shapes:
    """Refuse to count a denoiser that does not run without values."""
    raise ValueError(
        "this denoiser reads values of its inputs, and there are none without weights, so its cost cannot be counted. "
        "Gated guidance takes (N + F) / 2N of a run, with F full ones among N steps."
    )


JOINT = {
    "SD3Transformer2DModel": InputShapes({**_PICTURE, **_SD3_TEXT}, tokens=256),
    "QwenImageTransformer2DModel": InputShapes(_qwen, tokens=512),
    "CogVideoXTransformer3DModel": InputShapes(_cogvideox, tokens=226, frames=49, temporal_compression=4),
    "MochiTransformer3DModel": InputShapes(_by_values, tokens=256, frames=19, temporal_compression=6),
    "Lumina2Transformer2DModel": InputShapes(_by_values, tokens=256),
    "ChromaTransformer2DModel": InputShapes(_flux, tokens=512),
    "HunyuanVideoTransformer3DModel": InputShapes(_hunyuan_video, tokens=256, frames=129, temporal_compression=4),
    "HunyuanVideoFramepackTransformer3DModel": InputShapes(_by_values, tokens=256, frames=33),
    "FluxTransformer2DModel": InputShapes(_flux, tokens=512),
    "AuraFlowTransformer2DModel": InputShapes({**_PICTURE, **_JOINT_TEXT}, tokens=256),
    "CogView3PlusTransformer2DModel": InputShapes(_COGVIEW, tokens=224),
    "CogView4Transformer2DModel": InputShapes(_COGVIEW, tokens=1024),
    "Flux2Transformer2DModel": InputShapes(_flux2, tokens=512, spatial_compression=16),
    "Krea2Transformer2DModel": InputShapes(_krea2, tokens=512),
    "OvisImageTransformer2DModel": InputShapes(_flux, tokens=256),
    "BriaTransformer2DModel": InputShapes(_bria, tokens=128, spatial_compression=16),
    "PRXTransformer2DModel": InputShapes(_PRX, tokens=256),
    "ErnieImageTransformer2DModel": InputShapes(_ERNIE, tokens=256, stand_ins={"pos_embed": _ernie_places}),
    "EasyAnimateTransformer3DModel": InputShapes({**_VIDEO, **_TEXT}, tokens=256, frames=49, temporal_compression=4),
    "ZImageTransformer2DModel": InputShapes(_z_image, tokens=512),
    "LongCatImageTransformer2DModel": InputShapes(_longcat, tokens=512),
    "HiDreamImageTransformer2DModel": InputShapes(_by_values, tokens=128),
    "BriaFiboTransformer2DModel": InputShapes(_fibo, tokens=512, spatial_compression=16),
    "QwenImage21Transformer2DModel": InputShapes(_by_values, tokens=512, spatial_compression=16),
    "GlmImageTransformer2DModel": InputShapes(_by_values, tokens=256),
    "BriaFibo2Transformer2DModel": InputShapes(_by_values, tokens=256),
    "NucleusMoEImageTransformer2DModel": InputShapes(_by_values, tokens=512),
    "JoyImageEditTransformer3DModel": InputShapes(_JOY, tokens=1024),
}
