"""How often a pipeline draws what a prompt says, on prompts that training has never seen."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .clips import FRAMES, Clip, all_clips, score_clips
from .scenes import SIDE, Scene, all_scenes
from .scorer import Score, score
from .tokens import LENGTH, THIRD_LENGTH

PARTS = ("layout", "shapes", "sizes", "colours")


def evenly(scenes: list[Any], count: int) -> list[Any]:
    """Some of the scenes, in equal steps through all of them; all of them if there are fewer."""
    count = min(count, len(scenes))
    return [scenes[i * len(scenes) // count] for i in range(count)]


def held_out(model: str, easy: int, hard: int) -> list[Any]:
    """Scenes or clips with captions that training does not see: first easier ones, then others."""
    hidden = [scene for scene in (all_clips() if model == "wan" else all_scenes()) if scene.held_out]
    return evenly([scene for scene in hidden if scene.easy], easy) + evenly(
        [scene for scene in hidden if not scene.easy], hard
    )


def held_out_scenes(ones: int, twos: int) -> list[Scene]:
    """Scenes that training does not see: the first `ones` with one object, the rest with two."""
    return held_out("sd", ones, twos)


def draws_videos(pipe: Any) -> bool:
    """Whether a pipeline makes clips."""
    return "num_frames" in inspect.signature(pipe.__call__).parameters


def call_options(pipe: Any) -> dict[str, Any]:
    """What a call of a small pipeline needs besides the prompt."""
    if draws_videos(pipe):
        return {"height": SIDE, "width": SIDE, "num_frames": FRAMES, "max_sequence_length": LENGTH}
    if not hasattr(pipe, "transformer"):
        return {}
    if "prompt_3" in inspect.signature(pipe.__call__).parameters:
        return {"max_sequence_length": THIRD_LENGTH}
    # PixArt knows no resolutions as small as 32 x 32.
    return {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": LENGTH}


def pictures_of(
    pipe: Any,
    scenes: list[Any],
    seed: int = 0,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> np.ndarray:
    """
    A picture of each scene from its caption, N x 32 x 32 x 3, or the frames of each clip, N x 5 x 32 x 32 x 3.

    Each has a seed of its own, counted from `seed`.
    After each batch `advance` is called with the number of its pictures.
    """
    parts = []
    for start in range(0, len(scenes), batch_size):
        part = scenes[start : start + batch_size]
        numbers = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        prompts = [scene.caption for scene in part]
        call = call_options(pipe) | {"generator": numbers, "output_type": "np"} | options
        made = pipe(prompts, **call)
        parts.append(made.frames if draws_videos(pipe) else made.images)
        advance(len(part))
    return np.concatenate(parts)


def scores_of(pictures: np.ndarray, scenes: list[Any]) -> list[Score]:
    """Whether each picture or clip shows what it should."""
    return (score_clips if isinstance(scenes[0], Clip) else score)(pictures, scenes)


def shares(scenes: list[Any], scores: list[Score]) -> dict[str, float]:
    """Share of pictures that are right, in all and in parts; a part that has no pictures is not a number."""

    def mean(values: list[bool]) -> float:
        return sum(values) / len(values) if values else float("nan")

    right: dict[bool, list[bool]] = {True: [], False: []}
    for scene, one in zip(scenes, scores, strict=True):
        right[scene.easy].append(one.right)
    kinds = ("at rest", "moving") if isinstance(scenes[0], Clip) else ("one object", "two objects")
    parts = {part: mean([getattr(one, part) for one in scores]) for part in PARTS}
    return {
        "all right": mean(right[True] + right[False]),
        kinds[0]: mean(right[True]),
        kinds[1]: mean(right[False]),
        **parts,
    }


def measure(pipe: Any, scenes: list[Any], **options: Any) -> dict[str, float]:
    """Draw and score."""
    return shares(scenes, scores_of(pictures_of(pipe, scenes, **options), scenes))
