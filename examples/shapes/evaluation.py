"""How often a pipeline draws what a prompt says, on prompts that training has never seen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .scenes import Scene, all_scenes
from .scorer import Score, score
from .tokens import LENGTH

COLUMNS = ("all right", "one object", "two objects", "layout", "shapes", "sizes", "colours")


def evenly(scenes: list[Scene], count: int) -> list[Scene]:
    """Some of the scenes, in equal steps through all of them."""
    return [scenes[i * len(scenes) // count] for i in range(count)]


def held_out_scenes(ones: int, twos: int) -> list[Scene]:
    """Scenes with captions that training does not see: the first `ones` with one object, the rest with two."""
    held_out = [scene for scene in all_scenes() if scene.held_out]
    single = [scene for scene in held_out if len(scene.things) == 1]
    double = [scene for scene in held_out if len(scene.things) == 2]
    return evenly(single, ones) + evenly(double, twos)


def call_options(pipe: Any) -> dict[str, Any]:
    """What a call needs besides the prompt: PixArt knows no resolutions as small as 32 x 32."""
    if not hasattr(pipe, "transformer"):
        return {}
    return {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": LENGTH}


def pictures_of(
    pipe: Any,
    scenes: list[Scene],
    seed: int = 0,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> np.ndarray:
    """
    A picture of each scene from its caption, N x 32 x 32 x 3; each has a seed of its own, counted from `seed`.

    After each batch `advance` is called with the number of its pictures.
    """
    parts = []
    for start in range(0, len(scenes), batch_size):
        part = scenes[start : start + batch_size]
        numbers = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        prompts = [scene.caption for scene in part]
        call = call_options(pipe) | {"generator": numbers, "output_type": "np"} | options
        parts.append(pipe(prompts, **call).images)
        advance(len(part))
    return np.concatenate(parts)


def shares(scenes: list[Scene], scores: list[Score]) -> dict[str, float]:
    """Share of pictures that are right, in all and in parts; a part that has no pictures is not a number."""

    def mean(values: list[bool]) -> float:
        return sum(values) / len(values) if values else float("nan")

    right = {1: [], 2: []}
    for scene, one in zip(scenes, scores, strict=True):
        right[len(scene.things)].append(one.right)
    parts = {part: mean([getattr(one, part) for one in scores]) for part in COLUMNS[3:]}
    return {
        "all right": mean(right[1] + right[2]),
        "one object": mean(right[1]),
        "two objects": mean(right[2]),
        **parts,
    }


def measure(pipe: Any, scenes: list[Scene], **options: Any) -> dict[str, float]:
    """Draw and score."""
    return shares(scenes, score(pictures_of(pipe, scenes, **options), scenes))
