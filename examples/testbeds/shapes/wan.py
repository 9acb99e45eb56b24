"""The video pipeline: networks of the real kind and small, and how they learn. Older diffusers have no Wan."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from .learning import Autoencoding, Conditioned
from .networks import CHANNELS, T5, TEXT_WIDTH, spread_heads


def autoencoder() -> AutoencoderKLWan:
    """Five frames of 32 x 32 pixels to three latents of 8 x 8, and back."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        # As in Wan 2.2, squares of 2 x 2 pixels are channels: layers over single pixels would take most of the time.
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    # The latents begin with little noise: there is much to be told in few numbers, and with as much noise as signal the
    # first hundreds of steps tell little of it.
    nn.init.constant_(vae.quant_conv.bias[CHANNELS:], -4.0)
    return vae


def scheduler() -> UniPCMultistepScheduler:
    """The scheduler of Wan's own checkpoints."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)


def umt5_encoder(tokenizer: Any) -> UMT5EncoderModel:
    """PixArt's T5, with distances of its own in each layer."""
    encoder = UMT5EncoderModel(UMT5Config(**T5 | {"vocab_size": len(tokenizer)}))
    spread_heads(encoder.encoder.block)
    return encoder


def transformer() -> WanTransformer3DModel:
    """Six blocks over three times 4 x 4 patches."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=640,
        num_layers=6,
        rope_max_seq_len=32,
    )


class Flowing(Conditioned):
    """The same for Wan: on a straight line from noise to a clip, and with nothing after the end of a caption."""

    def states(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the denoiser gets of the captions, as the pipeline gives it."""
        states, mask = super().states(tokens)
        return states * mask[..., None], mask

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The loss: mean squared error of the predicted velocity."""
        # The last step is pure noise, as the first of sampling is.
        times = steps + 1
        share = (times / 1000)[:, None, None, None, None]
        states, _ = self.states(tokens)
        guess = self.denoiser(latents + share * (noise - latents), times, states).sample
        return nn.functional.mse_loss(guess.float(), noise - latents)


def conditioned(tokenizer: Any) -> Flowing:
    """The untrained text encoder and denoiser."""
    return Flowing(umt5_encoder(tokenizer), transformer(), tokenizer.pad_token_id)


def decoded(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What the decoder makes of each latent frame, before values are clamped: where they are, nothing is learned."""
    parts: list[torch.Tensor] = []
    handle = vae.decoder.register_forward_hook(lambda module, args, output: parts.append(output))
    try:
        vae.decode(latents)
    finally:
        handle.remove()
    return torch.cat(parts, 2)


class ClipAutoencoding(Autoencoding):
    """The autoencoder with its loss."""

    def compared(self, latents: torch.Tensor, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What comes back, and what should."""
        return decoded(self.vae, latents), patchify(pictures, self.vae.config.patch_size)


class ClipDecoding(nn.Module):
    """The decoder alone with its loss: it learns on while the latents stay what they are."""

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        # Not a part of this module: the encoder is not trained.
        self.whole = (vae,)

    def forward(self, latents: torch.Tensor, noise: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """Difference of the clip that comes back, with a little noise, as latents that are drawn have."""
        (vae,) = self.whole
        mean, deviation = (
            torch.tensor(vae.config[name], device=latents.device)[:, None, None, None]
            for name in ("latents_mean", "latents_std")
        )
        back = decoded(vae, (latents + 0.1 * noise) * deviation + mean).float()
        wanted = patchify(pictures, vae.config.patch_size)
        return nn.functional.l1_loss(back, wanted) + nn.functional.mse_loss(back, wanted)


def pipeline(vae: AutoencoderKLWan, text_encoder: nn.Module, denoiser: nn.Module, tokenizer: Any) -> WanPipeline:
    """The trained parts as a pipeline."""
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler()}
    return WanPipeline(transformer=denoiser, **parts)
