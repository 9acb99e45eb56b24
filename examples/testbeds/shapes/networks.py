"""The networks of the two pipelines for pictures, each of the real kind and small."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from .scenes import SIDE
from .tokens import LENGTH

CHANNELS = 8
TEXT_WIDTH = 128
# The autoencoder makes 8 x 8 latents.
LATENT_SIDE = SIDE // 4


T5 = {
    "d_model": TEXT_WIDTH,
    "d_kv": TEXT_WIDTH // 4,
    "d_ff": 2 * TEXT_WIDTH,
    "num_layers": 3,
    "num_heads": 4,
    # Exact distances up to the length of a caption.
    "relative_attention_num_buckets": 64,
    "relative_attention_max_distance": 64,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}


def autoencoder() -> AutoencoderKL:
    """32 x 32 pixels to 8 x 8 latents and back."""
    return AutoencoderKL(
        sample_size=SIDE,
        latent_channels=CHANNELS,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def scheduler() -> DDIMScheduler:
    """The last training step is pure noise, as the first of sampling is."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def clip_config(tokenizer: Any, width: int = TEXT_WIDTH) -> CLIPTextConfig:
    """Reads left to right."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip_encoder(tokenizer: Any) -> CLIPTextModel:
    """The text encoder of Stable Diffusion."""
    return CLIPTextModel(clip_config(tokenizer))


def t5_encoder(tokenizer: Any, **sizes: int) -> T5EncoderModel:
    """Reads in both directions."""
    encoder = T5EncoderModel(T5Config(**T5 | sizes | {"vocab_size": len(tokenizer)}))
    spread_heads(encoder.encoder.block[:1])
    return encoder


def spread_heads(blocks: Iterable[Any]) -> None:
    """
    Make each head look somewhere else from the beginning.

    Distance is all that tells the first object from the second. From T5's near-zero start these few numbers take
    thousands of steps to matter.
    """
    for block in blocks:
        nn.init.normal_(block.layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)


def unet() -> UNet2DConditionModel:
    """Self- and cross-attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(80, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        # By diffusers' naming, the number of heads.
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def transformer() -> PixArtTransformer2DModel:
    """Six blocks over 64 patches."""
    return PixArtTransformer2DModel(
        sample_size=LATENT_SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        patch_size=1,
        num_layers=6,
        num_attention_heads=6,
        attention_head_dim=32,
        cross_attention_dim=192,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )


def pipeline(vae: AutoencoderKL, text_encoder: nn.Module, denoiser: nn.Module, tokenizer: Any) -> DiffusionPipeline:
    """The trained parts as a pipeline."""
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler()}
    if isinstance(denoiser, PixArtTransformer2DModel):
        return PixArtSigmaPipeline(transformer=denoiser, **parts)
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(unet=denoiser, **parts, **absent)


def save(pipe: DiffusionPipeline, folder: Path, tokenizer_folder: Path) -> None:
    """Write a pipeline in half precision, so that transformers 4 and 5 both load it."""
    # Older versions do not write weights that training has left in another order.
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(memory_format=torch.contiguous_format)
    pipe.to(torch.float16).save_pretrained(folder)
    # Version 4 does not find CLIP's weights without this prefix; version 5 takes them either way.
    file = folder / "text_encoder" / "model.safetensors"
    prefix = "text_model." if isinstance(pipe.text_encoder, CLIPTextModel) else ""
    weights = {f"{prefix}{name.removeprefix(prefix)}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    # The files that version 4 reads.
    for tokenizer in folder.glob("tokenizer*"):
        own = tokenizer_folder.with_name(tokenizer.name)
        for file in (own if own.is_dir() else tokenizer_folder).iterdir():
            (tokenizer / file.name).write_bytes(file.read_bytes())
    index = folder / "model_index.json"
    parts = json.loads(index.read_text())
    # The name that means the fast tokenizer in both.
    for name, part in parts.items():
        if name.startswith("tokenizer") and part[1].startswith("T5"):
            part[1] = "T5TokenizerFast"
    index.write_text(json.dumps(parts, indent=2, sort_keys=True) + "\n")
