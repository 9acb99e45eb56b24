"""The main job, end to end."""

import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import quickstart
import torch
import typer
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from typer.testing import CliRunner

from examples.benchmarks.loading import load_pipeline
from examples.benchmarks.pairs import psnr
from tests.support.paths import ROOT
from tests.support.testbeds import NEEDS_WAN
from tgate_processors import apply_tgate, get_tgate_report

SCRIPT = ROOT / "examples" / "quickstart.py"


# Rich and typer measure the terminal by these.
ENVIRONMENT = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}


def invoke(*arguments):
    app = typer.Typer()
    app.command()(quickstart.main)
    return CliRunner().invoke(app, arguments, env=ENVIRONMENT)


def load():
    return load_pipeline(str(quickstart.MODELS / "shapes-sd"), "cpu", "float32")


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False)


def rows(done, first):
    """The cells of the rows of its tables whose first cell begins like this."""
    lines = [line.strip("│|").strip() for line in done.stdout.splitlines() if line.startswith(("│", "|"))]
    return [re.split(r"\s*[│|]\s*", line) for line in lines if re.match(first, line)]


def test_the_quickstart_draws_both_pictures_and_prints_what_they_cost(tmp_path):
    output = tmp_path / "new" / "pictures.png"
    model = ("--model", str(quickstart.MODELS / "shapes-sd"))
    done = invoke(*model, "--steps", "6", "--gate-step", "2", "--seeds", "1", "--output", str(output))
    assert done.exit_code == 0, done.output
    assert "…" not in done.output
    assert "4 pairs, 6 steps" in done.stdout
    plain, gated = rows(done, "with")
    assert plain[0] == "without T-GATE"
    assert float(gated[1]) > 0
    assert float(gated[2]) > 0
    assert 0.5 * float(plain[3]) < float(gated[3]) < 0.75 * float(plain[3])
    pipe = apply_tgate(load(), 2)
    pipe(quickstart.SCENES[0], num_inference_steps=6)
    report = get_tgate_report(pipe)
    assert (plain[4], gated[4]) == ("0.0", f"{report.peak_bytes / 2**20:.1f}") != ("0.0", "0.0")
    assert " ".join(f"The first picture: {report}".split()) in " ".join(done.stdout.split())
    each = rows(done, r"\d")
    assert [row[:3] for row in each] == [[str(number), "0", "FFHHHH"] for number in range(1, 5)]
    middle, worst = map(float, re.findall(r"([\d.]+) dB (?:median|worst)", done.stdout))
    assert 10 < worst == min(float(row[4].removesuffix(" dB")) for row in each) < middle < 40
    with Image.open(output) as sheet:
        assert sheet.width > 300
        assert len(sheet.convert("RGB").getcolors(10**6)) > 100
    singles = sorted((tmp_path / "new" / "pictures").iterdir())
    assert len(singles) == 8
    assert singles[0].name == "prompt-1-seed-0-with-T-GATE.png"
    with Image.open(singles[0]) as gated, Image.open(singles[1]) as plain:
        assert gated.size == (32, 32)
        assert quickstart.decibels(psnr(gated, plain)) == each[0][4]


def test_identical_pictures_and_a_warning_that_is_said_once(tmp_path, caplog):
    output = ("--output", str(tmp_path / "pictures.png"))
    done = invoke("--prompt", quickstart.SCENES[0], "--steps", "3", "--gate-step", "5", *output)
    assert done.exit_code == 0, done.output
    assert "PSNR of T-GATE pictures against plain ones: identical." in done.stdout
    assert "inf" not in done.stdout
    assert [row[2:] for row in rows(done, r"\d")] == [["FFF", row[3], "identical"] for row in rows(done, r"\d")]
    assert len([record for record in caplog.records if record.name == "tgate_processors"]) == 1
    # Only while it draws.
    assert len(logging.getLogger("tgate_processors").filters) == 1


