"""Guidance that a step callback switches: what the loop itself reads is what counts."""

import pytest
import torch

from tests.support.settings import apply_settings
from tests.zoo.case import slow, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report
from tgate_processors._internal.families import resolve_pipeline
from tgate_processors._internal.install.pipeline_call import call_of
from tgate_processors._internal.run.scale_source import uses_given_scale

STEPS = 5
# One that asks for the scale in every step, and one that does not ask again.
DEFAULT = ("kandinsky5", "latte")
# Of every way to ask: in one batch or in two calls, by the pipeline's word, by the scale, or once for all.
SLOW = ("longcat", "wan", "lumina", "ace_step", "cogvideox", "sd3")
SCALES = ("_guidance_scale", "_guidance_scale_2", "_guidance_rescale", "_true_cfg_scale", "_audio_guidance_scale")
OFF, OFF_AND_ON, OTHER = {1: 1.0}, {0: 1.0, 2: 4.0}, {1: 2.0}


def setting(values):
    """A callback that sets the scales of a pipeline at the end of steps."""

    def callback(pipe, step, timestep, tensors):
        for name in SCALES if step in values else ():
            if isinstance(getattr(pipe, name, None), (int, float)):
                setattr(pipe, name, 0.1 if "rescale" in name else values[step])
        return tensors

    return {"callback_on_step_end": callback}


def outcome(case, pipe, values, **more):
    """What a run gives, or the error that it ends with."""
    try:
        return case.run(pipe, num_inference_steps=STEPS, **setting(values), **more)
    except Exception as error:
        return error


def case_of(name):
    case = BY_NAME[name]
    if not case.is_there:
        pytest.skip("this diffusers has no such pipeline")
    return case


def check(case):
    """A gate that nothing comes after changes nothing."""
    for values in (OFF, OFF_AND_ON, OTHER):
        plain = outcome(case, case.build(), values)
        for settings in ({"gate_step": 1000, "guidance": "predict"}, {"tolerance": 0}):
            gated = outcome(case, apply_settings(case.build(), **settings, cross_attention=False), values)
            if isinstance(plain, Exception):
                assert type(gated) is type(plain) or "T-GATE" in str(gated), (values, gated)
            else:
                assert not isinstance(gated, Exception), (values, settings, gated)
                assert torch.equal(gated, plain), (values, settings)


@pytest.mark.parametrize(
    "name",
    [*DEFAULT, *map(slow, SLOW), *map(thorough, ("chroma", "sd", "allegro", "controlnet_xs", "sana_world", "ltx"))],
)
def test_a_late_gate_changes_nothing_whatever_a_callback_sets(name):
    check(case_of(name))


@pytest.mark.parametrize("name", ["kandinsky5", *map(slow, ("longcat", "wan"))])
@pytest.mark.parametrize("guidance", ["predict", slow("drop")])
def test_guidance_that_comes_on_again_begins_with_full_steps(name, guidance):
    case = case_of(name)
    pipe = apply_tgate(case.build(), 3, guidance=guidance, cross_attention=False)
    rows, by_step = [], []
    first = dict(pipe.transformer.named_modules())[case.first]
    first.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))

    def callback(pipe, step, timestep, tensors):
        by_step.append(sum(rows))
        rows.clear()
        return setting({3: 1.0, 5: 5.0})["callback_on_step_end"](pipe, step, timestep, tensors)

    case.run(pipe, num_inference_steps=9, callback_on_step_end=callback)
    full = 2 if guidance == "predict" else 1
    # Off in the fifth and the sixth step. A prediction takes the last two differences.
    assert by_step == [2, 2, 2, 1, 1, 1, 2, full, 1]
    assert get_tgate_report(pipe).full_steps == (0, 1, 2, 4, 5, 6, *([7] if full == 2 else []))


@pytest.mark.parametrize(
    ("name", "keeps"),
    [("latte", True), ("wan", True), ("kandinsky5", True), ("longcat", False), ("sd", False), ("cogvideox", False)],
)
def test_errors_are_measured_with_the_scale_that_the_loop_has(name, keeps):
    """Some multiply with what they were given, others with what a callback may have set."""
    pipe = case_of(name).build()
    assert uses_given_scale(type(pipe)) is keeps
    assert uses_given_scale(type(apply_tgate(pipe, cross_attention=False))) is keeps
    pipe._guidance_scale = 2.0
    assert call_of(resolve_pipeline(pipe, False), pipe, {"guidance_scale": 5.0}).guidance_scale() == (
        5.0 if keeps else 2.0
    )
