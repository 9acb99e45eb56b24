"""Solvers of diffusers, and where each may place its times: as diffusers offers it, or by hand."""

import inspect
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch

SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm-2": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpm-3": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}
# By an argument of the scheduler.
OFFERED: dict[str, dict[str, Any]] = {
    "even": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
}
# Densely at both ends: the share of the cosine in the place of a time.
BY_HAND = {"ends-0.3": 0.3, "ends-0.5": 0.5, "ends-0.7": 0.7, "ends-1": 1.0}


def kind_of(spacing: str) -> str:
    """Who places the times."""
    return "by hand" if spacing in BY_HAND else "offered"


def spacings_of(solver: str) -> list[str]:
    """The spacings that a solver takes. Without sigmas, as DDIM is, it knows no times but evenly spaced ones."""
    kind, _ = SOLVERS[solver]
    known = inspect.signature(kind).parameters
    offered = [name for name, options in OFFERED.items() if options.keys() <= known.keys()]
    return offered + (list(BY_HAND) if "use_karras_sigmas" in known else [])


def own_spacing(config: Any) -> str:
    """The spacing that a scheduler's configuration names."""
    spacing = config.get("timestep_spacing", "linspace")
    return {"linspace": "even"}.get(spacing, spacing)


def scheduler_for(config: Any, solver: str, spacing: str) -> Any:
    """A new scheduler."""
    kind, options = SOLVERS[solver]
    if spacing in BY_HAND:
        return _placed(kind, BY_HAND[spacing]).from_config(config, **options)
    return kind.from_config(config, **options, **OFFERED[spacing])


def dense_at_both_ends(steps: int, share: float, last: int) -> np.ndarray:
    """Times from `last` down, the nearer to each other the nearer they are to either end."""
    part = np.arange(steps) / steps
    return last * ((1 - share) * (1 - part) + share * (1 + np.cos(np.pi * part)) / 2)


@cache
def _placed(kind: Any, share: float) -> Any:
    """The scheduler with times of its own: few take them as an argument of `set_timesteps`."""

    class Placed(kind):
        def set_timesteps(self, num_inference_steps: int, device: Any = None, **options: Any) -> None:
            super().set_timesteps(num_inference_steps, device=device, **options)
            times = dense_at_both_ends(num_inference_steps, share, self.config.num_train_timesteps - 1).round()
            known = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().cpu().numpy()
            self.timesteps = torch.from_numpy(times).to(self.timesteps)
            self.sigmas[:-1] = torch.from_numpy(np.interp(times, np.arange(len(known)), known))

    return Placed
