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
# Where the model predicts a flow, on a straight line from noise to the picture. DEIS would leave some of the noise.
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (SOLVERS[name][0], SOLVERS[name][1] | FLOW) for name in ("dpm-2", "dpm-3", "unipc")},
    "euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
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
SHIFTS = (0.5, 1.0, 2.0, 3.0)
# Densely at both ends: the share of the cosine in the place of a time.
BY_HAND = {"ends-0.3": 0.3, "ends-0.5": 0.5, "ends-0.7": 0.7, "ends-1": 1.0}


def kind_of(spacing: str) -> str:
    """Who places the times."""
    return "by hand" if spacing in BY_HAND else "offered"


def is_flow(config: Any) -> bool:
    """Whether the model that a scheduler belongs to predicts a flow."""
    return config.get("prediction_type") == "flow_prediction" or "shift" in config


def solvers_of(config: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The solvers that know what the model of a scheduler predicts."""
    return FLOW_SOLVERS if is_flow(config) else SOLVERS


def spacings_of(config: Any, solver: str) -> list[str]:
    """The spacings that a solver takes. Without sigmas, as DDIM is, it knows no times but evenly spaced ones."""
    if is_flow(config):
        shifts = dict.fromkeys([*(f"shift-{shift:g}" for shift in SHIFTS), own_spacing(config)])
        return [*shifts, *BY_HAND]
    kind, _ = SOLVERS[solver]
    known = inspect.signature(kind).parameters
    offered = [name for name, options in OFFERED.items() if options.keys() <= known.keys()]
    return offered + (list(BY_HAND) if "use_karras_sigmas" in known else [])


def own_spacing(config: Any) -> str:
    """The spacing that a scheduler's configuration names."""
    if is_flow(config):
        return f"shift-{config.get('flow_shift', config.get('shift')):g}"
    spacing = config.get("timestep_spacing", "linspace")
    return {"linspace": "even"}.get(spacing, spacing)


def scheduler_for(config: Any, solver: str, spacing: str) -> Any:
    """A new scheduler."""
    kind, options = solvers_of(config)[solver]
    if spacing in BY_HAND:
        return _placed(kind, BY_HAND[spacing]).from_config(config, **options)
    if is_flow(config):
        shift = "shift" if solver == "euler" else "flow_shift"
        return kind.from_config(config, **options, **{shift: float(spacing.removeprefix("shift-"))})
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
            if is_flow(self.config):
                placed = times / self.config.num_train_timesteps
            else:
                known = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().cpu().numpy()
                placed = np.interp(times, np.arange(len(known)), known)
            self.timesteps = torch.from_numpy(times).to(self.timesteps)
            self.sigmas[:-1] = torch.from_numpy(placed)

    return Placed
