"""The pipeline with joint attention: networks of Stable Diffusion 3's kind and small, and how they learn."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextModelWithProjection

from examples.testbeds.shapes import tokens
from examples.testbeds.shapes.networks import clip_config, t5_encoder

from .networks import CHANNELS, LATENT_SIDE

# Of the two text encoders of CLIP's kind; the third has that of both.
WIDTHS = (128, 64)
TEXT_WIDTH = sum(WIDTHS)


class Tokenizers:
    """The two kinds of tokenizers, whose tokens stand side by side in a tensor."""

    def __init__(self, folder: Path):
        self.clip, self.t5 = tokens.load("sd", folder / "tokenizer"), tokens.load("sd3", folder / "tokenizer_3")

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """Token numbers, N x (24 + 20)."""
        third = tokens.encode(self.t5, captions, tokens.THIRD_LENGTH)
        return torch.cat([tokens.encode(self.clip, captions), third], 1)


class TextEncoders(nn.Module):
    """The three text encoders, read as the pipeline reads them."""

    def __init__(self, tokenizers: Tokenizers):
        super().__init__()
        self.first, self.second = (CLIPTextModelWithProjection(clip_config(tokenizers.clip, width)) for width in WIDTHS)
        self.third = t5_encoder(tokenizers.t5, d_model=TEXT_WIDTH, num_layers=2)

    def forward(self, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of all tokens (N x 44 x 192), and what the first two say of the whole caption (N x 192)."""
        clip, t5 = read.split([tokens.LENGTH, tokens.THIRD_LENGTH], 1)
        found = [encoder(clip, output_hidden_states=True) for encoder in (self.first, self.second)]
        states = torch.cat([each.hidden_states[-2] for each in found], -1)
        whole = torch.cat([each.text_embeds for each in found], -1)
        return torch.cat([states, self.third(t5)[0]], 1), whole


def transformer() -> SD3Transformer2DModel:
    """Five blocks over 64 patches and the tokens of the text; at first each block passes on what it gets."""
    denoiser = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=5,
        num_attention_heads=5,
        attention_head_dim=32,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIDE,
        qk_norm="rms_norm",
    )
    modulations = [norm.linear for block in denoiser.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*modulations, denoiser.norm_out.linear, denoiser.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return denoiser


class Flowing(nn.Module):
    """The text encoders and the denoiser that reads them, on a straight line from noise to a picture."""

    def __init__(self, text_encoders: TextEncoders, denoiser: SD3Transformer2DModel):
        super().__init__()
        self.text_encoder = text_encoders
        self.denoiser = denoiser

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor, read: torch.Tensor
    ) -> torch.Tensor:
        """The loss: mean squared error of the predicted velocity."""
        # The last step is pure noise, as the first of sampling is.
        times = steps + 1
        share = (times / 1000)[:, None, None, None]
        states, pooled = self.text_encoder(read)
        text = {"encoder_hidden_states": states, "pooled_projections": pooled}
        guess = self.denoiser(latents + share * (noise - latents), timestep=times, **text).sample
        return nn.functional.mse_loss(guess.float(), noise - latents)


def conditioned(tokenizers: Tokenizers) -> Flowing:
    """The untrained text encoders and denoiser."""
    return Flowing(TextEncoders(tokenizers), transformer())


def pipeline(
    vae: AutoencoderTiny, text_encoders: TextEncoders, denoiser: SD3Transformer2DModel, tokenizers: Tokenizers
) -> StableDiffusion3Pipeline:
    """The trained parts as a pipeline."""
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoders.first,
        tokenizer=tokenizers.clip,
        text_encoder_2=text_encoders.second,
        tokenizer_2=tokenizers.clip,
        text_encoder_3=text_encoders.third,
        tokenizer_3=tokenizers.t5,
    )
