"""Guidance by two calls of the denoiser: in half steps the second one does not run."""

import re
from collections import defaultdict

import pytest
import torch

from tests.support.counting import is_cross, keys_of, samples_of
from tests.support.custom_loops import OwnLoop
from tests.support.macs import COUNTED, taken
from tests.support.offload import group_offload_by_leaves, model_offload, skip_if_missing
from tests.support.settings import FIXED, PATIENT, SETTINGS, apply_settings, computed, full_steps
from tests.zoo.case import STEPS, TIERS, Case, rows, thorough
from tests.zoo.catalogue import BY_NAME, MOST, SEQUENTIAL
from tgate_processors import (
    TGateCallback,
    TGateSchedule,
    apply_tgate,
    estimate_cost,
    get_tgate_report,
    is_tgate_applied,
    measure_convergence,
    remove_tgate,
)
from tgate_processors._internal.families import attention_modules
from tgate_processors._internal.guidance.prediction import CFGDifference, predict, relative_error

GATE = 3
DROP = {"gate_step": GATE}
# The step in which the second of two denoisers takes over.
TAKEN_OVER = 3
kinds = pytest.mark.parametrize("kind", rows(SEQUENTIAL, default=MOST))
kinds_once = pytest.mark.parametrize("kind", rows(SEQUENTIAL))
WAN = pytest.mark.parametrize("kind", rows([BY_NAME["wan"]]))
WAN_SLOW = pytest.mark.parametrize("kind", rows([BY_NAME["wan"]], default=()))


