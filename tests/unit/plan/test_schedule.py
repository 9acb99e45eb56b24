"""The schedule alone: the table of the method, and what is refused."""

import dataclasses
import itertools
import math
import re

import pytest

from tgate_processors import TGateSchedule


def actions(schedule, steps, kind):
    return "".join(getattr(step, kind).name[0] for step in schedule.plan(steps))


@pytest.mark.parametrize(
    ("settings", "steps", "cross", "own"),
    [
        ({"gate_step": 3}, 6, "CCSRRR", "CCCCCC"),
        ({"gate_step": 1}, 3, "SRR", "CCC"),
        ({"gate_step": 6}, 6, "CCCCCC", "CCCCCC"),
        ({"gate_step": 20}, 4, "CCCC", "CCCC"),
        ({"gate_step": 6, "sp_interval": 3, "warm_up": 2}, 10, "CCCCCSRRRR", "CCCSRCCCCC"),
        ({"gate_step": 6, "sp_interval": 3, "fi_interval": 2, "warm_up": 1}, 10, "CCCCCSRRRR", "CSRSRCSRSR"),
        ({"gate_step": 3, "sp_interval": 2, "fi_interval": 2, "warm_up": 5}, 8, "CCSRRRRR", "CCSRSRSR"),
        ({"gate_step": 8, "sp_interval": 3, "fi_interval": 3, "warm_up": 2}, 12, "CCCCCCCSRRRR", "CCCSRRCSRSRR"),
        ({"gate_step": 5, "sp_interval": 5, "warm_up": 0}, 6, "CCCCSR", "SRRRCC"),
        ({"gate_step": 0.5}, 6, "CCSRRR", "CCCCCC"),
        ({"gate_step": 0.01}, 4, "SRRR", "CCCC"),
    ],
)
def test_plan_is_the_table_of_the_method(settings, steps, cross, own):
    schedule = TGateSchedule(**settings)
    assert actions(schedule, steps, "cross_attention") == cross
    assert actions(schedule, steps, "self_attention") == own


@pytest.mark.parametrize("gate_step", [1, 2, 5, 10, 0.3])
@pytest.mark.parametrize("sp_interval", [1, 2, 5])
@pytest.mark.parametrize("fi_interval", [1, 3])
@pytest.mark.parametrize("warm_up", [0, 2, 9])
def test_what_is_reused_was_stored_and_what_is_stored_is_reused(gate_step, sp_interval, fi_interval, warm_up):
    schedule = TGateSchedule(gate_step, sp_interval, fi_interval, warm_up)
    for steps in range(1, 14):
        for kind in ("cross_attention", "self_attention"):
            plan = actions(schedule, steps, kind)
            assert "CR" not in plan
            assert not plan.startswith("R")
            assert all(after == "R" for before, after in itertools.pairwise(plan) if before == "S")
            assert not plan.endswith("S")


@pytest.mark.parametrize(("share", "steps", "gate"), [(0.4, 25, 10), (0.3, 10, 3), (0.5, 5, 3), (0.001, 50, 1)])
def test_a_share_is_rounded_to_the_nearest_step(share, steps, gate):
    assert TGateSchedule(share).resolve_gate_step(steps) == gate


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"gate_step": 0}, ValueError),
        ({"gate_step": -3}, ValueError),
        ({"gate_step": 1.5}, ValueError),
        ({"gate_step": 0.0}, ValueError),
        ({"gate_step": 1.0}, ValueError),
        ({"gate_step": math.nan}, ValueError),
        ({"gate_step": math.inf}, ValueError),
        ({"gate_step": True}, TypeError),
        ({"gate_step": "10"}, ValueError),
        ({"gate_step": "Auto"}, ValueError),
        ({"gate_step": ""}, ValueError),
        ({"gate_step": "FFX"}, ValueError),
        ({"gate_step": [10]}, TypeError),
        ({"gate_step": None}, TypeError),
        ({"sp_interval": 0}, ValueError),
        ({"sp_interval": 2.0}, TypeError),
        ({"fi_interval": -1}, ValueError),
        ({"fi_interval": False}, TypeError),
        ({"warm_up": -1}, ValueError),
        ({"warm_up": "2"}, TypeError),
    ],
)
def test_bad_settings_name_the_value_and_the_remedy(settings, error):
    (name, value), *_ = settings.items()
    with pytest.raises(error, match=f"`{name}` must be .*, got {re.escape(repr(value))}"):
        TGateSchedule(**settings)


def test_numpy_integers_are_integers():
    import numpy as np

    assert TGateSchedule(np.int64(4)).gate_step == 4


def test_a_plan_of_letters_is_taken_in_the_place_of_a_number():
    schedule = TGateSchedule("FFFF-F--FH")
    assert schedule == TGateSchedule(levels="FFFF-F--FH")
    assert schedule == dataclasses.replace(schedule) != TGateSchedule()
    assert [step.level.value for step in schedule.plan(10)] == list("FFFF-F--FH")
    with pytest.raises(ValueError, match="begins with a full step"):
        TGateSchedule("HF")
    for other in (5, "FFF", "FFH"):
        with pytest.raises(
            ValueError, match=f"`gate_step` must be left out beside levels='FFH', got {other!r}. Both say"
        ):
            TGateSchedule(other, levels="FFH")


@pytest.mark.parametrize(
    "schedule",
    [
        TGateSchedule(),
        TGateSchedule(tolerance=math.inf, forecast=False),
        TGateSchedule("FFFF-F--FH"),
        TGateSchedule(0.4, 3, 2, warm_up=1, guidance="predict", cfg_interval=4),
    ],
    ids=str,
)
def test_a_schedule_survives_a_file(schedule, tmp_path):
    schedule.to_json_file(tmp_path / "schedule.json")
    assert TGateSchedule.from_json_file(str(tmp_path / "schedule.json")) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate_step: 10", "must be a JSON file, but cannot be read as one: Expecting value"),
        ("[10]", r"must have a JSON object with settings, got \[10\]"),
        ('{"gate_step": 10, "gate": 3, "step": 2}', "must have settings of gate_step, .*, got gate, step."),
        ('{"gate_step": 0}', "`gate_step` must be .*, got 0"),
    ],
)
def test_a_file_that_is_no_schedule_says_why(text, message, tmp_path):
    (tmp_path / "schedule.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TGateSchedule.from_json_file(tmp_path / "schedule.json")


def test_a_file_may_leave_settings_out(tmp_path):
    (tmp_path / "schedule.json").write_text('{"gate_step": "FFH"}')
    assert TGateSchedule.from_json_file(tmp_path / "schedule.json") == TGateSchedule("FFH")


@pytest.mark.parametrize(
    ("setting", "way"),
    [("gate_step", "__index__"), ("sp_interval", "__index__"), ("tolerance", "__float__"), ("tolerance", "__repr__")],
)
def test_too_little_memory_is_not_a_wrong_setting(setting, way):
    def fails(self):
        raise MemoryError

    with pytest.raises(MemoryError):
        TGateSchedule(**{setting: type("Value", (), {way: fails})()})
