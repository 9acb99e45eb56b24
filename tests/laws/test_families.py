"""The laws of the core for the families beyond UNets and PixArt."""

import re
from collections import defaultdict

import pytest
import torch

from tests.support.comparing import Stop
from tests.support.counting import count, is_cross, samples_of
from tests.support.macs import COSTS, taken
from tests.support.prediction import refuses_a_choice
from tests.support.settings import EVERY, FIXED, FORECAST, LEVELS, PATIENT, SETTINGS
from tests.zoo.case import STEPS, Case, rows
from tests.zoo.catalogue import BY_NAME, CROSS_ATTENTION, OWN_DENOISERS
from tests.zoo.cross_attention import LTX2_FURTHER, TOKENS
from tests.zoo.variants import AROUND
from tgate_processors import TGateSchedule, estimate_cost, get_tgate_report, is_tgate_applied, remove_tgate
from tgate_processors._internal.families import attention_modules

GATE = 3
DROP = {"gate_step": GATE}
GUIDED = [kind for kind in OWN_DENOISERS if kind.is_guided]


def denoiser_of(pipe, kind):
    return getattr(pipe, kind.denoiser)


def sample_of(output):
    """The prediction in what a denoiser gives, in whatever form."""
    return samples_of(output)[0]


LTX2 = pytest.mark.parametrize("kind", rows([BY_NAME["ltx2"]], default=()))


@LTX2
@pytest.mark.parametrize("settings", [DROP, FIXED, PATIENT], ids=str)
def test_further_calls_run_whole_and_leave_what_is_kept_alone(kind: Case, settings):
    further = LTX2_FURTHER
    plain = kind.run(kind.build(), **further)
    pipe = kind.gate(kind.build(), **settings)
    seen, alone = defaultdict(list), []
    for name, layer in attention_modules(pipe.transformer).items():
        layer.to_k.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(len(args[0])))
    pipe.transformer.register_forward_hook(lambda module, args, output: alone.append(samples_of(output)))
    gated = kind.run(pipe, **further)
    report = get_tgate_report(pipe)
    full = report.full_steps
    assert 0 < report.half_batch_forwards == STEPS - len(full)
    for name, batches in seen.items():
        expected = []
        for step in range(STEPS):
            first = [2] if step in full else [] if is_cross(kind, name) else [1]
            # One call leaves out self-attention in a block, the other attention between video and sound.
            left_out = "_to_" in name or ("blocks.1." in name and "attn1" in name)
            expected += first + ([1] if left_out else [1, 1])
        assert batches == expected, name
    assert not torch.equal(gated, plain)
    assert torch.equal(kind.run(pipe, **further), gated)
    for every in EVERY:
        assert torch.equal(kind.run(kind.gate(pipe, **every), **further), plain)
    assert len(alone) == 3 * STEPS * (2 + len(EVERY))


@LTX2
def test_a_run_that_breaks_in_a_further_call_leaves_nothing(kind: Case):
    pipe = kind.gate(kind.build(), **FIXED)
    further = LTX2_FURTHER
    expected = kind.run(pipe, **further)
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3 * GATE + 2:
            raise Stop

    handle = pipe.transformer.proj_in.register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        kind.run(pipe, **further)
    handle.remove()
    state = vars(pipe)["_tgate"].state
    # As the next forward of the denoiser would, whoever calls it.
    state.resume()
    assert state.current() is None
    assert torch.equal(kind.run(pipe, **further), expected)


@LTX2
def test_either_scale_turns_guidance_on(kind: Case):
    pipe = kind.gate(kind.build(), GATE)
    for scales, halves in (((1.0, 4.0), STEPS - GATE), ((3.0, 1.0), STEPS - GATE), ((1.0, 1.0), 0)):
        given = {**kind.conditioning([0], True), "guidance_scale": scales[0], "audio_guidance_scale": scales[1]}
        kind.run(pipe, **given)
        assert get_tgate_report(pipe).half_batch_forwards == halves


