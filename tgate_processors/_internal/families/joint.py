"""Transformers with joint attention, of which guidance alone is gated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..denoiser.spec import Layout
from .family import Family


def _family(
    denoiser_class: str, models: str, pipelines_without_callback: tuple[str, ...] = (), **layout: Any
) -> Family:
    """A row, with the pipelines that keep their guidance to themselves, but are known to guide by `guidance_scale`."""
    joint = Layout(joint=True, keeps_cross=False, **layout)
    return Family(denoiser_class, models, joint, pipelines_without_callback=pipelines_without_callback)


def _of_latents(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Tokens of the latents, which LongCat-Image numbers apart from those of a given picture."""
    kinds = given["img_ids"][:, 0]
    return [tensors[0][:, : len(kinds) if kinds.is_meta else int((kinds == kinds[0]).sum())]]


def _of_last(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Tokens of the last picture, the one that is drawn; before them stand the text, and pictures that are given."""
    return [tensors[0][:, -math.prod(given["img_shapes"][0][-1]) :]]


def _last(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """The picture that is drawn; those that are given stand before it."""
    return [tensors[0][:, -1:]]


def _reads_given(given: Mapping[str, Any]) -> bool:
    """Whether GLM-Image reads a given picture, whose keys it keeps."""
    caches = given.get("kv_caches")
    return caches is not None and caches[0].mode == "write"


_Z_IMAGE = ("x", "cap_feats", "control_context", "siglip_feats", "image_noise_mask")
_COGVIDEOX = tuple(f"CogVideoX{kind}Pipeline" for kind in ("", "ImageToVideo", "VideoToVideo", "FunControl"))

JOINT = (
    _family(
        "SD3Transformer2DModel",
        "Stable Diffusion 3",
        arguments=("pooled_projections",),
        residuals={"block_controlnet_hidden_states": None},
        beside=("skip_layers",),
    ),
    _family("QwenImageTransformer2DModel", "Qwen-Image", calls=2, given_last=True),
    _family("CogVideoXTransformer3DModel", "CogVideoX", _COGVIDEOX),
    _family("MochiTransformer3DModel", "Mochi"),
    _family("Lumina2Transformer2DModel", "Lumina 2", calls=2),
    _family("ChromaTransformer2DModel", "Chroma", calls=2),
    _family("HunyuanVideoTransformer3DModel", "HunyuanVideo", calls=2),
    _family("HunyuanVideoFramepackTransformer3DModel", "Framepack", calls=2),
    _family("FluxTransformer2DModel", "Flux 1", calls=2, given_last=True),
    _family("AuraFlowTransformer2DModel", "AuraFlow", ("AuraFlowPipeline",)),
    _family("CogView3PlusTransformer2DModel", "CogView 3", arguments=("original_size", "target_size", "crop_coords")),
    _family("CogView4Transformer2DModel", "CogView 4", calls=2),
    # Version 2 itself is distilled; its small ones guide.
    _family("Flux2Transformer2DModel", "Flux 2 Klein", calls=2, given_last=True),
    _family("Krea2Transformer2DModel", "Krea 2", calls=2, scale_beyond=1.0),
    _family("OvisImageTransformer2DModel", "Ovis-Image", ("OvisImagePipeline",), calls=2),
    _family("BriaTransformer2DModel", "Bria"),
    _family("PRXTransformer2DModel", "PRX", ("PRXPipeline", "PRXPixelPipeline")),
    _family(
        "ErnieImageTransformer2DModel", "ERNIE-Image", ("ErnieImagePipeline",), arguments=("text_bth", "text_lens")
    ),
    _family("EasyAnimateTransformer3DModel", "EasyAnimate", arguments=("inpaint_latents", "control_latents")),
    # Its batch is a list with an entry for each sample.
    _family(
        "ZImageTransformer2DModel",
        "Z-Image",
        arguments=("t",),
        entries=_Z_IMAGE,
        residuals={"controlnet_block_samples": None},
        conditional_first=True,
        scale_beyond=1.0,
    ),
    _family(
        "LongCatImageTransformer2DModel",
        "LongCat-Image",
        ("LongCatImagePipeline", "LongCatImageEditPipeline"),
        calls=2,
        guided=_of_latents,
    ),
    _family(
        "HiDreamImageTransformer2DModel",
        "HiDream",
        arguments=("timesteps", "encoder_hidden_states_t5", "pooled_embeds"),
        in_second=("encoder_hidden_states_llama3",),
    ),
    _family(
        "BriaFiboTransformer2DModel",
        "Bria Fibo",
        ("BriaFiboPipeline", "BriaFiboEditPipeline"),
        arguments=("text_encoder_layers",),
        given_last=True,
    ),
    _family("QwenImage21Transformer2DModel", "Qwen-Image 2.1", calls=2, guided=_of_last),
    _family("GlmImageTransformer2DModel", "GLM-Image", calls=2, before=_reads_given),
    _family("BriaFibo2Transformer2DModel", "Bria Fibo 2", calls=2),
    _family("NucleusMoEImageTransformer2DModel", "Nucleus-Image", ("NucleusMoEImagePipeline",), calls=2),
    _family("JoyImageEditTransformer3DModel", "JoyImage-Edit", calls=2, guided=_last),
)
