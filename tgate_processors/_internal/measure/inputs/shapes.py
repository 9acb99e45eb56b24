"""How a row describes the inputs of a denoiser, and tensors on the meta device made by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Arguments by name. A text is a tensor: its shape, a word for each side, and after a colon its type if that is not the
# denoiser's. A word is a number, a setting of the denoiser, or `B` for the batch, `T` for the tokens of the text, `F`,
# `H` and `W` for frames, height and width of the latent; or several of them with `*` and `+`. What is no text is an
# argument as it is, or holds some.
Shapes = Mapping[str, Any]


@dataclass(frozen=True)
class InputSize:
    """
    The size of a denoiser's inputs, for one sample.

    Args:
        height (`int`): Pixels of the latent, from top to bottom.
        width (`int`): Pixels of the latent, across.
        tokens (`int`): Tokens of the text.
        frames (`int`): Frames of the latent.
        picture (`int`): Tokens of a picture that is given, where an encoder makes some of it.
        given (`bool`): Whether parts of it are given, as by a time for every token or frame.
        crossed (`bool`): Whether attention between video and sound takes the time of the whole (LTX-2).
    """

    height: int
    width: int
    tokens: int
    frames: int
    picture: int = 257
    given: bool = False
    crossed: bool = False


@dataclass(frozen=True)
class InputShapes:
    """
    The inputs of the denoisers of a family.

    Args:
        shapes (`Mapping` or `Callable`):
            Shapes of the arguments, or what makes them of the configuration, the batch and the size.
        tokens (`int`): Text tokens if nothing says how many.
        frames (`int`, *optional*): Frames if nothing says how many; `None` for images.
        has_text_length (`bool`): Whether the number of text tokens is an argument.
        pads_to_tokenizer (`bool`): Whether pipelines pad the text to the length of their tokenizer.
        has_height_width (`bool`): Whether a sample has a height and a width.
        spatial_compression (`int`): Pixels of the sample for one of the latent, if no pipeline says it.
        temporal_compression (`int`): Frames of the video, without the first one, for one of the latent.
        has_extra_forwards (`bool`): Whether its pipelines call the denoiser further times in a step by default.
        reference_pipelines (`tuple` of `str`): Pipelines that pass the denoiser which parts are given, by a time for
            every token or frame, or by a further input.
        stand_ins (`Mapping`): Parts without weights that do not run on the meta device, and functions in their place.
    """

    shapes: Shapes | Callable[[Any, int, InputSize], Shapes]
    tokens: int
    frames: int | None = None
    has_text_length: bool = True
    pads_to_tokenizer: bool = True
    has_height_width: bool = True
    spatial_compression: int = 8
    temporal_compression: int = 1
    has_extra_forwards: bool = False
    reference_pipelines: tuple[str, ...] = ()
    stand_ins: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def materialize(inputs: InputShapes, denoiser: Any, batch: int, size: InputSize) -> dict[str, Any]:
    """Make the arguments of a forward: tensors on the meta device."""
    config = denoiser.config
    shapes = inputs.shapes(config, batch, size) if callable(inputs.shapes) else inputs.shapes
    sizes = {"B": batch, "T": size.tokens, "F": size.frames, "H": size.height, "W": size.width}

    def side(word: str) -> int:
        if word.isdigit():
            return int(word)
        return sizes[word] if word in sizes else first_of(getattr(config, word))

    def materialized(value: Any) -> Any:
        if isinstance(value, str):
            words, _, dtype = value.partition(":")
            sums = ([term.split("*") for term in word.split("+")] for word in words.split())
            shape = [sum(math.prod(map(side, factors)) for factors in terms) for terms in sums]
            return torch.empty(shape, dtype=getattr(torch, dtype) if dtype else denoiser.dtype, device="meta")
        if isinstance(value, Mapping):
            return {name: materialized(inner) for name, inner in value.items()}
        return [materialized(inner) for inner in value] if isinstance(value, list) else value

    return {name: materialized(value) for name, value in shapes.items()}


def first_of(width: Any) -> int:
    """A width that a configuration may give for every block."""
    return int(width[0] if isinstance(width, (list, tuple)) else width)
