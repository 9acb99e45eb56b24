"""What the networks learn besides the denoiser: a module each, whose forward gives its loss."""

import torch
from diffusers import AutoencoderTiny
from torch import nn

from .networks import CHANNELS, LATENT_SIDE

# Of latents that the denoiser made, as a share of their deviation: the decoder learns to look past it.
NOISE = 0.08


class Reading(nn.Module):
    """
    The text encoder with a question that teaches it to read: what is at each of 8 x 8 places of the picture?

    This stands in for the pretraining that the text encoders of large pipelines have behind them.
    """

    def __init__(self, text_encoder: nn.Module, width: int):
        super().__init__()
        self.text_encoder = text_encoder
        self.places = nn.Parameter(torch.randn(LATENT_SIDE**2, width) * 0.5)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.answer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, CHANNELS))

    def forward(self, tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the latents."""
        states = self.text_encoder(tokens)[0]
        asked = self.places.expand(len(tokens), -1, -1)
        told, _ = self.attention(asked, states, states, need_weights=False)
        answer = self.answer(asked + told).float()
        return nn.functional.mse_loss(answer, latents.flatten(2).transpose(1, 2))


class Decoding(nn.Module):
    """The decoder with its loss; the encoder stays as it is."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        self.decoder = vae.decoder
        self.scale = vae.config.scaling_factor

    def forward(self, latents: torch.Tensor, noise: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """Difference of the picture that comes back."""
        back = self.decoder((latents + NOISE * noise) / self.scale).float()
        return nn.functional.l1_loss(back, pictures) + nn.functional.mse_loss(back, pictures)
