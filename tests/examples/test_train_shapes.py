"""Training: from nothing to a pipeline, through a kill, and in two processes."""

import functools
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
import typer
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from examples.testbeds import train_shapes
from examples.testbeds.shapes.data import EMPTY, MISSING, WRONG, Batches, drawn, everything, images
from examples.testbeds.shapes.evaluation import call_options
from examples.testbeds.shapes.scenes import all_scenes
from examples.testbeds.shapes.stages import generator, write
from examples.testbeds.shapes.tokens import LENGTH, encode, load, make
from tests.support.paths import ROOT
from tests.support.testbeds import NEEDS_WAN
from tests.zoo.case import thorough

SCRIPT = ("-m", "examples.testbeds.train_shapes")
SHORT = ["--smoke", "--copies", "1", "--batch-size", "4", "--autoencoder-steps", "2", "--reader-steps", "2"]
SHORT += ["--decoder-steps", "2", "--steps", "6", "--save-every", "1", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
APP = typer.Typer()
APP.command()(train_shapes.main)
CAPTIONS = [scene.caption for scene in all_scenes()]


def train(*arguments):
    """In this process, on one thread as in the others: sums are then made in the same order."""
    return CliRunner().invoke(APP, [*SHORT, *arguments], env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"})


def weights(folder):
    return torch.load(folder / "denoiser.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run of a model, by the model."""

    @functools.cache
    def folder_of(model):
        folder = tmp_path_factory.mktemp(model)
        done = train("--model", model, "--output", str(folder), "--check-prompts", "2")
        assert done.exit_code == 0, done.output
        assert re.search(r"denoiser: step 6 of 6, loss \d\.\d{4}", done.output)
        assert "step 6, guidance 3: all right" in done.output
        return folder

    return folder_of


def drawn_by(folder, caption):
    """What a small pipeline draws in two steps."""
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 12 * 2**20
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(caption, num_inference_steps=2, guidance_scale=3.0, **call_options(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("model", [thorough("sd"), "pixart"])
def test_a_short_run_gives_a_pipeline_that_draws(trained, model):
    assert drawn_by(trained(model) / "pipeline", CAPTIONS[0]).images[0].size == (32, 32)


@NEEDS_WAN
@pytest.mark.slow
@pytest.mark.thorough
def test_a_short_run_gives_a_pipeline_that_draws_clips(trained):
    made = drawn_by(trained("wan") / "pipeline", everything("wan")[0].caption)
    assert made.frames.shape == (1, 5, 32, 32, 3)


@NEEDS_WAN
@pytest.mark.slow
@pytest.mark.thorough
def test_each_channel_of_the_latents_has_a_mean_and_a_deviation_of_its_own(trained):
    vae = DiffusionPipeline.from_pretrained(trained("wan") / "pipeline", dtype=torch.float32).vae
    with torch.no_grad():
        latents = vae.encode(images(drawn("wan", 0, 1, every=40).pictures)).latent_dist.mean
    mean, deviation = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), mean, atol=2e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), deviation, atol=2e-3, rtol=0)


@NEEDS_WAN
@pytest.mark.slow
@pytest.mark.thorough
def test_the_decoder_learns_on_and_the_latents_stay_what_they_are(trained):
    vae = DiffusionPipeline.from_pretrained(trained("wan") / "pipeline", dtype=torch.float32).vae
    averages = torch.load(trained("wan") / "autoencoder.pt", weights_only=True)["average"]
    same = {
        name: torch.equal(average.half().float(), parameter)
        for average, (name, parameter) in zip(averages, vae.named_parameters(), strict=True)
    }
    assert all(same[name] for name in same if name.startswith(("encoder.", "quant_conv.")))
    assert not all(same[name] for name in same if name.startswith(("decoder.", "post_quant_conv.")))


@NEEDS_WAN
@pytest.mark.slow
@pytest.mark.thorough
def test_what_wan_learns_from_is_what_its_pipeline_gives(trained):
    from examples.testbeds.shapes import wan

    folder = trained("wan")
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    taught = wan.Flowing(pipe.text_encoder, pipe.transformer, pipe.tokenizer.pad_token_id)
    captions = ["", *(clip.caption for clip in everything("wan")[:2])]
    shown = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=LENGTH)[0]
    torch.testing.assert_close(taught.states(encode(load("wan", folder / "tokenizer"), captions))[0], shown)
    # A velocity that leads straight to a clip gives that clip in any number of steps, and a loss of nothing.
    latents, noise = torch.randn(2, 1, 8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.transformer.register_forward_hook(lambda *seen: (noise - latents,))
    made = pipe(captions[1], latents=noise, num_inference_steps=3, output_type="latent", **call_options(pipe)).frames
    torch.testing.assert_close(made, latents, atol=1e-2, rtol=1e-2)


@pytest.mark.slow
def test_the_pipeline_has_the_averaged_weights(trained):
    state = weights(trained("sd"))
    pipe = DiffusionPipeline.from_pretrained(trained("sd") / "pipeline", dtype=torch.float32)
    saved = [*pipe.text_encoder.parameters(), *pipe.unet.parameters()]
    for average, parameter in zip(state["average"], saved, strict=True):
        assert torch.equal(average.half().float(), parameter)
    assert any(not torch.equal(one, other) for one, other in zip(state["average"], state["parameters"], strict=True))


@pytest.mark.slow
def test_a_run_that_is_killed_and_goes_on_is_the_run_that_was_not(trained, tmp_path):
    command = [sys.executable, *SCRIPT, *SHORT, "--model", "sd", "--output", str(tmp_path)]
    while True:
        running = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT, cwd=ROOT
        )
        while running.poll() is None and not (tmp_path / "denoiser.pt").exists():
            time.sleep(0.002)
        running.kill()
        running.wait()
        if weights(tmp_path)["step"] < 6:
            break
        # On a busy machine the kill may come too late.
        shutil.rmtree(tmp_path)
    assert not (tmp_path / "pipeline").exists()
    assert train("--model", "sd", "--output", str(tmp_path)).exit_code == 0
    one, other = weights(tmp_path), weights(trained("sd"))
    assert one["step"] == other["step"] == 6
    for part in ("parameters", "average"):
        assert all(torch.equal(a, b) for a, b in zip(one[part], other[part], strict=True))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_one(tmp_path, monkeypatch):
    file = tmp_path / "stage.pt"
    write({"step": 1}, file)

    def half(state, stream):
        stream.write(b"half a check")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        write({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*SCRIPT, *SHORT, "--model", "sd", "--output", str(tmp_path)]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    # One process prints, one writes.
    assert done.stdout.count("denoiser: step 6 of 6") == 1
    assert "trained by 2 processes" in done.stdout
    assert (tmp_path / "pipeline" / "model_index.json").exists()
    assert weights(tmp_path)["step"] == 6


def test_going_on_with_other_settings_is_refused(tmp_path, monkeypatch):
    def broken_off(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_shapes.tokens, "make", broken_off)
    assert train("--model", "pixart", "--output", str(tmp_path)).exit_code != 0
    done = train("--model", "sd", "--output", str(tmp_path))
    assert done.exit_code == 2
    assert "model='sd', but the run in" in done.output
    assert "has 'pixart': pass the same to resume it, or another --output" in " ".join(
        re.sub(r"[│\s]+", " ", done.output).split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixed-precision", "fp16"], "mixed_precision='fp16' does not work on a CPU: pass 'bf16' or 'no'"),
        (["--device", "mps"], "device='mps' is not what accelerate finds here, 'cpu': leave --device out"),
        (["--output", __file__], "is a file: pass a folder"),
    ],
)
def test_wrong_arguments_are_named_with_a_remedy(tmp_path, arguments, message):
    done = train("--output", str(tmp_path), *arguments)
    assert done.exit_code == 2
    assert message in " ".join(re.sub(r"[│\s]+", " ", done.output).split())


@pytest.mark.parametrize("model", ["sd", "pixart", "wan"])
def test_every_word_is_one_token_and_other_text_is_read_too(tmp_path, model):
    captions = [scene.caption for scene in everything(model)]
    make(model, captions, tmp_path)
    tokenizer = load(model, tmp_path)
    caption = captions[-1]
    words = len(re.findall(r"\w+|,", caption))
    assert len(tokenizer(caption).input_ids) == words + (2 if model == "sd" else 1)
    assert tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True).replace(" ,", ",") == caption
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    make(model, captions, tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(tokenizer("zebra & co").input_ids) > 5
    assert tokenizer.model_max_length == LENGTH
    assert (encode(tokenizer, captions)[:, -2:] == tokenizer.pad_token_id).all()


def test_captions_are_noisy_in_the_second_part_of_training(tmp_path):
    make("t5", CAPTIONS, tmp_path)
    batches = Batches(drawn("sd", 0, 1, every=40), load("t5", tmp_path), 4000)
    batches.data.latents = torch.zeros(len(batches.data.scenes), 8, 8, 8)
    clean, noisy = (batches.noisy(generator(0, "test"), done)[3] for done in (0.1, 0.9))
    empty = (clean == batches.empty).all(1)
    assert empty.float().mean() == pytest.approx(EMPTY, abs=0.02)
    assert torch.equal(empty, (noisy == batches.empty).all(1))
    shorter = (clean != batches.pad).sum(1) - (noisy != batches.pad).sum(1)
    assert (clean != noisy).any(1).float().mean() == pytest.approx(WRONG + MISSING, abs=0.03)
    assert (shorter == 1).float().mean() > 0.8 * MISSING
