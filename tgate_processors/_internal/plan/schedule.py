"""When attention is computed, stored and reused: pure Python, no torch."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, SupportsFloat, SupportsIndex

from .combinations import check_combinations, check_levels
from .planning import optimistic_plan, plan_of_levels, plan_with_gate
from .step_plan import Level, StepPlan
from .validation import (
    is_choice,
    is_plan,
    shown,
    validate_gate_step,
    validate_int,
    validate_levels,
    validate_switch,
    validate_tolerance,
)

GuidanceMode = Literal["drop", "predict"]
# What stands for a schedule where nothing but its first argument is to be said.
GateStep = SupportsIndex | SupportsFloat | str

# The default of `tolerance`, with forecast steps and without.
FORECAST_TOLERANCE = 0.2
HALF_STEP_TOLERANCE = 0.6


@dataclass(frozen=True)
class TGateSchedule:
    r"""
    The T-GATE schedule: which steps compute, store or reuse each kind of attention.

    Steps are inference steps, counted from 0: one step is one tick of the pipeline's progress bar, also for schedulers
    that call the denoiser twice a step (Heun, KDPM2) or repeat the first timestep (PNDM).

    Args:
        gate_step (`int`, `float` or `str`, *optional*, defaults to `"auto"`):
            With `"auto"` the run decides how much of each step is computed, by the measured error of what is predicted:
            see `tolerance`. A number is how many steps compute cross-attention: its output is stored in step
            `gate_step - 1` and reused from step `gate_step` on, where half of the guidance batch is left out too.
            A `float` in (0, 1) is a share of the steps that really run, rounded to the nearest step and at least 1.
            A plan of letters such as `"FFFF-F--FH"` is `levels`.
        sp_interval (`int`, *optional*, defaults to `1`):
            In the semantics-planning phase self-attention is computed every `sp_interval` steps. `1` computes it in
            every step.
        fi_interval (`int`, *optional*, defaults to `1`):
            In the fidelity-improving phase self-attention is computed every `fi_interval` steps. `1` computes it in
            every step.
        warm_up (`int`, *optional*, defaults to `0`):
            Number of first steps in which self-attention is always computed.
        guidance (`str`, *optional*):
            What happens to classifier-free guidance after the gate. `"drop"`: it ends, and cross-attention keeps the
            mean of the two halves. `"predict"`: only the conditional half is computed, with its own cross-attention,
            and its difference from the other half is predicted from the last full steps. Defaults to `"predict"` with
            `gate_step="auto"`, else to `"drop"`.
        cfg_interval (`int`, *optional*):
            With `guidance="predict"`, every `cfg_interval`-th step after the gate is a full step, in which guidance and
            cross-attention are computed and kept anew. By default there are none.
        tolerance (`float`, *optional*):
            With `gate_step="auto"`, the accepted error of the guided output, relative to that output. Every step that
            calls the denoiser measures it. The larger it is, the fewer steps are full. `0` makes every step a full one,
            `math.inf` accepts any error. Defaults to `0.2`, and with `forecast=False` to `0.6`.
        forecast (`bool`, *optional*):
            With `gate_step="auto"`, whether there are forecast steps: the denoiser is not called in them, and what it
            would give is extrapolated from its last two outputs. Defaults to `True`.
        levels (`str`, *optional*):
            A fixed plan in the place of `gate_step`: a letter for each step that runs, `"F"` for a full step, `"H"` for
            a half step and `"-"` for a forecast step, such as `"FFFF-F--FH"`. Guidance is predicted.

    Raises:
        TypeError: If a setting is not a number of the right kind.
        ValueError: If a setting is out of range, or has no meaning together with the others.

    Example:

    ```py
    >>> from tgate_processors import TGateSchedule

    >>> schedule = TGateSchedule(gate_step=2)
    >>> [step.cross_attention.value for step in schedule.plan(4)]
    ['compute', 'store', 'reuse', 'reuse']
    ```

    Source: T-GATE, "Faster Diffusion via Temporal Attention Decomposition" (https://arxiv.org/abs/2404.02747); its
    *m* is `gate_step`, its *k* is `sp_interval`, its *w* is `warm_up`.
    """

    gate_step: int | float | str = "auto"
    sp_interval: int = 1
    fi_interval: int = 1
    warm_up: int = 0
    guidance: GuidanceMode | None = None
    cfg_interval: int | None = None
    tolerance: float | None = None
    forecast: bool | None = None
    levels: str | None = None

    def __post_init__(self) -> None:
        if is_plan(self.gate_step):
            if self.levels is not None:
                check_levels(self)
            object.__setattr__(self, "levels", self.gate_step)
            object.__setattr__(self, "gate_step", "auto")
        checked: dict[str, object] = {"gate_step": validate_gate_step(self.gate_step)}
        for name, minimum in (("sp_interval", 1), ("fi_interval", 1), ("warm_up", 0)):
            checked[name] = validate_int(name, getattr(self, name), minimum)
        if not is_choice("guidance", self.guidance, "drop", "predict"):
            raise ValueError(f'`guidance` must be "drop" or "predict", got {shown(self.guidance)}.')
        validate_switch("forecast", self.forecast)
        if self.levels is not None:
            validate_levels(self.levels)
        checked["guidance"] = self.guidance or ("predict" if self.is_auto or self.levels else "drop")
        checked["forecast"] = "-" in self.levels if self.levels else self.is_auto and self.forecast is not False
        if self.cfg_interval is not None:
            checked["cfg_interval"] = validate_int("cfg_interval", self.cfg_interval, 1)
        if self.is_auto or self.tolerance is not None:
            default = FORECAST_TOLERANCE if checked["forecast"] else HALF_STEP_TOLERANCE
            checked["tolerance"] = validate_tolerance(self.tolerance, default=default)
        check_levels(self)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        check_combinations(self)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> TGateSchedule:
        """
        Load a schedule from a JSON file.

        Args:
            path (`str` or `os.PathLike`): The file, as [`to_json_file`] writes it; settings may be left out.

        Returns:
            `TGateSchedule`: The schedule.

        Raises:
            ValueError: If the file is no JSON object, has other settings, or one that is out of range.
        """
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} must be a JSON file, but cannot be read as one: {error}.") from error
        names = [field.name for field in fields(cls)]
        if not isinstance(settings, dict):
            raise ValueError(f"{str(path)!r} must have a JSON object with settings, got {shown(settings)}.")
        unknown = [name for name in settings if name not in names]
        if unknown:
            raise ValueError(f"{str(path)!r} must have settings of {', '.join(names)}, got {', '.join(unknown)}.")
        return cls(**settings)

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """
        Save the schedule to a JSON file.

        Args:
            path (`str` or `os.PathLike`): The file. It is overwritten if it exists.
        """
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @property
    def is_auto(self) -> bool:
        """Whether the run itself decides how much of each step is computed."""
        return self.gate_step == "auto" and self.levels is None

    @property
    def predicts(self) -> bool:
        """Whether guidance goes on after the gate, predicted."""
        return self.guidance == "predict"

    def resolve_gate_step(self, num_inference_steps: int) -> int:
        """
        Give `gate_step` as a number of steps.

        Args:
            num_inference_steps (`int`): Number of steps that really run.

        Returns:
            `int`: The first step of the fidelity-improving phase; with `"auto"` the first one that it can be.
        """
        num_inference_steps = validate_int("num_inference_steps", num_inference_steps, 0)
        if isinstance(self.gate_step, str):
            skipping = (i for i, step in enumerate(self.plan(num_inference_steps)) if step.level is not Level.FULL)
            return next(skipping, num_inference_steps)
        if isinstance(self.gate_step, int):
            return self.gate_step
        return max(1, math.floor(self.gate_step * num_inference_steps + 0.5))

    def plan(self, num_inference_steps: int) -> tuple[StepPlan, ...]:
        """
        Give the plan of every step.

        An output is stored only where a later step reuses it, so no tensor is held for nothing. With
        `gate_step="auto"` this is the plan with the fewest full steps that a run can have.

        Args:
            num_inference_steps (`int`): Number of steps that really run.

        Returns:
            `tuple` of `StepPlan`: One entry per step.

        Raises:
            ValueError: If `levels` has another number of steps.
        """
        num_inference_steps = validate_int("num_inference_steps", num_inference_steps, 0)
        if self.levels is not None:
            return plan_of_levels(self, self.levels, num_inference_steps)
        if isinstance(self.gate_step, str):
            return optimistic_plan(self, num_inference_steps)
        return plan_with_gate(self, self.resolve_gate_step(num_inference_steps), num_inference_steps)


def as_schedule(
    given: TGateSchedule | GateStep,
    name: str = "gate_step",
    *,
    guidance: GuidanceMode | None = None,
    tolerance: SupportsFloat | None = None,
) -> TGateSchedule:
    """
    Make a schedule of what stands for one.

    Args:
        given (`TGateSchedule`, `int`, `float` or `str`): A schedule, or the `gate_step` of one.
        name (`str`, *optional*, defaults to `"gate_step"`): The argument that it was given as.
        guidance (`str`, *optional*): What happens to guidance, if it is a `gate_step`.
        tolerance (`float`, *optional*): The accepted error, if it is a `gate_step`.

    Returns:
        `TGateSchedule`: The schedule.
    """
    if not isinstance(given, TGateSchedule):
        # Numbers of every kind, numpy's too, become ints and floats.
        gate_step: Any = given if is_plan(given) else validate_gate_step(given, name, "a TGateSchedule")
        accepted: Any = tolerance
        return TGateSchedule(gate_step, guidance=guidance, tolerance=accepted)
    for name, value in (("guidance", guidance), ("tolerance", tolerance)):
        if value is not None:
            setting = f"{name}={shown(value)}"
            raise ValueError(
                f"`{name}` must be left out beside a TGateSchedule, got {shown(value)}. Put it in the schedule: "
                f"TGateSchedule(..., {setting})."
            )
    return given
