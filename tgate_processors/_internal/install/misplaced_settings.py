"""Settings of T-GATE in the call of a pipeline, where the published package takes them."""

from __future__ import annotations

import inspect
from typing import Any

# How `apply_tgate` takes them.
_MISPLACED_SETTINGS = {
    "gate_step": "gate_step={!r}",
    "guidance": "10, guidance={!r}",
    **{name: f"TGateSchedule(10, {name}={{!r}})" for name in ("sp_interval", "fi_interval", "warm_up")},
    "cfg_interval": 'TGateSchedule(10, guidance="predict", cfg_interval={!r})',
    "tolerance": '"auto", tolerance={!r}',
}


def reject_misplaced_settings(signature: inspect.Signature, kwargs: dict[str, Any]) -> None:
    """Refuse settings that the call of a pipeline does not have, some of which swallow them."""
    for name, form in _MISPLACED_SETTINGS.items():
        if name in kwargs and name not in signature.parameters:
            raise TypeError(
                f"{name}={kwargs[name]!r} is not an argument of the call: set it beforehand, for all calls, with "
                f"apply_tgate(pipe, {form.format(kwargs[name])})."
            )
    if "lcm" in kwargs and "lcm" not in signature.parameters:
        raise TypeError(
            "lcm is not an argument of the call: T-GATE sees from the call whether guidance is on. Leave it out, and "
            "pass settings to apply_tgate(pipe, gate_step=...)."
        )
