"""Warnings: under the name of the library, as loud as diffusers, and with nothing in them that is not so."""

import logging
import types

import diffusers
import pytest

from tests.support.settings import apply_settings
from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateSchedule, apply_tgate, get_tgate_report

CASE = BY_NAME["pixart_alpha"]


@pytest.fixture
def loud():
    """Levels as a user finds them."""
    logger, verbosity = logging.getLogger("tgate_processors"), diffusers.utils.logging.get_verbosity()
    level = logger.level
    logger.setLevel(logging.NOTSET)
    diffusers.utils.logging.set_verbosity_warning()
    yield logger
    logger.setLevel(level)
    diffusers.utils.logging.set_verbosity(verbosity)


def said(caplog):
    messages = [record.message for record in caplog.records if record.name == "tgate_processors"]
    caplog.clear()
    return messages


def test_warnings_are_as_loud_as_those_of_diffusers_unless_they_have_a_level_of_their_own(loud, caplog):
    pipe = apply_tgate(CASE.build(), 3)

    def warned():
        get_tgate_report(pipe)
        return len(said(caplog))

    assert warned() == 1
    diffusers.utils.logging.set_verbosity_error()
    assert warned() == 0
    diffusers.utils.logging.set_verbosity_warning()
    assert warned() == 1
    loud.setLevel(logging.ERROR)
    assert warned() == 0
    diffusers.utils.logging.set_verbosity_error()
    loud.setLevel(logging.WARNING)
    assert warned() == 1
    loud.setLevel(logging.NOTSET)
    assert warned() == 0
    # Whoever listens to us wants to hear us.
    loud.addHandler(handler := logging.NullHandler())
    assert warned() == 1
    loud.removeHandler(handler)


def test_a_late_gate_that_gates_nothing_is_no_news(loud, caplog):
    pipe = apply_tgate(CASE.build(), 99, cross_attention=False)
    CASE.run(pipe, guidance_scale=1.0)
    (message,) = said(caplog)
    assert "this call of PixArtAlphaPipeline has no guidance" in message


class Plain:
    """A processor that is not diffusers' own."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


@pytest.mark.parametrize("settings", [{}, {"gate_step": 3, "cross_attention": False}, {"gate_step": 3}], ids=str)
def test_processors_that_are_left_alone_are_the_reason(settings, loud, caplog):
    pipe = CASE.build()
    for layer in pipe.transformer.modules():
        if hasattr(layer, "processor"):
            layer.processor = Plain(layer.processor)
    CASE.run(apply_settings(pipe, **settings))
    first, *others = said(caplog)
    assert "have a custom processor that is not gated" in first
    assert not any("no guidance" in message or "do not call their processors" in message for message in others)


def test_layers_that_do_not_call_their_processors_beside_gated_guidance(loud, caplog):
    pipe = CASE.build()
    for name, layer in pipe.transformer.named_modules():
        if name.endswith("attn1"):
            inner = layer.processor
            layer.forward = types.MethodType(lambda self, *args, inner=inner, **kwargs: inner(self, *args), layer)
    CASE.run(apply_tgate(pipe, TGateSchedule(3, fi_interval=2), cross_attention=False, custom_forwards="gate"))
    assert get_tgate_report(pipe).half_batch_forwards == 3
    (message,) = said(caplog)
    assert message == (
        "T-GATE: no attention layer reused anything in this call of PixArtAlphaPipeline: its attention layers do not "
        "call their processors. Guidance alone was gated."
    )
