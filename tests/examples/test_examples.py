"""The scripts to copy: each is run as it stands, with a tiny pipeline in the place of its model."""

import os
import re
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from tests.support.paths import ROOT
from tests.support.testbeds import NEEDS_WAN
from tests.zoo.case import IS_OLD
from tests.zoo.cross_attention import SHAPES
from tests.zoo.joint import flux
from tests.zoo.modular import save_sdxl
from tgate_processors import apply_tgate, is_tgate_applied
from tgate_processors._internal.plan import schedule

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[!_]*.py"))
# On a CPU, and as small as the pipelines that stand for the models.
SMALL = {
    '"cuda"': '"cpu"',
    "torch.float16": "torch.float32",
    "torch.bfloat16": "torch.float32",
    ', variant="fp16"': "",
    "num_gpus=1": "num_cpus=1",
    "height=1024, width=1024": "height=32, width=32",
    '"height": 480, "width": 832, "num_frames": 81': '"height": 32, "width": 32, "num_frames": 5',
}


def save_flux(folder):
    """Save a pipeline with both of its text encoders."""
    clip, t5 = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer"), SHAPES.with_name("shapes-pixart") / "tokenizer"
    words = AutoTokenizer.from_pretrained(t5)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(clip), **sizes))
    sizes = {"num_layers": 1, "num_heads": 1, "d_kv": 4, "d_ff": 4, "vocab_size": len(words)}
    long_text = T5EncoderModel(T5Config(d_model=8, **sizes))
    flux(tokenizer=clip, text_encoder=text, tokenizer_2=words, text_encoder_2=long_text).save_pretrained(folder)


def same(name):
    return lambda folder: folder.symlink_to(EXAMPLES / "models" / name)


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
STANDS_FOR = {
    "sdxl": (SDXL, save_sdxl, ["sdxl.png"]),
    "flux": ("black-forest-labs/FLUX.1-dev", save_flux, ["flux.png"]),
    "wan": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", same("shapes-wan"), ["wan.gif"]),
    "deepcache": ("stable-diffusion-v1-5/stable-diffusion-v1-5", same("shapes-sd"), ["deepcache.png"]),
}
MARKS = {
    "wan": (NEEDS_WAN, pytest.mark.slow),
    "flux": pytest.mark.skipif(IS_OLD, reason="this diffusers cannot guide FLUX by two calls"),
}


def small(name, model, folder):
    """The code of a script, with what is in a folder in the place of its model."""
    code = (EXAMPLES / f"{name}.py").read_text()
    assert f'MODEL = "{model}"' in code
    for real, other in {model: str(folder), **SMALL}.items():
        code = code.replace(real, other)
    return code


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(name):
        """Run a script, and give what it has named."""
        model, save, pictures = STANDS_FOR[name]
        save(tmp_path / "model")
        code = small(name, model, tmp_path / "model")
        monkeypatch.chdir(tmp_path)
        namespace = {}
        exec(compile(code, f"{name}.py", "exec"), namespace)
        assert {*tmp_path.iterdir()} == {tmp_path / each for each in ("model", *pictures)}
        for picture in pictures:
            with Image.open(picture) as image:
                assert image.getextrema() != ((0, 0),) * 3
        return namespace

    return run


# As under `python -W error`.
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in STANDS_FOR])
def test_a_script_draws_with_fewer_full_steps(name, run, capsys, monkeypatch):
    # Random weights predict badly: this accepts whatever comes.
    monkeypatch.setattr(schedule, "FORECAST_TOLERANCE", 1e6)
    namespace = run(name)
    pipe = namespace["pipe"]
    ((half, forecast),) = re.findall(r"(\d+) half and (\d+) forecast of", capsys.readouterr().out)
    assert int(half) + int(forecast) > 0
    assert is_tgate_applied(pipe) == (name != "sdxl")


@pytest.mark.slow
def test_two_actors_of_a_ray_cluster_draw_what_one_process_does(tmp_path):
    pytest.importorskip("ray")
    folder = EXAMPLES / "models/shapes-sd"
    (tmp_path / "ray_batch.py").write_text(small("ray_batch", SDXL, folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "ray_batch.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    # Both have loaded a pipeline.
    assert len(set(re.findall(r"Painter\)\) pid=(\d+)", done.stdout + done.stderr))) == 2
    pipe = apply_tgate(DiffusionPipeline.from_pretrained(folder, dtype=torch.float32))
    for seed, prompt in enumerate(["a red fox in the snow", "a harbour at dawn"]):
        alone = pipe(prompt, num_inference_steps=25, generator=torch.Generator("cpu").manual_seed(seed)).images[0]
        with Image.open(tmp_path / f"ray-{seed}.png") as image:
            assert ImageChops.difference(image, alone).getextrema() == ((0, 0),) * 3


def test_scripts_to_copy_are_short():
    # The server and the batch job have tests of their own.
    short = [*STANDS_FOR, "ray_batch", "server"]
    assert {script.stem for script in SCRIPTS} == {*short, "quickstart"}
    for name in short:
        lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
        assert len(lines) <= (60 if name == "server" else 25)
        assert f"`python examples/{name}.py`" in lines[0]
