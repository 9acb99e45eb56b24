"""When attention is computed, stored and reused: pure Python, no torch."""

from __future__ import annotations

import enum
import math
import operator
from dataclasses import dataclass
from typing import Literal

CFGHalf = Literal["unconditional", "conditional"]


class Action(enum.Enum):
    """What an attention layer does in one step."""

    COMPUTE = "compute"
    STORE = "store"
    REUSE = "reuse"


class Phase(enum.Enum):
    """The part of the run that a step belongs to (in the words of https://arxiv.org/abs/2404.02747)."""

    SEMANTICS_PLANNING = "semantics planning"
    GATE = "gate"
    FIDELITY_IMPROVING = "fidelity improving"


@dataclass(frozen=True)
class StepPlan:
    """What happens in one inference step."""

    phase: Phase
    cross_attention: Action
    self_attention: Action


@dataclass(frozen=True)
class TGateSchedule:
    r"""
    The T-GATE schedule: which steps compute, store or reuse each kind of attention.

    Steps are inference steps, counted from 0: one step is one tick of the pipeline's progress bar, also for schedulers
    that call the denoiser twice a step (Heun, KDPM2) or repeat the first timestep (PNDM).

    Args:
        gate_step (`int` or `float`, *optional*, defaults to `10`):
            Number of steps in which cross-attention is computed. Its output is stored in step `gate_step - 1` and
            reused from step `gate_step` on, where classifier-free guidance ends too. A `float` in (0, 1) is a share of
            the steps that really run, rounded to the nearest step and at least 1.
        sp_interval (`int`, *optional*, defaults to `1`):
            In the semantics-planning phase self-attention is computed every `sp_interval` steps. `1` computes it in
            every step.
        fi_interval (`int`, *optional*, defaults to `1`):
            In the fidelity-improving phase self-attention is computed every `fi_interval` steps. `1` computes it in
            every step.
        warm_up (`int`, *optional*, defaults to `0`):
            Number of first steps in which self-attention is always computed.

    Raises:
        TypeError: If a setting is not a number of the right kind.
        ValueError: If a setting is out of range.

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

    gate_step: int | float = 10
    sp_interval: int = 1
    fi_interval: int = 1
    warm_up: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "gate_step", _checked_gate_step(self.gate_step))
        for name, least in (("sp_interval", 1), ("fi_interval", 1), ("warm_up", 0)):
            object.__setattr__(self, name, checked_int(name, getattr(self, name), least))

    def resolve_gate_step(self, num_inference_steps: int) -> int:
        """
        Give `gate_step` as a number of steps.

        Args:
            num_inference_steps (`int`): Number of steps that really run.

        Returns:
            `int`: The first step of the fidelity-improving phase.
        """
        if isinstance(self.gate_step, int):
            return self.gate_step
        return max(1, math.floor(self.gate_step * num_inference_steps + 0.5))

    def plan(self, num_inference_steps: int) -> tuple[StepPlan, ...]:
        """
        Give the plan of every step.

        An output is stored only where a later step reuses it, so that no tensor is held in vain.

        Args:
            num_inference_steps (`int`): Number of steps that really run.

        Returns:
            `tuple` of `StepPlan`: One entry per step.
        """
        gate = self.resolve_gate_step(num_inference_steps)
        steps = range(num_inference_steps)
        cross = _without_idle_stores([self._cross_attention(step, gate) for step in steps])
        own = _without_idle_stores([self._self_attention(step, gate) for step in steps])
        return tuple(StepPlan(_phase(step, gate), cross[step], own[step]) for step in steps)

    def _cross_attention(self, step: int, gate: int) -> Action:
        """Cross-attention: stored in the last step before the gate, reused from the gate on."""
        if step < gate - 1:
            return Action.COMPUTE
        return Action.STORE if step == gate - 1 else Action.REUSE

    def _self_attention(self, step: int, gate: int) -> Action:
        """Self-attention: stored at the gate and at every interval, reused between."""
        if step == gate - 1:
            return Action.STORE
        if step >= gate:
            return Action.STORE if step % self.fi_interval == 0 else Action.REUSE
        if step < self.warm_up:
            return Action.COMPUTE
        return Action.STORE if step == self.warm_up or step % self.sp_interval == 0 else Action.REUSE


def _phase(step: int, gate: int) -> Phase:
    """Phase of a step."""
    if step < gate - 1:
        return Phase.SEMANTICS_PLANNING
    return Phase.GATE if step == gate - 1 else Phase.FIDELITY_IMPROVING


def _without_idle_stores(actions: list[Action]) -> list[Action]:
    """Turn every store that nothing reuses into a plain compute."""
    reused = False
    for step in reversed(range(len(actions))):
        if actions[step] is Action.REUSE:
            reused = True
        else:
            if not reused:
                actions[step] = Action.COMPUTE
            reused = False
    return actions


def _checked_gate_step(value: object) -> int | float:
    """Validate `gate_step`."""
    remedy = "give a number of steps (an int of at least 1) or a share of the steps (a float between 0 and 1)"
    share = _as_float(value)
    if share is None:
        return checked_int("gate_step", value, 1, remedy)
    if not 0.0 < share < 1.0:
        raise ValueError(f"gate_step={value!r} is not a share of the steps: {remedy}.")
    return share


def _as_float(value: object) -> float | None:
    """A number that is no whole one by its kind: a float, also numpy's or torch's, a fraction."""
    if isinstance(value, (str, bytes)) or _is_no_number(value):
        return None
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return float(value) if hasattr(value, "__float__") else None
    return None


def _is_no_number(value: object) -> bool:
    """Whether something is a truth value or an array of several, which Python takes for numbers."""
    return isinstance(value, bool) or bool(getattr(value, "ndim", 0)) or "bool" in str(getattr(value, "dtype", ""))


def checked_int(name: str, value: object, least: int, remedy: str | None = None) -> int:
    """Validate an integer setting."""
    remedy = remedy or f"give an int of at least {least}"
    if _is_no_number(value):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: {remedy}.")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: {remedy}.") from None
    if number < least:
        raise ValueError(f"{name}={value!r} is too small: {remedy}.")
    return number
