"""The domain of the video testbed: captions, paths and the scorer of clips."""

import re
from dataclasses import replace

import diffusers
import pytest
import torch

from examples.benchmarks.evaluation.metrics import drawn, frames_of, right
from examples.testbeds.shapes.clips import FRAMES, Clip, all_clips, draw_clip, score_clips, strips
from examples.testbeds.shapes.evaluation import held_out, shares
from examples.testbeds.shapes.scenes import Thing
from examples.testbeds.shapes.scorer import Score
from tests.support.paths import ROOT
from tests.support.testbeds import NEEDS_WAN

MODELS = ROOT / "examples" / "models"
CLIPS = list(all_clips())
CLIP = Clip(Thing("large", "red", "circle"), "at the top left", "in the centre", "white")


def frames(*clips):
    """As a pipeline gives them."""
    numbers = torch.Generator().manual_seed(1)
    return torch.stack([draw_clip(clip, numbers)[0] for clip in clips]).permute(0, 2, 3, 4, 1).numpy()


def test_every_clip_has_a_caption_of_its_own_and_a_fifth_is_held_out():
    captions = [clip.caption for clip in CLIPS]
    assert len(captions) == len(set(captions)) == 360 + 1440
    assert captions[0] == "a small red circle stays in the centre, on a white background"
    assert CLIP.caption == "a large red circle moves from the top left to the centre, on a white background"
    hidden = [clip for clip in CLIPS if clip.held_out]
    assert (len(hidden), sum(clip.easy for clip in hidden)) == (381, 64)
    words = {word for clip in CLIPS if not clip.held_out for word in re.findall(r"\w+", clip.caption)}
    assert words == {word for clip in CLIPS for word in re.findall(r"\w+", clip.caption)}
    assert len({clip.caption for clip in held_out("wan", 10, 20)} & {clip.caption for clip in hidden}) == 30


def test_the_scorer_reads_drawn_clips_and_says_no_to_other_captions():
    some = CLIPS[::211]
    assert all(one.right for one in score_clips(frames(*some), some))
    assert not any(one.right for one in score_clips(frames(*some), some[1:] + some[:1]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Score(True, True, True, True)),
        ({"end": "at the top left"}, Score(False, True, True, True)),
        ({"start": "in the centre", "end": "at the top left"}, Score(False, True, True, True)),
        ({"thing": Thing("large", "red", "square")}, Score(True, False, True, True)),
        ({"thing": Thing("small", "red", "circle")}, Score(True, True, False, True)),
        ({"thing": Thing("large", "blue", "circle")}, Score(True, True, True, False)),
        ({"background": "grey"}, Score(True, True, True, False)),
    ],
)
def test_the_parts_of_a_score(change, expected):
    assert score_clips(frames(replace(CLIP, **change)), [CLIP]) == [expected]


@pytest.mark.parametrize("frame", range(FRAMES))
def test_one_wrong_frame_makes_a_clip_wrong(frame):
    made = frames(CLIP)
    made[0, frame] = frames(replace(CLIP, thing=Thing("large", "red", "square")))[0, frame]
    assert score_clips(made, [CLIP]) == [Score(True, False, True, True)]
    made[0, frame] = 1.0
    assert score_clips(made, [CLIP]) == [Score(False, False, False, False)]


def test_a_strip_has_all_frames_and_is_read_as_the_clip():
    made = frames(CLIP, CLIPS[0])
    images = torch.from_numpy(strips(made)).permute(0, 3, 1, 2)
    assert images.shape == (2, 3, 32, FRAMES * 32)
    assert torch.equal(frames_of(images), torch.from_numpy(made).flatten(0, 1).permute(0, 3, 1, 2))
    assert right(images, [CLIP, CLIPS[0]]) == [True, True]
    assert right(images, [CLIPS[0], CLIP]) == [False, False]
    assert right(drawn([CLIP, CLIPS[0]], 0), [CLIP, CLIPS[0]]) == [True, True]
    # Pictures are one frame.
    assert torch.equal(frames_of(images[..., :32]), images[..., :32])


def test_shares_of_right_clips():
    good, bad = Score(True, True, True, True), Score(False, True, True, True)
    parts = shares([CLIPS[0], CLIP, CLIP], [good, good, bad])
    assert (parts["all right"], parts["at rest"], parts["moving"]) == (2 / 3, 1, 0.5)
    assert parts["layout"] == 2 / 3


@NEEDS_WAN
def test_the_decoder_is_trained_on_latents_as_the_denoiser_has_them():
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    from examples.testbeds.shapes.wan import ClipDecoding, decoded

    vae = diffusers.AutoencoderKLWan.from_pretrained(MODELS / "shapes-wan" / "vae", dtype=torch.float32)
    pictures = torch.from_numpy(frames(*CLIPS[::600])).permute(0, 4, 1, 2, 3) * 2 - 1
    mean, deviation = (torch.tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean
        loss = ClipDecoding(vae)((latents - mean) / deviation, torch.zeros_like(latents), pictures)
        back = unpatchify(decoded(vae, latents), vae.config.patch_size)
        assert torch.equal(back.clamp(-1, 1), vae.decode(latents).sample)
    # What is learned from is not clamped.
    assert back.abs().max() > 1
    error = back - pictures
    assert loss.item() == pytest.approx((error.abs().mean() + error.square().mean()).item())
