"""What is said and reported is what was seen: counts of the layers, warnings, words of the call."""

import functools
import logging
import math
import re

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from tests.support.counting import layers
from tests.support.settings import apply_settings
from tests.zoo.case import STEPS, quiet, slow
from tests.zoo.catalogue import BY_NAME
from tgate_processors import (
    TGateAttnProcessor,
    TGateCallback,
    TGateSchedule,
    apply_tgate,
    get_tgate_report,
    remove_tgate,
)

GATE = 3
ordinary = AttnProcessor2_0()


@pytest.fixture(params=["sd", slow("sdxl"), "pixart_alpha"])
def case(request):
    return BY_NAME[request.param]


def said(caplog):
    return [record.message for record in caplog.records if record.name.startswith("tgate")]


def function(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
    return ordinary(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class Slotted:
    __slots__ = ("strength",)

    def __init__(self, strength=1.0):
        self.strength = strength

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return ordinary(attn, hidden_states, encoder_hidden_states, attention_mask, temb) * self.strength


class Method:
    def compute(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return ordinary(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


CALLABLES = {
    "function": lambda: function,
    "partial": lambda: functools.partial(function),
    "slots": Slotted,
    "method": lambda: Method().compute,
}


@pytest.mark.parametrize("make", CALLABLES.values(), ids=CALLABLES)
def test_any_callable_that_diffusers_takes_is_taken(case, make):
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    denoiser.set_attn_processor({name: make() for name in denoiser.attn_processors})
    given = denoiser.attn_processors
    baseline = case.run(pipe)
    with pytest.raises(ValueError, match=r'custom_processors="gate".*or custom_processors="leave"'):
        apply_tgate(pipe, GATE)
    assert all(layer.processor is given[f"{name}.processor"] for name, layer in layers(pipe, case, "attn").items())
    assert torch.equal(case.run(apply_tgate(pipe, GATE, custom_processors="leave")), baseline)
    expected = case.gated(GATE)
    assert torch.equal(case.run(apply_tgate(pipe, GATE, custom_processors="gate")), expected)
    remove_tgate(pipe)
    assert all(layer.processor is given[f"{name}.processor"] for name, layer in layers(pipe, case, "attn").items())
    assert torch.equal(case.run(pipe), baseline)


def test_what_is_set_on_a_gate_lands_in_the_object_behind():
    slotted = Slotted()
    gate = TGateAttnProcessor(slotted, TGateCallback(TGateSchedule()).state)
    gate.strength = 2.0
    assert slotted.strength == gate.strength == 2.0
    with pytest.raises(AttributeError):
        gate.other = 1


@pytest.mark.parametrize("settings", [{}, {"sp_interval": 2, "fi_interval": 2, "warm_up": 1}], ids=["v1", "v2"])
def test_the_report_counts_what_the_layers_did(case, settings):
    pipe = case.build()
    # A layer that is out of reach does not count.
    runs = dict.fromkeys(layers(pipe, case, "attn"), 0)

    def count(name):
        return lambda module, args, output: runs.__setitem__(name, runs[name] + 1)

    for name, layer in layers(pipe, case, "attn").items():
        layer.to_k.register_forward_hook(count(name))
    case.run(apply_settings(pipe, GATE, **settings))
    report = get_tgate_report(pipe)
    assert {runs[name] for name in runs if "attn2" in name} == {report.cross_attention_computed}
    assert {runs[name] for name in runs if "attn1" in name} == {report.self_attention_computed}
    assert str(report).startswith(
        f"T-GATE: {STEPS} steps, {'F' * GATE}{'H' * (STEPS - GATE)}\n"
        f"  denoiser: {GATE} full, {STEPS - GATE} half and 0 forecast of {STEPS} forwards, about 1.3x less work\n"
    )


def test_a_report_before_any_run_says_that_there_was_none(caplog):
    pipe = apply_tgate(BY_NAME["sd"].build(), GATE)
    report = get_tgate_report(pipe)
    assert str(report) == "T-GATE: no run yet."
    assert said(caplog) == ["T-GATE: StableDiffusionPipeline has not run since apply_tgate: the report is empty."]


def test_by_hand_too_a_run_in_which_nothing_was_gated_says_so(caplog):
    case = BY_NAME["sd"]
    pipe = case.build()
    callback = TGateCallback(TGateSchedule(GATE))
    baseline = case.plain()
    assert torch.equal(case.run(pipe, callback_on_step_end=callback), baseline)
    first, last = said(caplog)
    assert first.startswith("T-GATE: 11 attention layers (first: ")
    assert last.startswith("T-GATE: nothing was gated in this call of StableDiffusionPipeline")


@pytest.mark.parametrize("setting", ["gate_step", "sp_interval", "fi_interval", "warm_up"])
def test_settings_in_the_call_are_refused_with_the_remedy(case, setting):
    pipe = apply_tgate(case.build(), GATE)
    expected = case.gated(GATE)
    given = "gate_step=2" if setting == "gate_step" else f"TGateSchedule(10, {setting}=2)"
    message = re.escape(f"apply_tgate(pipe, {given})")
    with pytest.raises(TypeError, match=rf"{setting}=2 is not an argument of the call: .*{message}"):
        case.run(pipe, **{setting: 2})
    assert torch.equal(case.run(pipe), expected)


def test_the_published_flag_for_calls_without_guidance_is_not_needed(case):
    with pytest.raises(TypeError, match=r"lcm is not an argument of the call.*apply_tgate"):
        case.run(apply_tgate(case.build(), GATE), lcm=True)


def exchange(length, step=GATE):
    def callback(pipe, index, timestep, tensors):
        if index == step:
            width = tensors["prompt_embeds"].shape[-1]
            tensors["prompt_embeds"] = torch.randn(2, length, width)
        return tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


@pytest.mark.parametrize("anew", [False, True], ids=["held", "made_anew"])
@pytest.mark.parametrize("length", [7, 14])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_text_that_is_exchanged_after_the_gate_is_warned_of(name, length, anew, caplog):
    case = BY_NAME[name]
    pipe = case.build()
    if anew:

        def clone(module, args, kwargs):
            return args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"].clone()}

        pipe.unet.register_forward_pre_hook(clone, with_kwargs=True)
    apply_tgate(pipe, GATE)
    case.run(pipe)
    assert not said(caplog)
    case.run(pipe, **exchange(length))
    (message,) = said(caplog)
    assert message.startswith(f"T-GATE: the text embeddings were exchanged in step {GATE + 1}, after the gate")
    # Before the gate they are right.
    caplog.clear()
    case.run(apply_tgate(pipe, GATE), **exchange(length, 0))
    assert not said(caplog)


@pytest.mark.parametrize(("start", "warned"), [(2, False), (3, True), (5, True), (6, False)])
def test_a_pipeline_that_is_known_to_exchange_its_text_is_told_at_once(start, warned, caplog):
    case = BY_NAME["sd"]
    base = diffusers.StableDiffusionPipeline

    class Merging(base):
        @torch.no_grad()
        def __call__(self, start_merge_step=10, callback_on_step_end=None, guidance_scale=7.5, **kwargs):
            return base.__call__(
                self, guidance_scale=guidance_scale, callback_on_step_end=callback_on_step_end, **kwargs
            )

    pipe = quiet(Merging(**case.build().components, requires_safety_checker=False))
    case.run(apply_tgate(pipe, GATE), start_merge_step=start)
    expected = f"T-GATE: Merging exchanges its text embeddings in step {start}, after gate_step=3: the new ones never"
    assert [message.startswith(expected) for message in said(caplog)] == ([True] if warned else [])


def test_what_is_said_begins_with_the_name_and_speaks_of_guidance_only_where_there_is_some(caplog):
    case = BY_NAME["sd"]
    with caplog.at_level(logging.WARNING):
        case.run(apply_tgate(case.build(), 99))
        case.run(apply_tgate(case.build(), 99), guidance_scale=1.0)
    guided, unguided = said(caplog)
    assert "guidance stays on" in guided
    assert "guidance" not in unguided
    assert guided.startswith("T-GATE: ")
    assert unguided.startswith("T-GATE: ")


@pytest.mark.parametrize(
    ("steps", "call", "message"),
    [
        (1, {}, 'with gate_step="auto" the first three are full. Take 10 steps or more.'),
        (3, {}, 'with gate_step="auto" the first three are full. Take 10 steps or more.'),
        (4, {}, None),
        (4, {"guidance_scale": 1.0}, 'with gate_step="auto" the first three and the last one are full.'),
        (5, {"guidance_scale": 1.0}, None),
    ],
)
def test_a_call_that_is_too_short_for_the_run_to_decide_anything_says_so(steps, call, message, caplog):
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), tolerance=math.inf)
    for _ in range(2):
        case.run(pipe, num_inference_steps=steps, **call)
    assert ("H" in get_tgate_report(pipe).levels or "-" in get_tgate_report(pipe).levels) is (message is None)
    expected = [] if message is None else [f"T-GATE: nothing is gated in the {steps} steps of this call of Stab"]
    assert [record[: len(expected[0])] for record in said(caplog)] == expected
    assert all(message in record for record in said(caplog))
    # A tolerance of 0 asks for full steps, and a number for others.
    caplog.clear()
    for given in ({"tolerance": 0}, {"gate_step": 2}):
        case.run(apply_tgate(pipe, **given), num_inference_steps=max(steps, 3), **call)
    assert not said(caplog)
