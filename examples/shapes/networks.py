"""The networks of the two pipelines, each of the real kind and small."""

import json
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
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from .scenes import CLASSES, SIDE
from .tokens import LENGTH

CHANNELS = 8
TEXT_WIDTH = 128
# The autoencoder makes 8 x 8 latents.
LATENT_SIDE = SIDE // 4


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


def clip_encoder(tokenizer: Any) -> CLIPTextModel:
    """Reads left to right."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_encoder(tokenizer: Any) -> T5EncoderModel:
    """Reads in both directions."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 4,
        d_ff=2 * TEXT_WIDTH,
        num_layers=3,
        num_heads=4,
        # Exact distances up to the length of a caption.
        relative_attention_num_buckets=64,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    encoder = T5EncoderModel(config)
    # Distance is all that tells the first object from the second. From T5's near-zero start these few numbers take
    # thousands of steps to matter; so large, each head looks somewhere else from the beginning.
    nn.init.normal_(encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    return encoder


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


class Conditioned(nn.Module):
    """A text encoder and the denoiser that reads it."""

    def __init__(self, text_encoder: nn.Module, denoiser: nn.Module, pad: int):
        super().__init__()
        self.text_encoder = text_encoder
        self.denoiser = denoiser
        self.pad = pad
        self.register_buffer("signal", scheduler().alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - scheduler().alphas_cumprod).sqrt(), persistent=False)

    def states(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the denoiser gets of the captions, as the pipelines give it."""
        if isinstance(self.text_encoder, CLIPTextModel):
            return self.text_encoder(tokens)[0], None
        mask = (tokens != self.pad).long()
        return self.text_encoder(tokens, attention_mask=mask)[0], mask

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The loss: mean squared error of the predicted velocity."""
        signal, spread = (scale[steps][:, None, None, None] for scale in (self.signal, self.noise))
        noisy, velocity = signal * latents + spread * noise, signal * noise - spread * latents
        states, mask = self.states(tokens)
        if isinstance(self.denoiser, UNet2DConditionModel):
            guess = self.denoiser(noisy, steps, states).sample
        else:
            sizes = {"resolution": None, "aspect_ratio": None}
            options = {"encoder_attention_mask": mask, "timestep": steps, "added_cond_kwargs": sizes}
            guess = self.denoiser(noisy, encoder_hidden_states=states, **options).sample
        return nn.functional.mse_loss(guess.float(), velocity)


def conditioned(model: str, tokenizer: Any) -> Conditioned:
    """The untrained text encoder and denoiser of a model."""
    if model == "sd":
        return Conditioned(clip_encoder(tokenizer), unet(), tokenizer.pad_token_id)
    return Conditioned(t5_encoder(tokenizer), transformer(), tokenizer.pad_token_id)


def pipeline(vae: AutoencoderKL, conditioned: Conditioned, tokenizer: Any) -> DiffusionPipeline:
    """The trained parts as a pipeline."""
    parts = {"vae": vae, "text_encoder": conditioned.text_encoder, "tokenizer": tokenizer, "scheduler": scheduler()}
    if isinstance(conditioned.denoiser, PixArtTransformer2DModel):
        return PixArtSigmaPipeline(transformer=conditioned.denoiser, **parts)
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(unet=conditioned.denoiser, **parts, **absent)


def save(pipe: DiffusionPipeline, folder: Path, tokenizer_folder: Path) -> None:
    """Write a pipeline in half precision, so that older versions of transformers load it too."""
    pipe.to(torch.float16).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    index = folder / "model_index.json"
    parts = json.loads(index.read_text())
    # The name that means the fast tokenizer in every version.
    if parts["tokenizer"][1].startswith("T5"):
        parts["tokenizer"][1] = "T5TokenizerFast"
    index.write_text(json.dumps(parts, indent=2, sort_keys=True) + "\n")


class Autoencoding(nn.Module):
    """The autoencoder with its loss."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Difference of the picture that comes back, and a weak pull of the latents to a normal distribution."""
        latents = self.vae.encode(pictures).latent_dist
        back = self.vae.decode(latents.mean + latents.std * noise).sample
        difference = nn.functional.l1_loss(back.float(), pictures) + nn.functional.mse_loss(back.float(), pictures)
        # In float32: squares of half-precision numbers are too coarse.
        mean, spread = latents.mean.float(), latents.logvar.float()
        pull = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        return difference + 1e-3 * pull


class Reading(nn.Module):
    """
    The text encoder with questions that teach it to read: what is at each of 8 x 8 places of the picture?

    This stands in for the pretraining that the text encoders of large pipelines have behind them.
    """

    def __init__(self, conditioned: "Conditioned"):
        super().__init__()
        self.conditioned = Conditioned(conditioned.text_encoder, nn.Identity(), conditioned.pad)
        self.places = nn.Parameter(torch.randn(LATENT_SIDE**2, TEXT_WIDTH) * 0.5)
        self.attention = nn.MultiheadAttention(TEXT_WIDTH, 4, batch_first=True)
        self.answer = nn.Sequential(
            nn.LayerNorm(TEXT_WIDTH), nn.Linear(TEXT_WIDTH, 256), nn.GELU(), nn.Linear(256, len(CLASSES))
        )

    def forward(self, tokens: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of what is where."""
        states, mask = self.conditioned.states(tokens)
        absent = None if mask is None else mask == 0
        asked = self.places.expand(len(tokens), -1, -1)
        told, _ = self.attention(asked, states, states, key_padding_mask=absent, need_weights=False)
        return nn.functional.cross_entropy(self.answer(asked + told).flatten(0, 1).float(), classes.flatten())
