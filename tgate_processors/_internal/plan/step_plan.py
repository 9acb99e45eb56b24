"""What happens in one inference step: the words in which schedules and plans are written."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

CFGHalf = Literal["unconditional", "conditional"]


class Action(enum.Enum):
    """What an attention layer does in one step."""

    COMPUTE = "compute"
    STORE = "store"
    REUSE = "reuse"


class Phase(enum.Enum):
    """
    The part of the run that a step belongs to (in the words of https://arxiv.org/abs/2404.02747).

    A forecast step belongs to none: the denoiser is not called in it.
    """

    SEMANTICS_PLANNING = "semantics planning"
    GATE = "gate"
    FIDELITY_IMPROVING = "fidelity improving"
    FORECAST = "forecast"


class Level(enum.Enum):
    """How much of a step is computed, and the letter that stands for it."""

    FULL = "F"
    HALF = "H"
    FORECAST = "-"


@dataclass(frozen=True)
class StepPlan:
    """What happens in one inference step."""

    phase: Phase
    cross_attention: Action
    self_attention: Action

    @property
    def level(self) -> Level:
        """How much of the step is computed, if it has guidance."""
        return _LEVELS.get(self.phase, Level.FULL)


_LEVELS = {Phase.FIDELITY_IMPROVING: Level.HALF, Phase.FORECAST: Level.FORECAST}
