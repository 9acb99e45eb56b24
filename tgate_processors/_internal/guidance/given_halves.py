"""Which halves of guidance a step has to be given, and the refusal of others."""

from __future__ import annotations

from typing import Any

import torch

from ..plan.step_plan import Level


def check_halves(
    what: str, cond: Any, uncond: Any, *, level: Level, guided: bool, shape: torch.Size | None
) -> torch.Size | None:
    """
    Check that a step is given the halves that it has asked for.

    Args:
        what (`str`): The step, as messages describe it.
        cond (`torch.Tensor`, *optional*): The conditional half.
        uncond (`torch.Tensor`, *optional*): The unconditional half.
        level (`Level`): The level of the step.
        guided (`bool`): Whether it has guidance of two halves.
        shape (`torch.Size`, *optional*): The shape of the halves before.

    Returns:
        `torch.Size`, *optional*: The shape of the halves.

    Raises:
        TypeError: If a half is not a tensor.
        ValueError: If it is given others, or such as do not fit together.
    """
    given = {name: half for name, half in (("cond", cond), ("uncond", uncond)) if half is not None}
    for name, half in given.items():
        if not isinstance(half, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(half).__name__}.")
    expected, remedy = _asked(level, guided=guided)
    if tuple(given) != expected:
        raise ValueError(f"T-GATE: {what}: end_step takes {_listed(expected)}, got {_listed(tuple(given))}. {remedy}")
    for name, half in given.items():
        if shape is not None and half.shape != shape:
            before = "the halves before had" if name == "cond" else "cond has"
            raise ValueError(
                f"T-GATE: {what}: {name} has the shape {tuple(half.shape)}, and {before} {tuple(shape)}. Pass halves "
                "of one shape, and call forget() before a step in which the size changes."
            )
        shape = half.shape
    return shape


def _asked(level: Level, *, guided: bool) -> tuple[tuple[str, ...], str]:
    """The halves that a step asks for, and what to do where others are given."""
    if level is Level.FORECAST:
        return (), "Do not call the denoiser in this step."
    if level is Level.HALF:
        return ("cond",), "Compute only the conditional half in this step."
    if guided:
        return ("cond", "uncond"), "Compute both halves in this step."
    return ("cond",), "Compute one prediction, or set guidance_scale to a number above 1 before begin_step."


def _listed(names: tuple[str, ...]) -> str:
    """The names of halves, for messages."""
    return " and ".join(names) if len(names) > 1 else f"only {names[0]}" if names else "nothing"