def experts(pipe):
    """The denoisers of a pipeline, by name."""
    names = ("transformer", "transformer_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def expert_of(kind, step):
    return "transformer_2" if kind.name == "wan_experts" and step >= TAKEN_OVER else "transformer"


def full_of(kind, settings):
    """The full steps: as planned, and at first where another denoiser takes over."""
    if kind.name != "wan_experts":
        return full_steps(STEPS, settings) if "guidance" in settings or settings is PATIENT else tuple(range(GATE))
    # After three steps; two differences of its own come before any prediction.
    return {id(FIXED): (0, 1, 3, 4, 5), id(PATIENT): tuple(range(6)), id(DROP): (0, 1, 2, 3)}[id(settings)]


@kinds
@pytest.mark.parametrize("cross", [False, True], ids=["guidance alone", "cross-attention too"])
@pytest.mark.parametrize("settings", [DROP, FIXED, pytest.param(PATIENT, marks=TIERS["thorough"])], ids=str)
def test_the_second_call_of_a_half_step_does_not_run(kind: Case, settings, cross):
    pipe = apply_settings(kind.build(), **settings, cross_attention=cross)
    seen = {name: defaultdict(list) for name in experts(pipe)}
    for name, part in experts(pipe).items():
        part.register_forward_hook(lambda module, args, output, name=name: seen[name]["denoiser"].append(1))
        for key, layer in attention_modules(part).items():
            keys_of(layer).register_forward_hook(
                lambda module, args, output, name=name, key=key: seen[name][key].append(1)
            )
    kind.run(pipe)
    full = full_of(kind, settings)
    report = get_tgate_report(pipe)
    assert report.full_steps == full
    assert (report.full_batch_forwards, report.half_batch_forwards) == (len(full), STEPS - len(full))
    assert report.cross_attention_computed == (len(full) if cross else STEPS)
    assert report.cross_attention_reused == (STEPS - len(full) if cross else 0)
    for name, counts in seen.items():
        steps = [step for step in range(STEPS) if expert_of(kind, step) == name]
        calls = sum(2 if step in full else 1 for step in steps)
        assert len(counts.pop("denoiser")) == calls
        for key, ran in counts.items():
            of_text = sum(2 for step in steps if step in full) if cross and is_cross(kind, key) else calls
            assert len(ran) == of_text, key


def watch(pipe):
    """What the scheduler is given in each step, and what the denoisers give in each call that runs."""
    noises, outputs = [], []

    class Watched(type(pipe.scheduler)):
        """A class and not a function, because the sound of a video has a copy of its scheduler."""

        def step(self, noise, *args, **kwargs):
            noises.append((noise, len(outputs)))
            return super().step(noise, *args, **kwargs)

    pipe.scheduler.__class__ = Watched
    for part in experts(pipe).values():
        part.register_forward_hook(
            lambda module, args, output: outputs.append([each.clone() for each in samples_of(output)])
        )
    return noises, outputs


def read_of(kind, output):
    """What the pipeline reads of an output: nothing of a picture that is given as a last frame."""
    return [output[0][:, :-1], *output[1:]] if kind.name == "kandinsky6_image" else output


@kinds_once
@pytest.mark.parametrize("settings", [FIXED, pytest.param(PATIENT, marks=TIERS["thorough"])], ids=["fixed", "auto"])
def test_the_second_call_of_a_half_step_gives_the_first_and_the_prediction(kind: Case, settings):
    pipe = apply_settings(kind.build(), **settings)
    noises, outputs = watch(pipe)
    kind.run(pipe)
    report, errors, before = get_tgate_report(pipe), [], 0
    known = [[] for _ in outputs[0]]
    for step, after in enumerate(sorted({after for _, after in noises})):
        scale = (3.0 if expert_of(kind, step) == "transformer_2" else kind.guidance) + kind.scale_beyond
        if step == TAKEN_OVER and kind.name == "wan_experts":
            known = [[] for _ in known]
        given, off = [noise for noise, last in noises if last == after], []
        assert after - before == (2 if step in report.full_steps else 1)
        # Video and sound, where there are both.
        for place, (text, *others) in enumerate(
            zip(*(read_of(kind, each) for each in outputs[before:after]), strict=True)
        ):
            none = others[0] if others else text + predict(known[place], step)
            guided = none + scale * (text - none)
            if others and len(known[place]) == 2 and settings is PATIENT:
                off.append(relative_error(predict(known[place], step), none - text, guided, scale).max().item())
            if others:
                known[place] = [*known[place][-1:], CFGDifference(step, none - text)]
            if not kind.name.startswith("cosmos"):
                # Cosmos has two steps of its scheduler in each of the loop. Where the first frame is given, what is
                # predicted of it is not read.
                read = guided[:, -given[place].shape[1] :]
                torch.testing.assert_close(given[place][:, : read.shape[1]], read, rtol=1e-4, atol=1e-5)
        # The prediction that is off most decides.
        errors += [(step, pytest.approx(max(off), rel=1e-3))] if off else []
        before = after
    assert list(report.prediction_errors) == errors
    assert bool(errors) is (settings is PATIENT)


@WAN
@pytest.mark.parametrize("cross", [False, True])
def test_dropped_guidance_leaves_the_conditional_output(kind: Case, cross):
    pipe = kind.build()
    calls, kept, expected = [], {}, []
    layers = {name: layer for name, layer in attention_modules(pipe.transformer).items() if "attn2" in name}

    def keep(name):
        def hook(module, args, output):
            # The first of the two calls of the step at the gate.
            if len(calls) == 2 * GATE - 1:
                kept[name] = output

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    note = pipe.transformer.register_forward_pre_hook
    handles.append(note(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True))
    apply_tgate(pipe, GATE, cross_attention=cross)
    noises, _ = watch(pipe)
    kind.run(pipe)
    remove_tgate(pipe)
    for handle in handles:
        handle.remove()
    if cross:
        for name, layer in layers.items():
            layer.register_forward_hook(lambda module, args, output, name=name: kept[name])
    with torch.no_grad():
        for args, kwargs in calls[2 * GATE :]:
            expected.append(pipe.transformer(*args, **kwargs)[0])
    assert len(expected) == STEPS - GATE
    for (noise, _), right in zip(noises[GATE:], expected, strict=True):
        torch.testing.assert_close(noise, right, rtol=1e-5, atol=1e-6)


@WAN_SLOW
def test_self_attention_is_kept_for_each_call(kind: Case):
    settings = SETTINGS["v2"]
    pipe = apply_settings(kind.build(), **settings, cross_attention=True)
    given = defaultdict(list)
    for name, layer in attention_modules(pipe.transformer).items():
        if "attn1" in name:
            layer.register_forward_hook(lambda module, args, output, name=name: given[name].append(output.clone()))
    kind.run(pipe)
    plan = [computed(step, STEPS, **settings)[1] for step in range(STEPS)]
    for outputs in given.values():
        assert len(outputs) == 2 * settings["gate_step"] + STEPS - settings["gate_step"]
        for step in range(1, settings["gate_step"]):
            if not plan[step]:
                # Those of the step before, in the same order.
                for call in (0, 1):
                    assert torch.equal(outputs[2 * step + call], outputs[2 * step - 2 + call])
                assert not torch.equal(outputs[2 * step], outputs[2 * step + 1])


@WAN
@pytest.mark.parametrize("first", ["tgate", "other"])
@pytest.mark.parametrize(
    "place",
    [thorough("compiled"), thorough("wrapped"), model_offload, group_offload_by_leaves],
    ids=["compiled", "wrapped", "model offload", "group offload"],
)
def test_beside_what_else_stands_at_the_denoiser(kind: Case, place, first):
    pipe = kind.build()
    baseline, expected = kind.plain(), kind.gated(GATE)
    runs = []
    pipe.transformer.blocks[0].register_forward_hook(lambda module, args, output: runs.append(1))

    def put():
        if place == "compiled":
            pipe.transformer.compile(backend="eager")
        elif place == "wrapped":
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        else:
            skip_if_missing(place)
            place(pipe, kind, None)

    if first == "other":
        put()
    apply_tgate(pipe, GATE)
    if first == "tgate":
        put()
    for _ in range(2):
        runs.clear()
        torch.testing.assert_close(kind.run(pipe), expected)
        assert len(runs) == 2 * GATE + STEPS - GATE
    remove_tgate(pipe)
    torch.testing.assert_close(kind.run(pipe), baseline)


@WAN
def test_another_pipeline_on_the_same_denoiser_makes_all_its_calls(kind: Case):
    pipe = kind.build()
    baseline, expected = kind.plain(), kind.gated(GATE)
    sibling = type(pipe)(**pipe.components)
    sibling.set_progress_bar_config(disable=True)
    sibling.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    apply_tgate(pipe, GATE)
    pictures = []

    def callback(pipeline, step, timestep, tensors):
        if step == GATE + 1:
            pictures.append(kind.run(sibling))
        return tensors

    assert torch.equal(kind.run(pipe, callback_on_step_end=callback), expected)
    assert torch.equal(pictures[0], baseline)
    assert torch.equal(kind.run(sibling), baseline)


ESTIMATED = {"wan", "kandinsky5", "kandinsky6"}


@pytest.mark.parametrize("kind", rows([kind for kind in SEQUENTIAL if kind.name in ESTIMATED], default=()))
@pytest.mark.parametrize("cross", [None, True])
@pytest.mark.parametrize("settings", [DROP, FIXED, PATIENT], ids=str)
def test_the_estimate_is_what_a_run_takes(kind: Case, settings, cross):
    pipe = kind.build()
    cost = estimate_cost(pipe, TGateSchedule(**settings), STEPS, **kind.size, **COUNTED, cross_attention=cross)
    assert cost.without_tgate == taken(pipe, kind, [0, 1])
    assert cost.with_tgate == taken(apply_settings(pipe, **settings, cross_attention=cross), kind, [0, 1])
    report = get_tgate_report(pipe)
    assert cost.report.peak_bytes == report.peak_bytes
    assert cost.report.half_batch_forwards == report.half_batch_forwards > 0


SEGMENTED = {"wan_animate", "helios", "helios_pyramid"}


@pytest.mark.parametrize("kind", rows([kind for kind in SEQUENTIAL if kind.name in SEGMENTED], default=()))
def test_every_segment_of_a_video_has_a_gate_of_its_own(kind: Case):
    pipe = apply_tgate(kind.build(), GATE, cross_attention=True)
    runs = []
    pipe.transformer.register_forward_hook(lambda module, args, output: runs.append(1))
    videos = {name: video + video[:4] for name, video in kind.extra.items() if name in ("pose_video", "face_video")}
    kind.run(pipe, **(videos or {"num_frames": 10}))
    report = get_tgate_report(pipe)
    assert report.num_inference_steps == 2 * STEPS
    assert report.full_steps == (*range(GATE), *range(STEPS, STEPS + GATE))
    assert len(runs) == 2 * (2 * GATE + STEPS - GATE)


@pytest.mark.parametrize("kind", rows([BY_NAME["chronoedit"]], default=()))
@pytest.mark.parametrize(("settings", "full"), [(DROP, (0, 1, 2, 4)), (FIXED, (0, 1, 3, 4, 5))], ids=["drop", "fixed"])
def test_frames_that_are_dropped_after_the_gate_get_a_full_step(kind: Case, settings, full):
    pipe = apply_settings(kind.build(), **settings, cross_attention=True)
    frames = []
    note = pipe.transformer.register_forward_pre_hook
    note(lambda module, args, kwargs: frames.append(kwargs["hidden_states"].shape[2]), with_kwargs=True)
    kind.run(pipe, num_frames=9, enable_temporal_reasoning=True, num_temporal_reasoning_steps=4)
    assert get_tgate_report(pipe).full_steps == full
    expected = [3 if step < 4 else 2 for step in range(STEPS) for _ in range(2 if step in full else 1)]
    assert frames == expected


@pytest.mark.parametrize("kind", rows([BY_NAME["helios"]], default=()))
def test_what_does_not_run_without_weights_is_not_estimated(kind: Case):
    with pytest.raises(ValueError, match="HeliosTransformer3DModel does not run on the meta device"):
        estimate_cost(kind.build(), TGateSchedule(GATE), STEPS)


@WAN
def test_what_cannot_be_told_is_refused(kind: Case):
    pipe = kind.build()
    with pytest.raises(ValueError, match=r"cfg_half='unconditional' is not possible: .* is two calls of its denoiser"):
        apply_tgate(pipe, GATE, cfg_half="unconditional")
    with pytest.raises(TypeError, match="`cross_attention` must be True or False, got 1 of type int"):
        apply_tgate(pipe, GATE, cross_attention=1)
    with pytest.raises(ValueError, match="a callback alone cannot leave one out: use apply_tgate"):
        kind.run(pipe, callback_on_step_end=TGateCallback(TGateSchedule(GATE)))
    with pytest.raises(ValueError, match="the probe watches guidance in one batch"):
        measure_convergence(pipe, [kind.inputs([0])])
    own = type("OwnLoop", (OwnLoop, type(pipe)), {"__module__": __name__})(**pipe.components)
    with pytest.raises(ValueError, match="OwnLoop cannot be gated: its loop is not diffusers' own"):
        apply_tgate(own, GATE)
    assert not is_tgate_applied(pipe)


@WAN
@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (1, "step 0 ended with one call of the denoiser, where T-GATE expects two with classifier-free guidance"),
        (1, "the conditional one first. If each process makes one of them (CFG parallelism), there is no half to skip"),
        (3, "the denoiser was called 3 times in step 0, where T-GATE expects 2 with classifier-free guidance on"),
    ],
)
def test_other_calls_than_those_of_guidance_are_refused_in_the_first_step(kind: Case, calls, message):
    pipe = apply_tgate(kind.build(), GATE)
    denoise = type(pipe.transformer).__call__
    made = []

    class Calling(type(pipe.transformer)):
        """Makes another call, or leaves one out, of which T-GATE sees nothing."""

        def __call__(self, *args, **kwargs):
            made.append(1)
            if calls == 3:
                denoise(self, *args, **kwargs)
            return denoise(self, *args, **kwargs) if calls == 3 or len(made) % 2 else (kwargs["hidden_states"],)

    pipe.transformer.__class__ = Calling
    with pytest.raises(ValueError, match=re.escape(message)):
        kind.run(pipe)
