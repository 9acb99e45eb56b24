"""The laws of the core for the families beyond UNets and PixArt."""

import re
from collections import defaultdict

import pytest
import torch

from tests.support.comparing import Stop, distance
from tests.support.counting import count, is_cross, keys_of, samples_of
from tests.support.macs import COSTS, taken
from tests.support.prediction import errors_of
from tests.support.settings import EVERY, FIXED, PATIENT, SETTINGS, computed, full_steps
from tests.support.states import check_restored, snapshot
from tests.zoo.core import STEPS, rows
from tests.zoo.cross_attention import BY_KIND, TOKENS, Kind
from tests.zoo.cross_attention import KINDS as OWN
from tests.zoo.variants import AROUND
from tgate_processors import TGateSchedule, estimate_cost, get_tgate_report, is_tgate_applied, remove_tgate
from tgate_processors._internal.families import attention_modules

KINDS = [*OWN, *AROUND]
GATE = 3
DROP = {"gate_step": GATE}
# One law of each of these by default: they differ from others in little but their data.
ONCE = {"ltx2", "sana_video", "kandinsky3", "lumina", "audioldm2", "picture_video"}


ALL = {kind.name for kind in KINDS}
# Others have the same denoiser.
SECOND = {kind.name for kind in KINDS if kind.tier == "slow" or kind in AROUND}
SECOND -= {"any_flow", "stable_audio3", "text_to_video", "controlnet_xs", "sana_world", "ace_step"}
GUIDED = [kind for kind in KINDS if kind.is_guided]
every = pytest.mark.parametrize("kind", rows(KINDS, ONCE))
every_once = pytest.mark.parametrize("kind", rows(KINDS))
guided = pytest.mark.parametrize("kind", rows(GUIDED, ONCE))
# What depends on the denoiser alone.
every_denoiser = pytest.mark.parametrize("kind", rows([kind for kind in KINDS if kind.name not in SECOND], ALL))
guided_denoiser = pytest.mark.parametrize("kind", rows([kind for kind in GUIDED if kind.name not in SECOND], ALL))
every_slow = pytest.mark.parametrize("kind", rows(KINDS, ALL))


def denoiser_of(pipe, kind):
    return getattr(pipe, kind.denoiser)


def sample_of(output):
    """The prediction in what a denoiser gives, in whatever form."""
    return samples_of(output)[0]


def only_conditional(kind, half):
    """Whether a choice of half is refused, because further calls are about the conditional one."""
    if half != "unconditional" or kind.second_scale is None:
        return False
    with pytest.raises(ValueError, match="guides by further calls too, and compares them with the conditional half"):
        kind.gate(kind.build(), GATE, cfg_half=half)
    return True


@every
def test_apply_and_remove_change_nothing_else_and_two_calls_agree(kind: Kind):
    pipe = kind.build()
    baseline = kind.run(pipe)
    before = snapshot(pipe, kind)
    kind.gate(pipe, GATE)
    gated = kind.run(pipe)
    assert not torch.equal(gated, baseline)
    assert torch.equal(kind.run(pipe), gated)
    remove_tgate(pipe)
    check_restored(before, snapshot(pipe, kind))
    assert torch.equal(kind.run(pipe), baseline)


