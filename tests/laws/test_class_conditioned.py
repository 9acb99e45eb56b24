"""AudioLDM and MusicLDM, whose layers attend to no text: guidance alone, as the text is a class."""

import pytest
import torch

from tests.support.settings import FIXED, apply_settings, full_steps
from tests.zoo.audio import CLASS_CONDITIONED
from tests.zoo.case import STEPS, rows
from tgate_processors import get_tgate_report, is_tgate_applied

ALONE = {"cross_attention": False}
DROP = {"gate_step": 3}


every = pytest.mark.parametrize("kind", rows(CLASS_CONDITIONED))


@every
def test_guidance_is_gated_alone_and_nothing_else(kind):
    pipe = kind.build()
    seen = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    baseline = kind.run(pipe)
    for settings in (DROP, FIXED):
        seen.clear()
        gated = kind.run(apply_settings(pipe, **settings, **ALONE))
        full = full_steps(STEPS, settings) if settings is FIXED else range(3)
        assert seen == [2 if step in full else 1 for step in range(STEPS)]
        report = get_tgate_report(pipe)
        assert (report.full_steps, report.half_batch_forwards) == (tuple(full), STEPS - len(full))
        assert not torch.equal(gated, baseline)


@every
def test_a_call_without_guidance_is_the_plain_one(kind):
    pipe = apply_settings(kind.build(), **FIXED, **ALONE)
    assert torch.equal(kind.run(pipe, **kind.off), kind.plain(**kind.off))
    assert get_tgate_report(pipe).half_batch_forwards == 0


@every
@pytest.mark.parametrize("settings", [{}, {"cross_attention": True}, {"max_memory": "1GB"}], ids=str)
def test_cross_attention_that_is_none_is_not_gated(kind, settings):
    pipe = kind.build()
    with pytest.raises(ValueError, match=r"attends to no text.* apply_tgate\(pipe, cross_attention=False\) gates gui"):
        apply_settings(pipe, 3, **settings)
    assert not is_tgate_applied(pipe)
