"""The networks of the pipeline for 64 x 64 pixels, each of the real kind and small."""

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import nn

from examples.testbeds.shapes.networks import TEXT_WIDTH

# Latents of a square of 8 x 8 pixels.
PATCH = 8
CHANNELS = 16
LATENT_SIDE = 8
ENCODER_WIDTH, DECODER_WIDTH = 48, 24
# What the decoder gets stays where its first function is close to a line.
MAGNITUDE = 0.2


def autoencoder(mean: torch.Tensor, components: torch.Tensor) -> AutoencoderTiny:
    """
    64 x 64 pixels to 8 x 8 latents and back: the encoder is done, the decoder is untrained.

    The encoder is linear: it multiplies the pixels of each square, less their mean (192), with components (16 x 192).
    """
    vae = AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(ENCODER_WIDTH,) * 4,
        decoder_block_out_channels=(DECODER_WIDTH,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(4, 2, 2, 1),
        scaling_factor=1 / MAGNITUDE,
    )
    with torch.no_grad():
        set_encoder(vae.encoder.layers, mean, components * MAGNITUDE)
        start_decoder(vae.decoder)
    return vae


def set_encoder(layers: nn.Sequential, mean: torch.Tensor, components: torch.Tensor) -> None:
    """Three convolutions that gather each square's pixels, and one that weighs them."""
    first, *gathering, last = layers
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for channel in range(3):
        # The class brings pixels to 0 to 1 first.
        first.weight[channel, channel, 1, 1] = 2
    nn.init.constant_(first.bias[:3], -1)
    # The pixels of a square of 4 x 4 fit into the channels; each gathering orders them as pixel_unshuffle does.
    for layer, channels in zip(gathering[:2], (3, 12), strict=True):
        for channel in range(channels):
            for place in range(4):
                layer.weight[4 * channel + place, channel, 1 + place // 2, 1 + place % 2] = 1
    # The last gathering weighs too: it makes 16 channels of four squares of 4 x 4.
    quarters = gathered(components)
    for place in range(4):
        gathering[2].weight[:CHANNELS, :, 1 + place // 2, 1 + place % 2] = quarters[:, :, place]
    for channel in range(CHANNELS):
        last.weight[channel, channel, 1, 1] = 1
    last.bias.copy_(-components @ mean)


def gathered(components: torch.Tensor) -> torch.Tensor:
    """Components of pixels, 16 x 192, ordered as the convolutions gather them: 16 x 48 x 4."""
    # 16, colour, then rows and columns from the eighth to the pixel: which 4 x 4, which 2 x 2 in it, which pixel in it.
    parts = components.reshape(CHANNELS, 3, 2, 2, 2, 2, 2, 2)
    # colour; pixel's row, column; 2 x 2's row, column; 4 x 4's row, column.
    return parts.permute(0, 1, 4, 7, 3, 6, 2, 5).reshape(CHANNELS, ENCODER_WIDTH, 4)


def start_decoder(decoder: nn.Module) -> None:
    """Without norms, torch's first weights make signals fade: keep their size, and begin with the shortcuts."""
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for block in decoder.modules():
        if isinstance(block, AutoencoderTinyBlock):
            *inner, outer = (layer for layer in block.conv if isinstance(layer, nn.Conv2d))
            for layer in inner:
                layer.weight *= 2**0.5
            outer.weight *= 0.1


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
