"""What music, and the sound of a video, have to themselves: ACE-Step and Kandinsky 6."""

import copy
import re

import diffusers
import pytest
import torch

from tests.support.comparing import distance
from tests.support.counting import count, samples_of
from tests.support.settings import EVERY, FIXED, PATIENT, apply_settings
from tests.zoo.audio import SOUND, SOUND_TWO, ace_step, kandinsky6
from tests.zoo.case import STEPS, rows
from tests.zoo.inventory import shell
from tgate_processors import (
    TGateSchedule,
    apply_tgate,
    estimate_cost,
    get_tgate_report,
    is_tgate_applied,
    measure_convergence,
    remove_tgate,
)
from tgate_processors._internal.guidance.prediction import apply_cfg, relative_error

ACE_STEP = pytest.mark.parametrize("kind", rows([kind for kind in SOUND if kind.name == "ace_step"]))
KANDINSKY6 = pytest.mark.parametrize("kind", rows([kind for kind in SOUND_TWO if kind.name == "kandinsky6"]))
GATE = 3
DROP = {"gate_step": GATE}
PREDICT = {"gate_step": GATE, "guidance": "predict"}
# The shares of the noise that are left in the steps: 1, 0.94, 0.86, 0.75, 0.6, 0.38.
LATE, EARLY, BETWEEN = (
    {"cfg_interval_start": 0.1},
    {"cfg_interval_end": 0.3},
    {"cfg_interval_start": 0.05} | {"cfg_interval_end": 0.5},
)
GUIDED = {"late": (LATE, range(2, 6)), "early": (EARLY, range(4)), "between": (BETWEEN, range(1, 5))}


@ACE_STEP
def test_guidance_with_a_memory_cannot_be_dropped_but_predicted(kind):
    pipe = kind.build()
    plain = kind.run(pipe)
    message = re.escape('guidance="drop" is not possible') + r".* gate_step=3 and guidance=\"predict\", or"
    for settings in ({}, {"cross_attention": False}, {"guidance": "drop"}):
        with pytest.raises(ValueError, match=message):
            apply_settings(pipe, GATE, **settings)
        assert not is_tgate_applied(pipe)
    with pytest.raises(ValueError, match=message):
        estimate_cost(pipe, TGateSchedule(GATE), STEPS)
    # Nothing is dropped where a model is only watched.
    assert measure_convergence(pipe, [kind.inputs([0])]).steps["error"].notna().any()
    alone = kind.run(apply_settings(pipe, **PREDICT, cross_attention=False))
    assert get_tgate_report(pipe).half_batch_forwards == STEPS - GATE
    assert 0 < distance(alone, plain) < 1
    # Why: two equal halves, as half steps would give them, do not end it.
    remove_tgate(pipe)
    outputs, noises, step = [], [], pipe.scheduler.step

    def equal(module, args, output):
        outputs.append(output[0].chunk(2)[0])
        return (torch.cat([outputs[-1]] * 2),) if len(outputs) > GATE else output

    def note(noise, *args, **kwargs):
        noises.append(noise)
        return step(noise, *args, **kwargs)

    pipe.transformer.register_forward_hook(equal)
    pipe.scheduler.step = note
    kind.run(pipe)
    off = [distance(noise, text) for noise, text in zip(noises, outputs, strict=True)]
    assert min(off[GATE:]) > 0.1