@pytest.mark.parametrize(
    "output", ["{file}/pictures.png", "{file}.png", "{folder}", "{folder}/pictures", "{folder}/pictures.docx"]
)
def test_an_output_that_cannot_be_written_is_said_before_anything_is_loaded(output, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "load_pipeline", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    output = output.format(file=tmp_path / "file", folder=tmp_path / "folder.png")
    done = invoke("--output", output)
    assert done.exit_code == 2
    assert "Cannot write" in done.output
    assert "Traceback" not in done.output


def test_every_small_pipeline_has_prompts_of_its_own():
    assert {*quickstart.TESTBEDS} == {folder.name for folder in quickstart.MODELS.iterdir()}


def test_without_arguments_it_draws_emoji_that_stay_what_they_were(tmp_path):
    done = invoke("--seeds", "1", "--output", str(tmp_path / "pictures.png"))
    assert done.exit_code == 0, done.output
    assert "4 pairs, 25 steps" in done.stdout
    assert min(float(row[4].removesuffix(" dB")) for row in rows(done, r"\d")) > 40
    with Image.open(next((tmp_path / "pictures").iterdir())) as picture:
        assert picture.size == (64, 64)


@pytest.mark.slow
@NEEDS_WAN
def test_clips_are_saved_one_by_one(tmp_path):
    arguments = ("--model", str(quickstart.MODELS / "shapes-wan"), "--steps", "6", "--seeds", "1")
    done = invoke(*arguments, "--output", str(tmp_path / "clips.png"))
    assert done.exit_code == 0, done.output
    clips = sorted((tmp_path / "clips").iterdir())
    assert [clip.suffix for clip in clips] == [".gif"] * 6
    with Image.open(clips[0]) as clip:
        assert (clip.size, clip.n_frames) == ((32, 32), 5)
    assert (tmp_path / "clips.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes-pixart", "shapes-sd", "emoji-sd"])
def test_the_other_small_pipelines_draw_without_a_warning(name, tmp_path):
    done = run("--model", str(quickstart.MODELS / name), "--steps", "4", "--output", str(tmp_path / "pictures.png"))
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "pictures").iterdir()]) == 16
    assert "truncated" not in done.stderr
    assert "clean_caption" not in done.stderr


def test_a_pipeline_that_needs_more_than_a_prompt_is_refused(monkeypatch, tmp_path):
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(load())
    monkeypatch.setattr(quickstart, "load_pipeline", lambda *arguments: pipe)
    done = invoke("--num-frames", "5", "--output", str(tmp_path / "pictures.png"))
    assert done.exit_code == 2
    assert "StableDiffusionImg2ImgPipeline" in done.output


def test_the_distance_of_pictures():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    # A fifth of the range is off: 20 log10 5.
    assert psnr(black, grey) == psnr(grey, black) == pytest.approx(13.979, abs=1e-3)
    assert psnr(grey, grey) == float("inf")
    assert quickstart.decibels(psnr(black, grey)) == "14.0 dB"
    assert quickstart.decibels(psnr(grey, grey)) == "identical"


@pytest.mark.slow
def test_the_quickstart_with_guidance_that_is_predicted(tmp_path):
    for arguments, plan in (
        (("--gate-step", "auto", "--tolerance", "inf"), "FFF--H"),
        (("--gate-step", "2", "--guidance", "predict", "--cfg-interval", "4"), "FFHHHF"),
        (("--gate-step", "FFF-HF"), "FFF-HF"),
    ):
        output = ("--steps", "6", "--seeds", "1", "--output", str(tmp_path / "pictures.png"))
        done = invoke(*arguments, *output)
        assert done.exit_code == 0, done.output
        assert [row[2] for row in rows(done, r"\d")] == [plan] * 4
    done = invoke("--gate-step", "soon")
    assert done.exit_code == 2
    assert "'soon' is not a number of steps" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "fp16"), "dtype='fp16' is unknown: pass float16"),
        (("--dtype", "torch.bfloat16"), "dtype='torch.bfloat16' is unknown: pass bfloat16"),
        (("--dtype", "int8"), "dtype='int8' is unknown: pass float32, float16 or bfloat16"),
        (("--device", "gpu"), "device='gpu' is unknown: pass cpu, cuda or mps"),
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
    assert "2 pairs, 3 steps" in done.stdout
    assert [row[2] for row in rows(done, r"\d")] == ["FHH"] * 2
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