def of(name):
    """One kind of those around other denoisers."""
    return pytest.mark.parametrize("kind", rows([kind for kind in AROUND if kind.name == name], default=()))


@of("video_to_video")
@pytest.mark.parametrize(("strength", "steps"), [(1.0, 6), (0.5, 3), (0.34, 2)])
def test_a_video_that_is_noised_in_part_takes_the_rest_of_the_steps(kind: Case, strength, steps):
    pipe = kind.gate(kind.build(), 0.5)
    seen = count(pipe, kind)["denoiser"]
    kind.run(pipe, strength=strength)
    report = get_tgate_report(pipe)
    assert len(seen) == report.num_inference_steps == steps
    assert report.half_batch_forwards == steps // 2


@of("controlnet_xs")
@pytest.mark.parametrize("control", [(0.0, 0.5), (0.5, 1.0), (0.3, 0.8)])
def test_a_control_may_run_in_some_steps_only(kind: Case, control):
    call = dict(zip(("control_guidance_start", "control_guidance_end"), control, strict=True))
    pipe, plain = kind.build(), kind.run(kind.build(), **call)
    for settings in (DROP, FIXED, PATIENT):
        gated = kind.run(kind.gate(pipe, **settings), **call)
        report = get_tgate_report(pipe)
        assert report.half_batch_forwards == report.cross_attention_reused == STEPS - len(report.full_steps) > 0
        assert not torch.equal(gated, plain)
    assert torch.equal(kind.run(kind.gate(pipe, STEPS), **call), plain)


@of("sana_world")
def test_self_attention_that_no_layer_has_is_not_reused(kind: Case):
    pipe = kind.build()
    for name in ("sp_interval", "fi_interval"):
        with pytest.raises(ValueError, match=r"=2.* reuse self-attention, and no layer of SanaWMTransformer3DModel "):
            kind.gate(pipe, GATE, **{name: 2})
    assert not is_tgate_applied(pipe)
    with pytest.raises(ValueError, match="SanaWMTransformer3DModel does not run on the meta device"):
        estimate_cost(pipe, TGateSchedule(GATE), STEPS)


# Guidance that cannot be dropped keeps no mean.
@pytest.mark.parametrize("kind", rows([kind for kind in GUIDED if kind.name != "ace_step"], default=()))
@pytest.mark.parametrize("half", [None, "unconditional"])
def test_after_the_gate_the_denoiser_gives_what_it_gives_with_what_is_kept_in_the_place_of_cross_attention(
    kind: Case, half
):
    if half == "unconditional" and refuses_a_choice(kind):
        return
    pipe = kind.build()
    denoiser = denoiser_of(pipe, kind)
    stays = half or kind.kept
    place = 1 if (stays == "conditional") is not kind.conditional_first else 0
    calls, kept, outputs = [], {}, []
    layers = {name: layer for name, layer in attention_modules(denoiser).items() if is_cross(kind, name)}

    def keep(name):
        def hook(module, args, output):
            if len(calls) == GATE:
                halves = output.chunk(2)
                kept[name] = (halves[0] + halves[1]) / 2 if kind.mean else halves[place]

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    # Registered before T-GATE's: sees what the pipeline gives.

    def note(module, args, kwargs):
        # HunyuanDiT empties the list of what its ControlNet gave.
        calls.append(
            (tuple(args), {key: list(value) if isinstance(value, list) else value for key, value in kwargs.items()})
        )

    handles.append(denoiser.register_forward_pre_hook(note, with_kwargs=True))
    kind.gate(pipe, GATE, cfg_half=half)
    denoiser.register_forward_hook(lambda module, args, output: outputs.append(sample_of(output)))
    kind.run(pipe)
    remove_tgate(pipe)
    for handle in handles:
        handle.remove()
    args, kwargs = calls[GATE]
    # After a ControlNet on one half all of it is that half.
    halves = 1 if kind.control else 2
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, name=name: torch.cat([kept[name]] * halves))
    with torch.no_grad():
        expected = sample_of(denoiser(*args, **kwargs)).chunk(halves)[place if halves == 2 else 0]
    torch.testing.assert_close(outputs[GATE], torch.cat([expected] * 2), rtol=1e-4, atol=1e-5)


