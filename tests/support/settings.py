"""Settings that many tests use, and what they mean, written out once more."""

import math

from tgate_processors import TGateSchedule, apply_tgate

SETTINGS = {
    "v1": {"gate_step": 2},
    "gate_1": {"gate_step": 1},
    "share": {"gate_step": 0.5},
    "v2": {"gate_step": 4, "sp_interval": 2, "fi_interval": 2, "warm_up": 1},
    "v2_late": {"gate_step": 4, "sp_interval": 3, "fi_interval": 1, "warm_up": 2},
}


def computed(step, steps, gate_step, sp_interval=1, fi_interval=1, warm_up=0):
    """Whether cross- and self-attention are computed in a step, by the table of the method."""
    gate = gate_step if isinstance(gate_step, int) else round(gate_step * steps + 1e-9)
    if step >= gate:
        return False, step % fi_interval == 0
    own = step < warm_up or step == warm_up or step % sp_interval == 0 or step == gate - 1
    return True, own


FIXED = {"gate_step": 2, "guidance": "predict", "cfg_interval": 2}
AUTO = {"gate_step": "auto", "forecast": False}
# Tiny pipelines with random weights predict badly: this accepts whatever comes.
PATIENT = {**AUTO, "tolerance": math.inf}
# The same with forecast steps.
FORECAST = {"gate_step": "auto", "tolerance": math.inf}
LEVELS = {"levels": "FF-FH-"}
EVERY = [{"gate_step": 3, "guidance": "predict", "cfg_interval": 1}, {**AUTO, "tolerance": 0}]


def full_steps(steps, settings):
    """The full steps, written out once more."""
    if settings["gate_step"] == "auto":
        return tuple(step for step in (0, 1, 2, 4, 7, 11) if step < steps)
    gate, interval = settings["gate_step"], settings["cfg_interval"]
    return tuple(step for step in range(steps) if step < gate or (step - gate + 1) % interval == 0)


# What a schedule says and `apply_tgate` does not take by itself.
_OF_SCHEDULE = ("sp_interval", "fi_interval", "warm_up", "cfg_interval", "forecast", "levels")


def apply_settings(pipe, gate_step="auto", **settings):
    """`apply_tgate` with settings of the schedule among the others."""
    if any(name in settings for name in _OF_SCHEDULE):
        names = [name for name in (*_OF_SCHEDULE, "guidance", "tolerance") if name in settings]
        gate_step = TGateSchedule(gate_step, **{name: settings.pop(name) for name in names})
    return apply_tgate(pipe, gate_step, **settings)
