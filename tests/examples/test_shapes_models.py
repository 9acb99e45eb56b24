"""The trained pipelines of this repository draw what the prompt says."""

import pytest
import torch
from diffusers import DiffusionPipeline

from examples.testbeds.shapes.evaluation import call_options, held_out, held_out_scenes, pictures_of, scores_of
from tests.support.paths import ROOT
from tests.support.testbeds import NEEDS_WAN, THOROUGH_WAN

MODELS = ROOT / "examples" / "models"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    # Five frames have to be right in a clip.
    [("shapes-sd", 13), ("shapes-pixart", 13), pytest.param("shapes-wan", 4, marks=THOROUGH_WAN)],
)
def test_prompts_that_training_has_not_seen(name, least):
    pipe = DiffusionPipeline.from_pretrained(MODELS / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out(name.removeprefix("shapes-"), 4, 12)
    guided = scores_of(pictures_of(pipe, scenes, guidance_scale=3.0, num_inference_steps=25), scenes)
    assert sum(one.right for one in guided) >= least
    # Guidance is what makes them right: some captions in training were wrong.
    alone = scores_of(pictures_of(pipe, scenes, guidance_scale=1.0, num_inference_steps=25), scenes)
    assert sum(one.right for one in alone) < sum(one.right for one in guided)


@pytest.mark.parametrize("name", ["shapes-sd", "shapes-pixart", pytest.param("shapes-wan", marks=NEEDS_WAN)])
def test_they_are_small_and_an_ordinary_call_does(name):
    assert sum(file.stat().st_size for file in (MODELS / name).rglob("*")) <= 12 * 10**6
    pipe = DiffusionPipeline.from_pretrained(MODELS / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a large red circle in the centre, on a white background", num_inference_steps=2, **call_options(pipe))
    if name == "shapes-wan":
        assert made.frames.shape == (1, 5, 32, 32, 3)
    else:
        assert made.images[0].size == (32, 32)


def test_progress_counts_the_pictures():
    pipe = DiffusionPipeline.from_pretrained(MODELS / "shapes-sd", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    counts = []
    pictures = pictures_of(pipe, held_out_scenes(1, 2), batch_size=2, advance=counts.append, num_inference_steps=1)
    assert (len(pictures), counts) == (3, [2, 1])
