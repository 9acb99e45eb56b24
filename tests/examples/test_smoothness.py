"""How smooth a testbed is: every step is measured, and the errors are in thirds."""

import re

import diffusers
import pytest
import typer
from typer.testing import CliRunner

from examples.benchmarks import smoothness
from examples.benchmarks.loading import MODELS

APP = typer.Typer()
APP.command()(smoothness.main)


@pytest.mark.parametrize(
    ("model", "prompts"),
    [
        ("shapes-sd", "shapes"),
        pytest.param(
            "shapes-wan",
            "clips",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not hasattr(diffusers, "WanPipeline"), reason="this diffusers has no Wan"),
            ],
        ),
    ],
)
def test_errors_of_both_kinds_by_thirds(model, prompts):
    options = ["--model", str(MODELS / model), "--prompts", prompts, "--captions", "2", "--steps", "9"]
    done = CliRunner().invoke(APP, options, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert f"{model}, guidance scale 5, 9 steps, 2 captions" in " ".join(done.output.split())
    for name in ("forecast", "guidance"):
        (row,) = (line for line in done.output.splitlines() if name in line and "│" in line)
        # The third step is the first that is measured.
        assert len(re.findall(r"\d\.\d{3}", row)) == 3