# Lumina's layers give out their heads one by one.
@pytest.mark.parametrize("kind", rows([kind for kind in GUIDED if kind.name != "lumina"], default=()))
def test_a_layer_that_attends_to_the_text_and_keeps_nothing_is_named(kind: Case):
    pipe = kind.gate(kind.build(), GATE, custom_forwards="gate")
    layers = attention_modules(denoiser_of(pipe, kind))
    name, layer = next((name, layer) for name, layer in layers.items() if is_cross(kind, name))
    layer.forward = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)
    with pytest.raises(ValueError, match=re.escape(f"{name.removesuffix('.processor')} among them, keep no output")):
        kind.run(pipe)


@pytest.mark.parametrize("kind", rows([kind for kind in CROSS_ATTENTION if kind.name in COSTS], default=()))
@pytest.mark.parametrize("settings", [SETTINGS["v2"], FIXED], ids=["v2", "fixed"])
def test_the_estimate_is_what_a_run_takes(kind: Case, settings):
    pipe = kind.build()
    size = {name: number for name, number in kind.size.items() if name in ("height", "width", "num_frames")}
    given = {**size, **COSTS[kind.name], "batch_size": 2 if kind.batches else 1}
    cost = estimate_cost(pipe, TGateSchedule(**kind.chosen(settings)), STEPS, **given, cross_attention=True)
    prompts = [0, 1] if kind.batches else [0]
    # What is a layer and what attention differs where attention is not the usual one.
    # Stable Audio embeds its time once for all samples.
    off = 0.005 if kind.name == "stable_audio" else 0
    assert cost.without_tgate.total == pytest.approx(taken(pipe, kind, prompts, linear=True).total, rel=off)
    gated = taken(kind.gate(pipe, **settings), kind, prompts, linear=True)
    assert cost.with_tgate.total == pytest.approx(gated.total, rel=off)
    assert cost.report == get_tgate_report(pipe)
    assert cost.report.peak_bytes > 0


@LTX2
@pytest.mark.parametrize("scales", [{}, {"modality_scale": 1.0, "audio_modality_scale": 1.0}], ids=["both", "one"])
def test_the_estimate_counts_the_further_calls_that_it_is_told_of(kind: Case, scales):
    pipe, further = kind.build(), LTX2_FURTHER | scales
    size = {name: number for name, number in kind.size.items() if name in ("height", "width", "num_frames")}
    told = [{"spatio_temporal_guidance_blocks": [1]}, {"isolate_modalities": True}][: 1 if scales else 2]

    def estimate(schedule, **given):
        choice = {"cross_attention": True, "max_sequence_length": TOKENS, **given}
        return estimate_cost(pipe, schedule, STEPS, **size, **choice)

    fixed = TGateSchedule(GATE)
    cost = estimate(fixed, extra_forwards=told)
    assert cost.without_tgate.total == taken(pipe, kind, [0], **further).total
    assert cost.with_tgate.total == taken(kind.gate(pipe, GATE), kind, [0], **further).total
    assert cost.report == get_tgate_report(pipe) == estimate(fixed, extra_forwards=[]).report
    for settings in (FORECAST, LEVELS):
        cost = estimate(TGateSchedule(**settings), extra_forwards=told)
        gated = taken(kind.gate(pipe, **settings), kind, [0], **further).total
        assert cost.with_tgate.total == gated
        assert cost.report.levels == get_tgate_report(pipe).levels
        assert cost.report.peak_bytes == get_tgate_report(pipe).peak_bytes
    with pytest.raises(
        ValueError, match=r'pass extra_forwards, .* each such as \{"isolate_modalities": True\}, or \[\]'
    ):
        estimate(fixed)
    for wrong in ([{"stg_scale": 1}], [{}], ["isolate_modalities"]):
        with pytest.raises(ValueError, match="means nothing for a LTX2VideoTransformer3DModel: pass a dict for each"):
            estimate(fixed, extra_forwards=wrong)