def check_counts(kind, settings, prompts, plan, share):
    """Every layer runs as often, and on as much, as planned."""
    pipe = kind.gate(kind.build(), **settings)
    seen = count(pipe, kind)
    kind.run(pipe, prompts)
    report = get_tgate_report(pipe)
    assert report.num_inference_steps == STEPS
    full = seen.pop("denoiser")
    assert full == [full[0] // part for part in share]
    kinds = {is_cross(kind, name) for name in seen}
    assert kinds == {True, not kind.own}
    for name, batches in seen.items():
        of_kind = 0 if is_cross(kind, name) else 1
        assert batches == [batches[0] // part for part, ran in zip(share, plan, strict=True) if ran[of_kind]], name
    crossed = sum(cross for cross, _ in plan)
    assert (report.cross_attention_computed, report.cross_attention_reused) == (crossed, STEPS - crossed)
    assert report.half_batch_forwards == share.count(2)
    assert report.full_batch_forwards == STEPS - share.count(2)
    return report


def reached(kind, settings):
    """The settings, without those of self-attention where no layer has it."""
    return {name: value for name, value in settings.items() if kind.own or name == "gate_step"}


@every_once
@pytest.mark.parametrize("name", ["v2", pytest.param("gate_1", marks=pytest.mark.slow)])
def test_to_k_runs_exactly_as_the_schedule_says(kind: Kind, name):
    settings = reached(kind, SETTINGS[name])
    plan = [computed(step, STEPS, **settings) for step in range(STEPS)]
    halves = 2 if kind.is_guided else 1
    prompts = [0, 1] if kind.batches else [0]
    check_counts(kind, settings, prompts, plan, [1 if cross else halves for cross, _ in plan])


@guided
@pytest.mark.parametrize("settings", [FIXED, pytest.param(PATIENT, marks=pytest.mark.slow)], ids=["fixed", "auto"])
def test_full_steps_compute_everything_and_half_steps_one_half(kind: Kind, settings):
    full = full_steps(STEPS, settings)
    plan = [(step in full, True) for step in range(STEPS)]
    report = check_counts(kind, settings, [0], plan, [1 if step in full else 2 for step in range(STEPS)])
    assert report.full_steps == full


def further_calls(kind):
    """The settings of a call of LTX-2 with further guidance: without the attention of a layer, and kind by kind."""
    scales = {"stg_scale": 1.0, "modality_scale": 3.0, "audio_modality_scale": 3.0, "guidance_rescale": 0.7}
    return {**scales, "spatio_temporal_guidance_blocks": [1]}


LTX2 = pytest.mark.parametrize("kind", rows([BY_KIND["ltx2"]], ALL))


@LTX2
@pytest.mark.parametrize("settings", [DROP, FIXED, PATIENT], ids=str)
def test_further_calls_run_whole_and_leave_what_is_kept_alone(kind: Kind, settings):
    further = further_calls(kind)
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
def test_a_run_that_breaks_in_a_further_call_leaves_nothing(kind: Kind):
    pipe = kind.gate(kind.build(), **FIXED)
    further = further_calls(kind)
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
def test_either_scale_turns_guidance_on(kind: Kind):
    pipe = kind.gate(kind.build(), GATE)
    for scales, halves in (((1.0, 4.0), STEPS - GATE), ((3.0, 1.0), STEPS - GATE), ((1.0, 1.0), 0)):
        given = {**kind.conditioning([0], True), "guidance_scale": scales[0], "audio_guidance_scale": scales[1]}
        kind.run(pipe, **given)
        assert get_tgate_report(pipe).half_batch_forwards == halves


def of(name):
    """One kind of those around other denoisers."""
    return pytest.mark.parametrize("kind", rows([kind for kind in AROUND if kind.name == name], ALL))


@of("video_to_video")
@pytest.mark.parametrize(("strength", "steps"), [(1.0, 6), (0.5, 3), (0.34, 2)])
def test_a_video_that_is_noised_in_part_takes_the_rest_of_the_steps(kind: Kind, strength, steps):
    pipe = kind.gate(kind.build(), 0.5)
    seen = count(pipe, kind)["denoiser"]
    kind.run(pipe, strength=strength)
    report = get_tgate_report(pipe)
    assert len(seen) == report.num_inference_steps == steps
    assert report.half_batch_forwards == steps // 2


@of("controlnet_xs")
@pytest.mark.parametrize("control", [(0.0, 0.5), (0.5, 1.0), (0.3, 0.8)])
def test_a_control_may_run_in_some_steps_only(kind: Kind, control):
    call = dict(zip(("control_guidance_start", "control_guidance_end"), control, strict=True))
    pipe, plain = kind.build(), kind.run(kind.build(), **call)
    for settings in (DROP, FIXED, PATIENT):
        gated = kind.run(kind.gate(pipe, **settings), **call)
        report = get_tgate_report(pipe)
        assert report.half_batch_forwards == report.cross_attention_reused == STEPS - len(report.full_steps) > 0
        assert not torch.equal(gated, plain)
    assert torch.equal(kind.run(kind.gate(pipe, STEPS), **call), plain)


@of("sana_world")
def test_self_attention_that_no_layer_has_is_not_reused(kind: Kind):
    pipe = kind.build()
    for name in ("sp_interval", "fi_interval"):
        with pytest.raises(ValueError, match=r"=2.* reuse self-attention, and no layer of SanaWMTransformer3DModel "):
            kind.gate(pipe, GATE, **{name: 2})
    assert not is_tgate_applied(pipe)
    with pytest.raises(ValueError, match="SanaWMTransformer3DModel does not run on the meta device"):
        estimate_cost(pipe, TGateSchedule(GATE), STEPS)


@pytest.mark.parametrize("kind", rows(GUIDED, ALL))
def test_guidance_alone_runs_every_layer_on_one_half(kind: Kind):
    full = full_steps(STEPS, FIXED)
    share = [1 if step in full else 2 for step in range(STEPS)]
    check_counts(kind, {**FIXED, "cross_attention": False}, [0], [(True, True)] * STEPS, share)


@every_slow
def test_full_steps_alone_change_no_bit(kind: Kind):
    pipe, baseline = kind.build(), kind.plain()
    for settings in ({"gate_step": STEPS}, *(EVERY if kind.is_guided else ())):
        assert torch.equal(kind.run(kind.gate(pipe, **settings)), baseline)
        assert get_tgate_report(pipe).half_batch_forwards == get_tgate_report(pipe).cross_attention_reused == 0


@pytest.mark.parametrize("kind", rows([kind for kind in KINDS if kind.batches], ALL))
def test_a_batch_of_two_prompts_equals_two_singles(kind: Kind):
    rounding = distance(kind.plain([0, 1]), torch.cat([kind.plain([0]), kind.plain([1])]))
    assert rounding < 1e-4
    for settings in (DROP, *([FIXED] if kind.is_guided else [])):
        pipe = kind.gate(kind.build(), **settings)
        singles = torch.cat([kind.run(pipe, [0]), kind.run(pipe, [1])])
        assert distance(kind.run(pipe, [0, 1]), singles) < 5e-5 + 5 * rounding


@every_denoiser
@pytest.mark.parametrize("forward", [GATE, GATE + 1])
def test_a_run_that_breaks_leaves_nothing(kind: Kind, forward):
    settings = FIXED if kind.is_guided else DROP
    pipe, baseline = kind.build(), kind.plain()
    expected = kind.run(kind.gate(pipe, **settings))
    layers = attention_modules(denoiser_of(pipe, kind))
    layer = denoiser_of(pipe, kind).get_submodule(kind.first)
    if kind.own:
        layer = keys_of([module for name, module in layers.items() if not is_cross(kind, name)][-1])
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == forward:
            raise Stop

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        kind.run(pipe)
    handle.remove()
    assert vars(pipe)["_tgate"].state.nbytes == 0
    assert torch.equal(kind.run(pipe), expected)
    assert torch.equal(kind.run(remove_tgate(pipe)), baseline)


@guided_denoiser
@pytest.mark.parametrize("settings", [FIXED, PATIENT, {**FIXED, "cfg_half": "unconditional"}], ids=str)
def test_the_halves_of_a_half_step_differ_by_the_prediction(kind: Kind, settings):
    if only_conditional(kind, settings.get("cfg_half")):
        return
    pipe = kind.gate(kind.build(), **settings)
    outputs = []
    hook = denoiser_of(pipe, kind).register_forward_hook
    hook(lambda module, args, output: outputs.append([sample.clone() for sample in samples_of(output)]))
    kind.run(pipe)
    report = get_tgate_report(pipe)
    assert report.half_batch_forwards > 0
    scales = [kind.guidance + kind.scale_beyond, kind.second_scale]
    judged = settings is PATIENT
    flipped = {"conditional_first": kind.conditional_first}
    errors = [
        errors_of(each, report.full_steps, kind.guided_channels, scale, judged=judged, **flipped)
        for each, scale in zip(zip(*outputs, strict=True), scales, strict=False)
    ]
    # The prediction that is off most decides.
    errors = [max(found, key=lambda error: error[1].expected) for found in zip(*errors, strict=True)]
    assert list(report.prediction_errors) == errors
    assert bool(errors) is (settings is PATIENT)


# Guidance that cannot be dropped keeps no mean.
@pytest.mark.parametrize("kind", rows([kind for kind in GUIDED if kind.name not in SECOND | {"ace_step"}], ALL))
@pytest.mark.parametrize("half", [None, "unconditional"])
def test_after_the_gate_the_denoiser_gives_what_it_gives_with_what_is_kept_in_the_place_of_cross_attention(
    kind: Kind, half
):
    if only_conditional(kind, half):
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
@pytest.mark.parametrize("kind", rows([kind for kind in GUIDED if kind.name not in SECOND | {"lumina"}], ALL))
def test_a_layer_that_attends_to_the_text_and_keeps_nothing_is_named(kind: Kind):
    pipe = kind.gate(kind.build(), GATE, custom_forwards="gate")
    layers = attention_modules(denoiser_of(pipe, kind))
    name, layer = next((name, layer) for name, layer in layers.items() if is_cross(kind, name))
    layer.forward = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)
    with pytest.raises(ValueError, match=re.escape(f"{name.removesuffix('.processor')} among them, keep no output")):
        kind.run(pipe)


@every_slow
def test_without_guidance_nothing_is_averaged_or_halved(kind: Kind):
    pipe = kind.gate(kind.build(), GATE)
    seen = count(pipe, kind)
    prompts = [0, 1] if kind.batches else [0]
    together = kind.run(pipe, prompts, **kind.off)
    rows_seen = seen.pop("denoiser")
    assert rows_seen == [len(prompts) * kind.rows] * STEPS
    for name, batches in seen.items():
        assert batches == [batches[0]] * (GATE if is_cross(kind, name) else STEPS)
    assert get_tgate_report(pipe).half_batch_forwards == 0
    singles = torch.cat([kind.run(pipe, [prompt], **kind.off) for prompt in prompts])
    assert distance(together, singles) < 5e-5


@pytest.mark.parametrize("kind", rows([kind for kind in KINDS if kind.name in COSTS], ALL))
@pytest.mark.parametrize("settings", [SETTINGS["v2"], FIXED], ids=["v2", "fixed"])
def test_the_estimate_is_what_a_run_takes(kind: Kind, settings):
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
def test_the_estimate_counts_the_further_calls_that_it_is_told_of(kind: Kind, scales):
    pipe, further = kind.build(), further_calls(kind) | scales
    size = {name: number for name, number in kind.size.items() if name in ("height", "width", "num_frames")}
    told = [{"spatio_temporal_guidance_blocks": [1]}, {"isolate_modalities": True}][: 1 if scales else 2]

    def estimate(**given):
        choice = {"cross_attention": True, "max_sequence_length": TOKENS, **given}
        return estimate_cost(pipe, TGateSchedule(GATE), STEPS, **size, **choice)

    cost = estimate(extra_forwards=told)
    assert cost.without_tgate.total == taken(pipe, kind, [0], **further).total
    assert cost.with_tgate.total == taken(kind.gate(pipe, GATE), kind, [0], **further).total
    assert cost.report == get_tgate_report(pipe) == estimate(extra_forwards=[]).report
    with pytest.raises(
        ValueError, match=r'give extra_forwards, .* each such as \{"isolate_modalities": True\}, or \[\]'
    ):
        estimate()
    for wrong in ([{"stg_scale": 1}], [{}], ["isolate_modalities"]):
        with pytest.raises(ValueError, match="means nothing for a LTX2VideoTransformer3DModel: give a dict for each"):
            estimate(extra_forwards=wrong)
