"""How noisy the latents are in every pass, as far as a scheduler tells."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

# Beyond this, more or less noise is all the same.
_LIMIT = 8.0


def noise_levels(scheduler: Any) -> list[float] | None:
    """
    Give half the logarithm of the signal-to-noise ratio for each of `scheduler.timesteps`, by what the scheduler has.

    Args:
        scheduler (`SchedulerMixin`): The scheduler, its timesteps set. They are read: one wait if they lie on a device.

    Returns:
        `list` of `float`, *optional*: One for each timestep, rising. Nothing if the scheduler has no such scale.
    """
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    cumulated = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(sigmas, torch.Tensor) and sigmas.dim() == 1 and len(sigmas) >= len(timesteps):
        levels = _of_sigmas(sigmas[: len(timesteps)].tolist())
    elif isinstance(cumulated, torch.Tensor) and not timesteps.is_floating_point():
        share = cumulated[timesteps.long().clamp(0, len(cumulated) - 1).cpu()].double()
        levels = (0.5 * torch.log(share / (1 - share))).tolist()
    else:
        return None
    levels = [min(max(level, -_LIMIT), _LIMIT) for level in levels]
    rises = all(after >= before for before, after in itertools.pairwise(levels))
    return levels if rises and levels[-1] > levels[0] else None


def _of_sigmas(sigmas: list[float]) -> list[float]:
    """Of flow matching, whose sigmas are the share of noise, or of the others, whose sigmas are noise over signal."""
    flow = max(sigmas) <= 1
    return [_log((1 - sigma) if flow else 1.0) - _log(sigma) for sigma in sigmas]


def _log(value: float) -> float:
    """The logarithm, also of zero."""
    return math.log(value) if value > 0 else -math.inf