@ACE_STEP
@pytest.mark.parametrize("turbo", [{"is_turbo": True}, {"model_version": "turbo"}], ids=["flag", "version"])
def test_a_turbo_checkpoint_has_no_guidance_and_reuses_cross_attention_alone(kind, turbo, caplog):
    pipe = apply_tgate(ace_step(**turbo), GATE)
    seen = count(pipe, kind)
    together = kind.run(pipe, [0, 1])
    assert seen.pop("denoiser") == [2] * STEPS
    assert get_tgate_report(pipe).half_batch_forwards == 0
    assert get_tgate_report(pipe).cross_attention_reused == STEPS - GATE
    assert distance(together, torch.cat([kind.run(pipe, [0]), kind.run(pipe, [1])])) < 5e-5
    assert not caplog.records
    given = {"max_sequence_length": 150, "num_frames": 8, "batch_size": 2}
    cost = estimate_cost(pipe, TGateSchedule(GATE), STEPS, **given)
    assert cost.report.half_batch_forwards == 0
    assert cost.without_tgate == cost.full * (2 * STEPS)
    # Texts are not filled up to what the tokenizer takes.
    usual = {"num_frames": 8, "batch_size": 2}
    assert estimate_cost(pipe, TGateSchedule(GATE), STEPS, **usual) == estimate_cost(
        pipe, TGateSchedule(GATE), STEPS, **usual, max_sequence_length=512
    )
    with pytest.raises(ValueError, match="has its guidance in itself"):
        estimate_cost(pipe, TGateSchedule(GATE), STEPS, **given, do_classifier_free_guidance=True)


@ACE_STEP
@pytest.mark.parametrize("interval", GUIDED)
@pytest.mark.parametrize("settings", [FIXED, PATIENT], ids=["fixed", "auto"])
def test_guidance_may_be_on_in_some_steps_alone(kind, interval, settings, caplog):
    call, guided = GUIDED[interval]
    pipe = kind.build()
    seen = count(pipe, kind)
    plain = kind.run(pipe, **call)
    assert seen.pop("denoiser") == [2 if step in guided else 1 for step in range(STEPS)]
    for every in EVERY:
        assert torch.equal(kind.run(kind.gate(pipe, **every), **call), plain)
    kind.gate(pipe, **settings)
    seen.clear()
    gated = kind.run(pipe, **call)
    full = get_tgate_report(pipe).full_steps
    assert seen["denoiser"] == [2 if step in guided and step in full else 1 for step in range(STEPS)]
    assert any(step not in full for step in guided)
    assert get_tgate_report(pipe).half_batch_forwards == sum(step not in full for step in guided)
    assert 0 < distance(gated, plain) < 1
    assert torch.equal(kind.run(pipe, **call), gated)
    assert not caplog.records


