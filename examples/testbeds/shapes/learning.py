"""What the networks learn: a module each, whose forward gives its loss."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from .networks import LATENT_SIDE, TEXT_WIDTH, clip_encoder, scheduler, t5_encoder, transformer, unet
from .scenes import CLASSES


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
    pad = tokenizer.pad_token_id
    if model == "sd":
        return Conditioned(clip_encoder(tokenizer), unet(), pad)
    return Conditioned(t5_encoder(tokenizer), transformer(), pad)


class Autoencoding(nn.Module):
    """The autoencoder with its loss."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Difference of the picture that comes back, and a weak pull of the latents to a normal distribution."""
        latents = self.vae.encode(pictures).latent_dist
        back, wanted = self.compared(latents.mean + latents.std * noise, pictures)
        difference = nn.functional.l1_loss(back.float(), wanted) + nn.functional.mse_loss(back.float(), wanted)
        # In float32: squares of half-precision numbers are too coarse.
        mean, spread = latents.mean.float(), latents.logvar.float()
        pull = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        return difference + 1e-3 * pull

    def compared(self, latents: torch.Tensor, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What comes back, and what should."""
        return self.vae.decode(latents).sample, pictures


class Reading(nn.Module):
    """
    The text encoder with questions that teach it to read: what is at each of 8 x 8 places of the picture, or of the
    first and the last frame?

    This stands in for the pretraining that the text encoders of large pipelines have behind them.
    """

    def __init__(self, conditioned: Conditioned, pictures: int = 1):
        super().__init__()
        self.conditioned = type(conditioned)(conditioned.text_encoder, nn.Identity(), conditioned.pad)
        self.places = nn.Parameter(torch.randn(pictures * LATENT_SIDE**2, TEXT_WIDTH) * 0.5)
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
