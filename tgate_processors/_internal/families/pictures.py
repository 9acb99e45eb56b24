"""Further image models with joint attention, of which guidance alone is gated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .family import InputShapes, InputSize, Shapes
from .joint import by_values, flux_shapes, joint_family


def _longcat(config: Any, batch: int, size: InputSize) -> Shapes:
    return {name: shape for name, shape in flux_shapes(config, batch, size).items() if name != "pooled_projections"}


def _fibo(config: Any, batch: int, size: InputSize) -> Shapes:
    pixels, blocks = size.height * size.width, config.num_layers + config.num_single_layers
    text = torch.empty(batch, size.tokens, config.text_encoder_dim, device="meta")
    return {
        "hidden_states": (batch, pixels, config.in_channels),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.joint_attention_dim),
        "text_encoder_layers": [text] * blocks,
        "img_ids": (pixels, 3),
        "txt_ids": (size.tokens, 3),
    }


def _joy(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        # The picture that is edited, and the one that is drawn.
        "hidden_states": (batch, 2, config.in_channels, 1, size.height, size.width),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.text_dim),
    }


def _of_latents(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Tokens of the latents, which the pipeline numbers apart from those of a given picture."""
    kinds = given["img_ids"][:, 0]
    return [tensors[0][:, : len(kinds) if kinds.is_meta else int((kinds == kinds[0]).sum())]]


def _of_last(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Tokens of the last picture, the one that is drawn; before them stand the text, and pictures that are given."""
    return [tensors[0][:, -math.prod(given["img_shapes"][0][-1]) :]]


def _reads_given(given: Mapping[str, Any]) -> bool:
    """Whether the denoiser reads a given picture, whose keys it keeps."""
    caches = given.get("kv_caches")
    return caches is not None and caches[0].mode == "write"


def _last(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """The picture that is drawn; those that are given stand before it."""
    return [tensors[0][:, -1:]]


PICTURES = (
    joint_family(
        "LongCatImageTransformer2DModel",
        InputShapes(_longcat, tokens=512),
        ("LongCatImagePipeline", "LongCatImageEditPipeline"),
        calls=2,
        guided=_of_latents,
    ),
    joint_family(
        "HiDreamImageTransformer2DModel",
        InputShapes(by_values, tokens=128),
        arguments=("timesteps", "encoder_hidden_states_t5", "pooled_embeds"),
        in_second=("encoder_hidden_states_llama3",),
    ),
    joint_family(
        "BriaFiboTransformer2DModel",
        InputShapes(_fibo, tokens=512, scale=16),
        ("BriaFiboPipeline", "BriaFiboEditPipeline"),
        arguments=("text_encoder_layers",),
        given_last=True,
    ),
    joint_family(
        "QwenImage21Transformer2DModel",
        InputShapes(by_values, tokens=512, scale=16),
        calls=2,
        guided=_of_last,
    ),
    joint_family("GlmImageTransformer2DModel", InputShapes(by_values, tokens=256), calls=2, before=_reads_given),
    joint_family("BriaFibo2Transformer2DModel", InputShapes(by_values, tokens=256), calls=2),
    joint_family(
        "NucleusMoEImageTransformer2DModel",
        InputShapes(by_values, tokens=512),
        ("NucleusMoEImagePipeline",),
        calls=2,
    ),
    joint_family("JoyImageEditTransformer3DModel", InputShapes(_joy, tokens=1024), calls=2, guided=_last),
)
