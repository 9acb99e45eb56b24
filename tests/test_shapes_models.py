"""The trained pipelines of this repository draw what the prompt says."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from shapes.evaluation import call_options, held_out_scenes, pictures_of
from shapes.scorer import score

MODELS = Path(__file__).parent.parent / "examples" / "models"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes-sd", "shapes-pixart"])
def test_prompts_that_training_has_not_seen(name):
    pipe = DiffusionPipeline.from_pretrained(MODELS / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(4, 12)
    guided = score(pictures_of(pipe, scenes, guidance_scale=3.0, num_inference_steps=25), scenes)
    assert sum(one.right for one in guided) >= 13
    # Guidance is what makes them right: some captions in training were wrong.
    alone = score(pictures_of(pipe, scenes, guidance_scale=1.0, num_inference_steps=25), scenes)
    assert sum(one.right for one in alone) < sum(one.right for one in guided)


@pytest.mark.parametrize("name", ["shapes-sd", "shapes-pixart"])
def test_they_are_small_and_an_ordinary_call_does(name):
    assert sum(file.stat().st_size for file in (MODELS / name).rglob("*")) <= 12 * 10**6
    pipe = DiffusionPipeline.from_pretrained(MODELS / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a large red circle in the centre, on a white background", num_inference_steps=2, **call_options(pipe))
    assert image.images[0].size == (32, 32)


def test_progress_counts_the_pictures():
    pipe = DiffusionPipeline.from_pretrained(MODELS / "shapes-sd", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    counts = []
    pictures = pictures_of(pipe, held_out_scenes(1, 2), batch_size=2, advance=counts.append, num_inference_steps=1)
    assert (len(pictures), counts) == (3, [2, 1])
