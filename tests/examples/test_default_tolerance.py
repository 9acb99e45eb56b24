"""The default tolerance by rule: what is counted, and which setting is chosen."""

import csv
import json

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from examples.benchmarks import default_tolerance
from examples.benchmarks.default_tolerance import by_setting, chosen, read

APP = typer.Typer()
APP.command()(default_tolerance.main)
# The cost of 20 steps, how far they are ahead of the best plain run, and of as many plain steps.
MADE_UP = {
    # Plain DDIM is 3 dB behind at that cost: the second run could not be ahead.
    ("tolerance=0.1", "unipc"): (16.0, 3.0, -0.1),
    ("tolerance=0.1", "ddim"): (16.0, -3.0, 0.0),
    ("tolerance=0.2", "unipc"): (10.0, 4.0, -0.5),
    ("tolerance=0.2", "ddim"): (10.0, 0.5, -1.0),
    ("tolerance=0.4", "unipc"): (8.0, 6.0, -1.0),
    ("tolerance=0.4", "ddim"): (8.0, -1.0, -4.0),
}


def write_folder(folder, model, scale, more=()):
    """What the yardstick leaves behind."""
    rows = []
    for (setting, solver), (cost, lead, loss) in MADE_UP.items():
        row = {"setting": setting, "solver": solver, "method": "tgate", "steps": 20, "cost": cost, "psnr": 40.0}
        row |= {"ahead of offered": lead, "ahead of as many": loss, "best offered": "unipc even 10"}
        rows.append(row | {"full": cost, "half": 0.0, "forecast": 20 - cost, "right": 0.5, "right, as many": 0.75})
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"comparison": [*rows, *more]}))
    (folder / "settings.json").write_text(json.dumps({"model": model, "guidance_scale": scale}))
    return folder


def test_runs_that_cannot_be_ahead_do_not_count(tmp_path):
    found = by_setting(read([write_folder(tmp_path / "sd", "sd", 7.0)])).set_index("setting")
    assert list(found["ahead in"]) == [1, 2, 1]
    assert list(found["of"]) == [1, 2, 2]
    assert list(found["least, dB"]) == [3.0, 0.5, -1.0]
    assert list(found["times fewer MACs"]) == [1.25, 2.0, 2.5]
    assert list(found["to as many, dB"]) == pytest.approx([-0.05, -0.75, -2.5])
    assert list(found["right lost, %"]) == [25.0] * 3


def test_the_greatest_saving_that_is_ahead_wherever_it_can_be_is_chosen(tmp_path):
    found = by_setting(read([write_folder(tmp_path / "sd", "sd", 7.0)]))
    assert chosen(found) == "tolerance=0.2"
    assert chosen(found[found.setting == "tolerance=0.4"]) is None


def test_the_script_joins_the_folders_and_leaves_rivals_out(tmp_path):
    rival = {"setting": "0.2", "solver": "unipc", "method": "reuse", "steps": 20, "cost": 9.0}
    folders = [write_folder(tmp_path / "sd", "sd", 7.0, [rival]), write_folder(tmp_path / "px", "px", 3.0)]
    done = CliRunner().invoke(APP, [*map(str, folders), "--output", str(tmp_path / "all.csv")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert all(f"{name} tolerance=0.2" in done.output for name in ("sd", "px", "all"))
    assert "greatest saving: tolerance=0.2" in done.output
    with (tmp_path / "all.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * len(MADE_UP)
    assert rows[0]["model"] == "px"
    assert rows[0]["ahead of offered"] == "-3.00"


def test_lines_are_for_what_is_asked_and_of_some_solvers(tmp_path):
    folders = [str(write_folder(tmp_path / f"{scale:g}", "sd", scale)) for scale in (1.0, 7.0)]
    options = ["--by", "guidance_scale", "--solver", "unipc"]
    done = CliRunner().invoke(APP, [*folders, *options], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert all(f"{name} tolerance=0.4" in done.output for name in ("1.0", "7.0", "all"))
    # Without DDIM the largest is ahead everywhere.
    assert "greatest saving: tolerance=0.4" in done.output
    done = CliRunner().invoke(APP, [*folders, "--by", "colour"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "by='colour' is unknown: pass one of model, guidance_scale, solver, steps" in done.output


def test_a_missing_folder_and_another_kind_of_file_are_named(tmp_path):
    folder = str(write_folder(tmp_path / "sd", "sd", 7.0))
    done = CliRunner().invoke(APP, [str(tmp_path / "none")], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "none" in done.output
    done = CliRunner().invoke(APP, [folder, "--output", "all.txt"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "all.txt" in done.output


def test_a_run_beyond_the_plain_ones_is_compared_with_none():
    rows = pd.DataFrame(
        [{"setting": "tolerance=0.1", "steps": 8, "cost": 4.0, "ahead of offered": None, "ahead of as many": 0.0}]
    ).assign(**{"right": None, "right, as many": None})
    assert list(by_setting(rows.astype({"right": float, "right, as many": float}))["of"]) == [0]
