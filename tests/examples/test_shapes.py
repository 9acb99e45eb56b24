"""The drawn domain: captions, the held-out split and the scorer that reads pictures back."""

import re

import numpy as np
import pytest
import torch

from examples.testbeds.shapes.evaluation import held_out_scenes, shares
from examples.testbeds.shapes.scenes import BACKGROUNDS, COLOURS, Scene, Thing, all_scenes, draw
from examples.testbeds.shapes.scorer import Score, features, read, score

SCENES = list(all_scenes())
SAMPLE = SCENES[:360:2] + SCENES[360::13]


@pytest.fixture(scope="module")
def pictures():
    numbers = torch.Generator().manual_seed(1)
    return torch.stack([draw(scene, numbers)[0] for scene in SAMPLE])


def test_every_scene_has_a_caption_of_its_own():
    captions = [scene.caption for scene in SCENES]
    assert len(captions) == len(set(captions)) == 360 + 5184
    assert "a small red circle to the left of a large blue square, on a grey background" in captions
    assert captions[0] == "a small red circle in the centre, on a white background"


def test_the_held_out_captions_are_a_fifth_and_never_change():
    held_out = [scene for scene in SCENES if scene.held_out]
    assert (len(held_out), sum(len(scene.things) == 1 for scene in held_out)) == (1147, 64)
    assert held_out[0].caption == "a small red circle at the bottom left, on a black background"
    # Every word is in captions that training sees.
    words = {word for scene in SCENES if not scene.held_out for word in re.findall(r"\w+", scene.caption)}
    assert words == {word for scene in SCENES for word in re.findall(r"\w+", scene.caption)}


def test_evaluation_has_500_prompts_that_training_does_not_see():
    scenes = held_out_scenes(64, 436)
    assert len({scene.caption for scene in scenes}) == 500
    assert all(scene.held_out for scene in scenes)


def test_the_scorer_reads_drawn_scenes(pictures):
    scores = score(pictures, SAMPLE)
    assert sum(one.right for one in scores) >= 0.98 * len(SAMPLE)
    reading = read(pictures[:1])[0]
    assert [thing for thing, _ in reading.objects] == list(SAMPLE[0].things)
    assert reading.background == SAMPLE[0].background


def test_the_scorer_reads_through_grain_and_a_shift_of_colour(pictures):
    noise = 0.05 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    scores = score((0.95 * pictures + 0.02 + noise).clamp(0, 1), SAMPLE)
    assert sum(one.right for one in scores) >= 0.98 * len(SAMPLE)


def test_the_scorer_says_no_to_other_captions(pictures):
    assert not any(one.right for one in score(pictures, SAMPLE[1:] + SAMPLE[:1]))


SCENE = Scene((Thing("small", "red", "circle"), Thing("large", "blue", "square")), "above", "white")


@pytest.mark.parametrize(
    ("things", "where", "background", "expected"),
    [
        (SCENE.things, "above", "white", Score(True, True, True, True)),
        (SCENE.things[::-1], "below", "white", Score(True, True, True, True)),
        (SCENE.things, "below", "white", Score(False, True, True, True)),
        (SCENE.things, "above", "black", Score(True, True, True, False)),
        ((Thing("small", "red", "square"), SCENE.things[1]), "above", "white", Score(True, False, True, True)),
        ((Thing("large", "red", "circle"), SCENE.things[1]), "above", "white", Score(True, True, False, True)),
        ((Thing("small", "green", "circle"), SCENE.things[1]), "above", "white", Score(True, True, True, False)),
        # Colours that change places are found where they should not be.
        (
            (Thing("small", "blue", "circle"), Thing("large", "red", "square")),
            "above",
            "white",
            Score(False, False, False, True),
        ),
        ((SCENE.things[0],), "in the centre", "white", Score(False, False, False, False)),
    ],
)
def test_the_parts_of_a_score(things, where, background, expected):
    picture, _ = draw(Scene(tuple(things), where, background), torch.Generator().manual_seed(0))
    assert score(picture[None], [SCENE]) == [expected]


def test_a_picture_of_nothing_and_one_of_noise_are_wrong():
    nothing = torch.ones(1, 3, 32, 32)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not any(one.right for one in score(torch.cat([nothing, noise]), [SCENE, SCENE]))


def test_arrays_as_a_pipeline_gives_them_and_other_sizes(pictures):
    array = pictures[:3].permute(0, 2, 3, 1).numpy()
    assert read(array) == read(pictures[:3])
    with pytest.raises(ValueError, match=r"pictures of shape \(1, 3, 64, 64\) cannot be read: pass"):
        read(np.zeros((1, 64, 64, 3), dtype=np.float32))


def test_features_are_shares_of_the_palette(pictures):
    vectors = features(pictures)
    assert vectors.shape == (len(SAMPLE), 16 * (len(COLOURS) + len(BACKGROUNDS)))
    assert torch.allclose(vectors.sum(1), torch.full((len(SAMPLE),), 16.0), atol=1e-3)
    # The same scenes drawn again are nearer than other scenes.
    numbers = torch.Generator().manual_seed(2)
    again = features(torch.stack([draw(scene, numbers)[0] for scene in SAMPLE[:50]]))
    distances = torch.cdist(again, vectors)
    assert (distances.argmin(1) == torch.arange(50)).float().mean() > 0.5


def test_shares_of_right_pictures():
    right, wrong = Score(True, True, True, True), Score(True, False, True, True)
    one = SCENES[0]
    parts = shares([one, one, SCENE, SCENE], [right, wrong, wrong, wrong])
    assert (parts["all right"], parts["one object"], parts["two objects"]) == (0.25, 0.5, 0.0)
    assert (parts["layout"], parts["shapes"]) == (1.0, 0.25)
