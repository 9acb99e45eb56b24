"""Predict the difference of the two halves of guidance: pure functions of tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

# What is left of a trend one pass later.
_DAMPING = 0.7


class CFGDifference(NamedTuple):
    """
    The difference of the two halves of a denoiser's output, in one pass of the loop.

    Args:
        position (`int`): The pass.
        value (`torch.Tensor`): Second half minus first half, the samples in the first dimension.
    """

    position: int
    value: torch.Tensor


def predict(history: Sequence[CFGDifference], position: int) -> torch.Tensor:
    r"""
    Predict the difference of a later pass from the last two of a history.

    Let `a` and `b` be these two, `h` passes apart, and `k` the passes from `b` to the one to predict. The result is the
    mean of two predictions, made for each sample separately:

    - decay, `b * r**k` with `r = clamp(<a, b> / <a, a>, 0, 1)**(1 / h)`: the difference shrinks on as it did from `a`
      to `b`;
    - damped trend, `b + (b - a) / h * (d + d**2 + ... + d**k)` with `d = 0.7`, no longer than `b`.

    If the history has only one difference, that is the prediction.

    Args:
        history (`Sequence` of `CFGDifference`): The last one or two, in order.
        position (`int`): The pass.

    Returns:
        `torch.Tensor`: The difference, of the shape and type of those in the history.
    """
    last = history[-1]
    if len(history) == 1:
        return last.value
    before = history[-2]
    of_before, of_last = _weights(before.value, last.value, last.position - before.position, position - last.position)
    predicted = _scale_samples(last.value, of_last) + _scale_samples(before.value, of_before)
    return predicted.to(last.value.dtype)


def apply_cfg(halves: Sequence[torch.Tensor], uncond_index: int, scale: Any) -> torch.Tensor:
    """
    Apply classifier-free guidance to both halves, as the pipeline does.

    Args:
        halves (`Sequence` of `torch.Tensor`): The two halves.
        uncond_index (`int`): Which of them is the unconditional one, 0 or 1.
        scale (`float` or `torch.Tensor`): Guidance scale.

    Returns:
        `torch.Tensor`: The unconditional half, plus `scale` times the conditional half minus the unconditional one.
    """
    start = halves[uncond_index]
    guided: torch.Tensor = start + scale * (halves[1 - uncond_index] - start)
    return guided


def relative_error(predicted: torch.Tensor, computed: torch.Tensor, guided: torch.Tensor, scale: Any) -> torch.Tensor:
    """
    How far off the guided output would have been with a predicted difference, relative to that output.

    Args:
        predicted (`torch.Tensor`): The difference as predicted.
        computed (`torch.Tensor`): The difference as computed.
        guided (`torch.Tensor`): The guided output, unconditional half plus `scale` times the difference.
        scale (`float` or `torch.Tensor`): Guidance scale.

    Returns:
        `torch.Tensor`: One error for every sample, in `float32`.
    """
    off = (predicted.float() - computed.float()) * scale
    return _norm(off) / _norm(guided.float()).clamp_min(torch.finfo(torch.float32).tiny)


def largest_error(forecast: torch.Tensor, computed: torch.Tensor, parts: int, scale: Any) -> torch.Tensor:
    """
    How far off guidance of several parts may be with a forecast of all of them, whatever it makes of them.

    It adds differences of parts to one of them, so it is off by no more than the largest error of a part, and `scale`
    times the largest error of a difference of two, where one scale is not above `scale` and the others are small.

    Args:
        forecast (`torch.Tensor`): The parts as forecast, one after the other in the first dimension.
        computed (`torch.Tensor`): The parts as computed.
        parts (`int`): Their number.
        scale (`float` or `torch.Tensor`): The largest guidance scale.

    Returns:
        `torch.Tensor`: One error for every sample, relative to the longest part, in `float32`.
    """
    off = (forecast.float() - computed.float()).chunk(parts)
    pairs = [_norm(first - second) for first, second in itertools.combinations(off, 2)]
    length = torch.stack([_norm(part) for part in computed.float().chunk(parts)]).amax(0)
    apart = torch.stack(pairs).amax(0) * scale if pairs else 0.0
    largest: torch.Tensor = torch.stack([_norm(part) for part in off]).amax(0) + apart
    return largest / length.clamp_min(torch.finfo(torch.float32).tiny)


def _weights(a: torch.Tensor, b: torch.Tensor, h: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the last two differences in the prediction, for every sample."""
    tiny = torch.finfo(torch.float32).tiny
    aa, ab, bb = _dot(a, a), _dot(a, b), _dot(b, b)
    decay = (ab / aa.clamp_min(tiny)).clamp(0, 1) ** (k / h)
    trend = _DAMPING * (1 - _DAMPING**k) / (1 - _DAMPING) / h
    length = ((1 + trend) ** 2 * bb - 2 * trend * (1 + trend) * ab + trend**2 * aa).clamp_min(tiny)
    limit = (bb / length).sqrt().clamp(max=1)
    return -0.5 * limit * trend, 0.5 * (decay + limit * (1 + trend))


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Dot product of every sample, in `float32`: half precision overflows."""
    return (a.float() * b.float()).flatten(1).sum(1)


def _norm(a: torch.Tensor) -> torch.Tensor:
    """Length of every sample."""
    return _dot(a, a).sqrt()


def _scale_samples(value: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply every sample by its own weight."""
    return value.float() * weights.view(-1, *[1] * (value.dim() - 1))