@ACE_STEP
def test_steps_that_are_given_count_and_not_those_that_are_asked_for(kind):
    pipe = kind.gate(kind.build(), 0.5)
    for timesteps in ([1.0, 0.9, 0.7, 0.4], [1 - step / 10 for step in range(10)]):
        kind.run(pipe, timesteps=timesteps)
        report = get_tgate_report(pipe)
        assert report.num_inference_steps == len(timesteps)
        assert report.full_steps == tuple(range(len(timesteps) // 2))


@ACE_STEP
def test_a_cover_that_is_mixed_with_another_song_is_refused(kind):
    pipe = kind.gate(kind.build(), GATE)
    with pytest.raises(
        ValueError, match=r"audio_cover_strength=0\.5 calls the denoiser of AceStepPipeline a second time"
    ):
        kind.run(pipe, audio_cover_strength=0.5)


@pytest.mark.skipif(not hasattr(diffusers, "guiders"), reason="this diffusers has no such guidance")
@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("size", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("frames", [250, 1500])
def test_the_error_of_plain_guidance_stands_for_that_of_guidance_with_a_memory(frames, size):
    normalized = diffusers.guiders.adaptive_projected_guidance
    generator, scale = torch.Generator().manual_seed(0), 7.0

    def guide(difference, memory):
        settings = {"eta": 0.0, "norm_threshold": 2.5, "use_original_formulation": True, "norm_dim": (1,)}
        return normalized.normalized_guidance(text, text - difference, scale - 1, memory, **settings)

    # As large as a velocity is.
    text = 1.3 * torch.randn(1, frames, 64, generator=generator)
    difference, memory = size * torch.randn(text.shape, generator=generator), normalized.MomentumBuffer(-0.75)
    for _ in range(5):
        guide(difference, memory)
    predicted = difference + 0.3 * size * torch.randn(text.shape, generator=generator)
    off = guide(predicted, copy.deepcopy(memory))
    right = guide(difference, memory)
    plain = apply_cfg((text, text - difference), 1, scale)
    estimate = relative_error(-predicted, -difference, plain, scale).item()
    assert 0.5 < estimate / ((off - right).norm() / right.norm()).item() < 2.5


@KANDINSKY6
def test_a_video_may_be_silent_in_one_call_and_sound_in_the_next(kind):
    pipe = kind.build()
    for settings in (DROP, FIXED):
        kind.gate(pipe, **settings)
        sounding, silent = kind.run(kind.gate(kind.build(), **settings)), kind.run(pipe, sample_audio=False)
        assert get_tgate_report(pipe).cross_attention_reused > 0
        kept = get_tgate_report(pipe).peak_bytes
        assert torch.equal(kind.run(pipe), sounding)
        assert get_tgate_report(pipe).peak_bytes > kept
        assert torch.equal(kind.run(pipe, sample_audio=False), silent)


@KANDINSKY6
def test_a_layer_of_the_sound_that_keeps_nothing_is_named(kind):
    pipe = kind.gate(kind.build(), GATE, custom_forwards="gate")
    # Whatever did not run in the call before.
    kind.run(pipe, sample_audio=False)
    layer = pipe.transformer.visual_transformer_blocks[1].audio_dec_block.cross_attention
    layer.forward = lambda hidden_states, **kwargs: torch.zeros_like(hidden_states)
    with pytest.raises(ValueError, match=r"visual_transformer_blocks\.1\.audio_dec_block\.cross_attention among them"):
        kind.run(pipe)


@KANDINSKY6
def test_a_distilled_checkpoint_has_no_guidance_and_reuses_cross_attention_alone(kind):
    pipe = kandinsky6(grid=3)
    pipe.scheduler = diffusers.PiflowScheduler(n_grid=3, num_policy_substeps=8)
    kind.gate(pipe, GATE)
    calls = []
    pipe.transformer.register_forward_hook(lambda module, args, output: calls.append(samples_of(output)))
    together = kind.run(pipe, [0, 1], guidance_scale=1.0)
    assert len(calls) == STEPS
    assert get_tgate_report(pipe).half_batch_forwards == 0
    assert get_tgate_report(pipe).cross_attention_reused == STEPS - GATE
    singles = torch.cat([kind.run(pipe, [prompt], guidance_scale=1.0) for prompt in (0, 1)])
    assert distance(together, singles) < 5e-5


@KANDINSKY6
def test_several_videos_of_a_prompt_and_a_budget(kind):
    pipe = kind.build()
    size, given = {**kind.size, "max_sequence_length": 5, "batch_size": 2}, {"num_videos_per_prompt": 2}
    bounds = [estimate_cost(pipe, TGateSchedule(**PREDICT), STEPS, **size, cross_attention=c) for c in (False, True)]
    whole = bounds[1].report.peak_bytes - bounds[0].report.peak_bytes
    generators = {"generator": [torch.Generator().manual_seed(seed) for seed in (500, 501)]}
    kind.run(apply_settings(pipe, **PREDICT, max_memory=whole // 2), **given, **generators)
    cost = estimate_cost(pipe, TGateSchedule(**PREDICT), STEPS, **size, max_memory=whole // 2)
    assert cost.report == get_tgate_report(pipe)
    assert 0 < cost.report.kept_layers < 4
    assert cost.report.half_batch_forwards == STEPS - GATE


@pytest.mark.skipif(not hasattr(diffusers, "Kandinsky6SRPipeline"), reason="this diffusers has no Kandinsky 6")
def test_what_refines_a_video_tile_by_tile_is_refused():
    pipe = shell("Kandinsky6SRPipeline")
    for cross in (None, False):
        with pytest.raises(ValueError, match=r"^Kandinsky6SRPipeline cannot be gated: it refines a video tile by tile"):
            apply_tgate(pipe, GATE, cross_attention=cross)
