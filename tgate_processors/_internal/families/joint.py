"""Transformers with joint attention, of which guidance alone is gated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..denoiser.spec import AuxiliaryScale, Layout
from .family import Family


def _family(
    denoiser_class: str, models: str, pipelines_without_callback: tuple[str, ...] = (), **layout: Any
) -> Family:
    """A row, with the pipelines that do not report their guidance, but are known to guide by `guidance_scale`."""
    joint = Layout(joint=True, gates_cross_by_default=False, **layout)
    return Family(denoiser_class, models, joint, pipelines_without_callback=pipelines_without_callback)


def _latent_tokens(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Tokens of the latents, which LongCat-Image numbers apart from those of a reference image."""
    kinds = given["img_ids"][:, 0]
    return [tensors[0][:, : len(kinds) if kinds.is_meta else int((kinds == kinds[0]).sum())]]


def _last_image_tokens(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Tokens of the last image, which is the generated one; the text and reference images come before them."""
    return [tensors[0][:, -math.prod(given["img_shapes"][0][-1]) :]]


def _last_image(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """The generated image, which comes after the reference images."""
    return [tensors[0][:, -1:]]


def _reads_reference(given: Mapping[str, Any]) -> bool:
    """Whether GLM-Image reads a reference image, to cache its keys."""
    caches = given.get("kv_caches")
    return caches is not None and caches[0].mode == "write"


_Z_IMAGE = ("x", "cap_feats", "control_context", "siglip_feats", "image_noise_mask")
_COGVIDEOX = tuple(f"CogVideoX{kind}Pipeline" for kind in ("", "ImageToVideo", "VideoToVideo", "FunControl"))

JOINT = (
    _family(
        "SD3Transformer2DModel",
        "Stable Diffusion 3",
        batch_arguments=("pooled_projections",),
        controlnet_residuals={"block_controlnet_hidden_states": None},
        auxiliary_calls={"skip_layers": AuxiliaryScale(("_skip_layer_guidance_scale",))},
    ),
    _family("QwenImageTransformer2DModel", "Qwen-Image", calls_per_step=2, reference_tokens_last=True),
    _family("CogVideoXTransformer3DModel", "CogVideoX", _COGVIDEOX),
    _family("MochiTransformer3DModel", "Mochi"),
    _family("Lumina2Transformer2DModel", "Lumina 2", calls_per_step=2),
    _family("ChromaTransformer2DModel", "Chroma", calls_per_step=2),
    _family("HunyuanVideoTransformer3DModel", "HunyuanVideo", calls_per_step=2),
    _family("HunyuanVideoFramepackTransformer3DModel", "Framepack", calls_per_step=2),
    _family("FluxTransformer2DModel", "Flux 1", calls_per_step=2, reference_tokens_last=True),
    _family("AuraFlowTransformer2DModel", "AuraFlow", ("AuraFlowPipeline",)),
    _family(
        "CogView3PlusTransformer2DModel", "CogView 3", batch_arguments=("original_size", "target_size", "crop_coords")
    ),
    _family("CogView4Transformer2DModel", "CogView 4", calls_per_step=2),
    # Version 2 itself is distilled; its small ones guide.
    _family("Flux2Transformer2DModel", "Flux 2 Klein", calls_per_step=2, reference_tokens_last=True),
    _family("Krea2Transformer2DModel", "Krea 2", calls_per_step=2, scale_offset=1.0),
    _family("OvisImageTransformer2DModel", "Ovis-Image", ("OvisImagePipeline",), calls_per_step=2),
    _family("BriaTransformer2DModel", "Bria"),
    _family("PRXTransformer2DModel", "PRX", ("PRXPipeline", "PRXPixelPipeline")),
    _family(
        "ErnieImageTransformer2DModel",
        "ERNIE-Image",
        ("ErnieImagePipeline",),
        batch_arguments=("text_bth", "text_lens"),
    ),
    _family("EasyAnimateTransformer3DModel", "EasyAnimate", batch_arguments=("inpaint_latents", "control_latents")),
    # Its batch is a list with an entry for each sample.
    _family(
        "ZImageTransformer2DModel",
        "Z-Image",
        batch_arguments=("t",),
        list_arguments=_Z_IMAGE,
        controlnet_residuals={"controlnet_block_samples": None},
        conditional_first=True,
        scale_offset=1.0,
    ),
    _family(
        "LongCatImageTransformer2DModel",
        "LongCat-Image",
        ("LongCatImagePipeline", "LongCatImageEditPipeline"),
        calls_per_step=2,
        guided_views=_latent_tokens,
    ),
    _family(
        "HiDreamImageTransformer2DModel",
        "HiDream",
        batch_arguments=("timesteps", "encoder_hidden_states_t5", "pooled_embeds"),
        second_dim_arguments=("encoder_hidden_states_llama3",),
    ),
    _family(
        "BriaFiboTransformer2DModel",
        "Bria Fibo",
        ("BriaFiboPipeline", "BriaFiboEditPipeline"),
        batch_arguments=("text_encoder_layers",),
        reference_tokens_last=True,
    ),
    _family("QwenImage21Transformer2DModel", "Qwen-Image 2.1", calls_per_step=2, guided_views=_last_image_tokens),
    _family("GlmImageTransformer2DModel", "GLM-Image", calls_per_step=2, is_prepare_call=_reads_reference),
    _family("BriaFibo2Transformer2DModel", "Bria Fibo 2", calls_per_step=2),
    _family("NucleusMoEImageTransformer2DModel", "Nucleus-Image", ("NucleusMoEImagePipeline",), calls_per_step=2),
    _family("JoyImageEditTransformer3DModel", "JoyImage-Edit", calls_per_step=2, guided_views=_last_image),
)
