"""The main job, end to end."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import quickstart
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from examples.benchmarks.loading import load_pipeline
from tests.support.paths import ROOT
from tgate_processors import apply_tgate, get_tgate_report

SCRIPT = ROOT / "examples" / "quickstart.py"


# Rich and typer measure the terminal by these.
ENVIRONMENT = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}


def invoke(*arguments):
    app = typer.Typer()
    app.command()(quickstart.main)
    return CliRunner().invoke(app, arguments, env=ENVIRONMENT)


def load():
    return load_pipeline(str(quickstart.MODEL), "cpu", "float32")


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False)


def test_the_quickstart_draws_both_pictures_and_prints_what_they_cost(tmp_path):
    output = tmp_path / "pictures.png"
    done = invoke("--steps", "6", "--gate-step", "2", "--seeds", "1", "--output", str(output))
    assert done.exit_code == 0, done.output
    assert "…" not in done.output
    assert "4 pictures, 6 steps: FFHHHH" in done.stdout
    plain, gated = (re.split(r"\s*[│|]\s*", line) for line in done.stdout.splitlines() if re.match(r"[│|] with", line))
    assert plain[1:2] == ["without T-GATE"]
    assert (plain[4], gated[4]) == ("6", "2 + 4 half")
    assert float(gated[2]) > 0
    assert float(gated[3]) > 0
    assert 0.5 * float(plain[5]) < float(gated[5]) < 0.75 * float(plain[5])
    pipe = apply_tgate(load(), 2)
    pipe(quickstart.PROMPTS[0], num_inference_steps=6)
    assert (plain[6], gated[6]) == ("0.0", f"{get_tgate_report(pipe).peak_bytes / 2**20:.1f}") != ("0.0", "0.0")
    middle, farthest = map(float, re.findall(r"([\d.]+) dB", done.stdout))
    assert 10 < farthest < middle < 40
    picture = Image.open(output)
    assert picture.width > 300
    assert len(picture.convert("RGB").getcolors(10**6)) > 100


def test_the_distance_of_pictures():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    # A fifth of the range is off: 20 log10 5.
    assert quickstart.psnr(black, grey) == quickstart.psnr(grey, black) == pytest.approx(13.979, abs=1e-3)
    assert quickstart.psnr(grey, grey) == float("inf")


@pytest.mark.slow
def test_the_quickstart_with_guidance_that_is_predicted(tmp_path):
    for arguments, forwards in (
        (("--gate-step", "auto", "--tolerance", "100"), "3 + 1 half"),
        (("--gate-step", "2", "--guidance", "predict", "--cfg-interval", "4"), "3 + 3 half"),
    ):
        output = ("--steps", "6", "--seeds", "1", "--output", str(tmp_path / "pictures.png"))
        done = invoke(*arguments, *output)
        assert done.exit_code == 0, done.output
        assert forwards in done.stdout
    done = invoke("--gate-step", "soon")
    assert done.exit_code == 2
    assert "'soon' is not a number of steps" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "fp16"), "dtype='fp16' is unknown: give float16"),
        (("--dtype", "torch.bfloat16"), "dtype='torch.bfloat16' is unknown: give bfloat16"),
        (("--dtype", "int8"), "dtype='int8' is unknown: give float32, float16 or bfloat16"),
        (("--device", "gpu"), "device='gpu' is unknown: give cpu, cuda or mps"),
        (("--variant", "fp8"), "`variant=fp8`, but no such"),
        pytest.param(
            ("--device", "cuda"),
            f"device='cuda', but torch finds no CUDA here: torch {torch.__version__} is built without it",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA"),
        ),
    ],
)
def test_what_is_not_there_is_said_in_a_line(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(re.sub(r"[│\s]+", " ", done.output).split())
    assert "Traceback" not in done.output


def test_the_files_of_a_variant(tmp_path):
    pipe = load()
    pipe.save_pretrained(tmp_path, variant="fp16")
    found = load_pipeline(str(tmp_path), "cpu", "float16", "fp16")
    assert {part.dtype for part in (found.unet, found.vae, found.text_encoder)} == {torch.float16}
    assert torch.equal(found.unet.conv_in.weight, pipe.unet.conv_in.weight.half())


@pytest.mark.slow
def test_prompts_and_a_folder_of_your_own(tmp_path):
    output = tmp_path / "pictures.png"
    model = str(ROOT / "examples" / "models" / "shapes-sd")
    prompt = "a small red circle in the centre, on a grey background"
    done = run(
        *("--model", model, "--prompt", prompt, "--steps", "3", "--gate-step", "0.4", "--seeds", "2"),
        *("--guidance-scale", "3", "--sp-interval", "2", "--dtype", "float32", "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    assert "2 pictures, 3 steps: FHH" in done.stdout
    assert output.exists()


@pytest.mark.slow
def test_a_wrong_argument_is_an_error_message_and_no_traceback():
    done = run("--gate-step", "1.5")
    assert done.returncode == 2
    assert "a share of them between 0 and 1" in " ".join(re.sub(r"[│\s]+", " ", done.stderr).split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("gated", [False, True])
def test_the_trained_pipeline_draws_what_the_prompt_says(gated):
    pipe = load()
    if gated:
        apply_tgate(pipe, 0.4)
    call = {"num_inference_steps": 25, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0)}
    circle, triangle = pipe(
        [
            "a large red circle at the top left, on a white background",
            "a small yellow triangle in the centre, on a black background",
        ],
        output_type="np",
        **call,
    ).images
    assert np.abs(circle[8, 8] - [0.87, 0.1, 0.1]).max() < 0.2
    assert circle[26, 26].min() > 0.9
    assert np.abs(triangle[17, 16] - [1.0, 0.9, 0.1]).max() < 0.2
    assert triangle[4, 4].max() < 0.2
