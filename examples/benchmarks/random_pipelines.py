"""Pipelines whose denoiser has random weights, full size or narrow, and arguments to call them with."""

from typing import Any

import diffusers
import torch

# A denoiser with all the layers of the real one, and next to no arithmetic in them.
NARROW = {
    "UNet2DConditionModel": {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 32},
    "PixArtTransformer2DModel": {
        "num_attention_heads": 6,
        "attention_head_dim": 8,
        "cross_attention_dim": 48,
        "caption_channels": 32,
    },
}


def narrowed(denoiser: Any) -> Any:
    """The same layers, narrow."""
    changes: dict[str, Any] = dict(NARROW[type(denoiser).__name__])
    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        levels = len(denoiser.config.block_out_channels)
        changes["block_out_channels"] = changes["block_out_channels"][:levels]
        if not isinstance(denoiser.config.attention_head_dim, int):
            changes["attention_head_dim"] = (1, 2, 4, 4)[:levels]
    with torch.device("meta"):
        return type(denoiser).from_config({**denoiser.config, **changes})


def random_pipeline(described: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """
    A pipeline around a denoiser with random weights, and next to nothing else.

    Args:
        described (`ModelMixin`): The denoiser, with or without weights, whose configuration is taken.
        device (`torch.device`): Where to.
        dtype (`torch.dtype`): Type of the weights.
    """
    torch.manual_seed(0)
    with device:
        denoiser = type(described).from_config(described.config)
    denoiser.to(dtype).eval().requires_grad_(False)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    # It decodes nothing: older pipelines ask it how many pixels a latent has, eight.
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).to(device, dtype)
    parts: dict[str, Any] = {"scheduler": scheduler, "vae": vae, "text_encoder": None, "tokenizer": None}
    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        if denoiser.config.addition_embed_type == "text_time":
            pipe = diffusers.StableDiffusionXLPipeline(
                unet=denoiser, text_encoder_2=None, tokenizer_2=None, add_watermarker=False, **parts
            )
        else:
            pipe = diffusers.StableDiffusionPipeline(
                unet=denoiser, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
            )
    else:
        pipe = diffusers.PixArtAlphaPipeline(transformer=denoiser, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser_of(pipe: Any) -> Any:
    """The module that the pipeline calls in every step."""
    return getattr(pipe, "unet", None) or pipe.transformer


def random_inputs(pipe: Any, batch_size: int, size: int, steps: int) -> dict[str, Any]:
    """The arguments of a call that goes from text embeddings to latents."""
    denoiser = denoiser_of(pipe)
    config, transformer = denoiser.config, hasattr(pipe, "transformer")
    width = config.caption_channels if transformer else config.cross_attention_dim
    shapes = {"prompt_embeds": (batch_size, 120 if transformer else 77, width)}
    if isinstance(pipe, diffusers.StableDiffusionXLPipeline):
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes["pooled_prompt_embeds"] = (batch_size, pooled)
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {
        prefix + name: torch.randn(shape, generator=generator).to(denoiser.device, denoiser.dtype)
        for name, shape in shapes.items()
        for prefix in ("", "negative_")
    }
    if transformer:
        mask = torch.ones(batch_size, 120, dtype=torch.long, device=denoiser.device)
        inputs |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
        inputs["use_resolution_binning"] = False
    return inputs | {"height": size, "width": size, "num_inference_steps": steps, "output_type": "latent"}
