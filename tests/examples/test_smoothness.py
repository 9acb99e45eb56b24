"""How smooth a testbed is: every step is measured, and the errors are in thirds."""

import re

import typer
from typer.testing import CliRunner

from examples.benchmarks import smoothness

APP = typer.Typer()
APP.command()(smoothness.main)


def test_errors_of_both_kinds_by_thirds():
    done = CliRunner().invoke(APP, ["--captions", "2", "--steps", "9"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert "shapes-sd, guidance scale 5, 9 steps, 2 captions" in " ".join(done.output.split())
    for name in ("forecast", "guidance"):
        (row,) = (line for line in done.output.splitlines() if name in line and "│" in line)
        # The third step is the first that is measured.
        assert len(re.findall(r"\d\.\d{3}", row)) == 3
