"""The script that measures speed: what it computes, not what it times."""

import json
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from examples.benchmarks import speed
from examples.benchmarks.cost_table import load_denoiser
from examples.benchmarks.random_pipelines import random_pipeline
from tests.zoo.case import slow, thorough
from tests.zoo.core import GOLDEN
from tgate_processors import TGateSchedule, estimate_cost

APP = typer.Typer()
APP.command()(speed.main)
CONFIGS = {
    "sd": GOLDEN / "pipes/sd/unet/config.json",
    "sdxl": GOLDEN / "pipes/sdxl/unet/config.json",
    "pixart_alpha": GOLDEN / "pipes/pixart_alpha/transformer/config.json",
}


def call(*arguments):
    return CliRunner().invoke(APP, [*map(str, arguments)], env={"COLUMNS": "80"})


@pytest.mark.parametrize("name", [slow("sd"), thorough("sdxl"), "pixart_alpha"])
@pytest.mark.parametrize("batch_size", [slow(1), 2])
def test_a_denoiser_with_random_weights(name, batch_size, tmp_path):
    arguments = ("--model", CONFIGS[name], "--size", 64, "--steps", 6, "--gate-step", 3, "--batch-size", batch_size)
    result = call(*arguments, "--rounds", 2, "--narrow-rounds", 2, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "speed.json").read_text())
    (row,) = found["rows"]
    pipe = random_pipeline(load_denoiser(str(CONFIGS[name])), torch.device("cpu"), torch.float32)
    cost = estimate_cost(pipe, TGateSchedule(3), 6, height=64, width=64, batch_size=batch_size)
    assert row["bound"] == cost.speedup_bound > 1
    assert row["ratio_to_bound"] == row["speedup"] / row["bound"]
    assert row["announced_mb"] == cost.report.peak_bytes / 1e6 > 0
    assert {mode: len(seconds) for mode, seconds in row["seconds"].items()} == dict.fromkeys(
        ("plain", "gated", "unguided"), 2
    )
    layers = len(pipe.components["transformer" if name == "pixart_alpha" else "unet"].attn_processors)
    assert row["overhead_us_per_layer"] == row["overhead_us_per_step"] / layers != 0
    assert row["peak_mb"] > 0
    assert row["peak_mb_gated"] > 0
    assert found["microseconds_per_layer"] > 0
    assert set(found["versions"]) == set(speed.PACKAGES)
    assert "ratio to bound" in (tmp_path / "speed.md").read_text()
    assert "ratio to bound" in result.output
    assert "…" not in result.output
    written = (tmp_path / "speed.md").read_text().splitlines()[2].strip("| ").split(" | ")
    assert not set(written[1:]) - set(re.split(r"[│|\s]+", result.output))


@pytest.mark.slow
def test_a_pipeline_with_its_weights(tmp_path):
    model = "examples/models/shapes-sd"
    arguments = ("--model", model, "--size", 32, "--steps", 3, "--gate-step", 1)
    result = call(*arguments, "--rounds", 1, "--narrow-rounds", 1, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "speed.json").read_text())["rows"][0]["model"] == model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "int8"), "dtype='int8'"),
        (("--steps", 4, "--gate-step", 4), "gate_step=4 is not before"),
        (("--model", "nothing.json"), "nothing.json"),
    ],
)
def test_bad_arguments(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
