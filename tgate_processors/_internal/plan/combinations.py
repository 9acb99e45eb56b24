"""Settings of a schedule that have no meaning together, and those that are hardly meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .validation import shown

if TYPE_CHECKING:
    from .schedule import TGateSchedule

# A share of the steps below this is more often a tolerance.
_SMALL_SHARE = 0.3


def check_levels(schedule: TGateSchedule) -> None:
    """Refuse settings that say the same as `levels`, or the contrary."""
    if schedule.levels is None:
        if schedule.forecast and not schedule.is_auto:
            raise ValueError(
                _left_out(schedule, "forecast", f"with gate_step={schedule.gate_step}", 'It is for gate_step="auto".')
            )
        return
    beside = f"beside levels={shown(schedule.levels)}"
    if schedule.gate_step != "auto":
        raise ValueError(_left_out(schedule, "gate_step", beside, "Both say which steps are full."))
    if schedule.forecast is not None and schedule.forecast is not ("-" in schedule.levels):
        raise ValueError(_left_out(schedule, "forecast", beside, "The letter - stands for a forecast step."))
    if schedule.guidance == "drop":
        raise ValueError(_left_out(schedule, "guidance", beside, "A plan of levels predicts guidance."))
    for name in _given_for_a_gate(schedule):
        raise ValueError(_left_out(schedule, name, beside, "It is for gate_step as a number of steps."))


def check_combinations(schedule: TGateSchedule) -> None:
    """Refuse settings that have no meaning together."""
    auto = 'with gate_step="auto"'
    if schedule.is_auto and schedule.guidance == "drop":
        raise ValueError(_left_out(schedule, "guidance", auto, "To drop it, give a number of steps: gate_step=10."))
    for name in _given_for_a_gate(schedule) if schedule.is_auto else ():
        also = ' and guidance="predict"' if name == "cfg_interval" else ""
        raise ValueError(_left_out(schedule, name, auto, f"To use it, give a number of steps: gate_step=10{also}."))
    if not schedule.is_auto and schedule.tolerance is not None:
        given = f"levels={shown(schedule.levels)}" if schedule.levels else f"gate_step={schedule.gate_step}"
        raise ValueError(_left_out(schedule, "tolerance", f"with {given}", 'It is for gate_step="auto".'))
    if schedule.cfg_interval is not None and not schedule.predicts:
        raise ValueError(
            _left_out(schedule, "cfg_interval", "where guidance is dropped", 'To use it, give guidance="predict".')
        )


def doubt_of_warm_up(schedule: TGateSchedule) -> str | None:
    """What to warn of if `warm_up` or `sp_interval` has no effect."""
    warm_up, interval, gate = schedule.warm_up, schedule.sp_interval, schedule.gate_step
    if warm_up and interval == 1:
        return f"warm_up={warm_up} has no effect with sp_interval=1, which computes self-attention in every step."
    if interval > 1 and isinstance(gate, int) and warm_up >= gate:
        return f"sp_interval={interval} has no effect, as gate_step={gate} comes before warm_up={warm_up} has ended."
    return None


def doubt_of_share(gate_step: object, *, guidance: object) -> str | None:
    """What to warn of if a share of the steps may be meant as a tolerance."""
    if not isinstance(gate_step, float) or gate_step >= _SMALL_SHARE or guidance is not None:
        return None
    return (
        f"gate_step={gate_step:g} drops guidance after {100 * gate_step:g} % of the steps. For an error to accept, "
        f'write tolerance={gate_step:g}. If you mean the share, guidance="drop" says so.'
    )


def _given_for_a_gate(schedule: TGateSchedule) -> list[str]:
    """Settings that are given and need a gate at a step that is known."""
    given = {
        "sp_interval": schedule.sp_interval > 1,
        "warm_up": schedule.warm_up > 0,
        "cfg_interval": schedule.cfg_interval is not None,
    }
    return [name for name, is_given in given.items() if is_given]


def _left_out(schedule: TGateSchedule, name: str, where: str, remedy: str) -> str:
    """The message for a setting that has no meaning here."""
    return f"`{name}` must be left out {where}, got {shown(getattr(schedule, name))}. {remedy}"
