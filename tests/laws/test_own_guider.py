"""A guider with T-GATE that a pipeline has as a component: what `apply_tgate` does to the pipeline, bit for bit."""

import copy
import functools
import json
import logging

import diffusers
import pytest
import torch

from tests.zoo.case import quiet
from tests.zoo.modular import IS_THERE, MODULAR
from tgate_processors import TGateSchedule, apply_tgate, get_tgate_report

pytestmark = [
    # What diffusers imports for its guiders takes long.
    pytest.mark.slow,
    pytest.mark.skipif(not IS_THERE, reason="this diffusers has no modular pipelines"),
]
if IS_THERE:
    from tgate_processors import TGateGuidance

SDXL, WAN, EXPERTS = MODULAR[:3]
STEPS = 12
# Tiny pipelines with random weights predict badly. With this tolerance there are steps of every level.
SETTINGS = [{"tolerance": 1.0}, {"levels": "FFF--HF-FH-F"}, {"tolerance": 0.5, "forecast": False}]
settings_each = pytest.mark.parametrize("settings", SETTINGS, ids=["auto", "plan", "half"])


@pytest.fixture(
    params=[SDXL, WAN, pytest.param(EXPERTS, marks=pytest.mark.thorough)], ids=["sdxl", "wan", "wan_experts"]
)
def case(request):
    return request.param


def run(case, pipe, **call):
    return case.run(pipe, **{"num_inference_steps": STEPS, **call})


def own(case, pipe=None, **settings):
    """A pipeline whose guiders have T-GATE."""
    pipe = pipe or case.build()
    names = ("guider", "guider_2")
    guiders = {
        name: TGateGuidance(guidance_scale=scale, **settings) for name, scale in zip(names, case.scales, strict=False)
    }
    pipe.update_components(**guiders)
    return pipe


def plain_guiders(case, pipe):
    """The same pipeline with diffusers' own guiders."""
    for name, scale in zip(("guider", "guider_2"), case.scales, strict=False):
        pipe.update_components(**{name: diffusers.ClassifierFreeGuidance(guidance_scale=scale)})
    return pipe


@settings_each
def test_it_does_what_apply_tgate_does(case, settings):
    applied = apply_tgate(case.build(), TGateSchedule(**settings))
    expected, report = run(case, applied), get_tgate_report(applied)
    pipe = own(case, **settings)
    calls = []
    for name in case.denoisers:
        getattr(pipe, name).register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(run(case, pipe), expected)
    assert len(calls) == sum({"F": 2, "H": 1, "-": 0}[level] for level in report.levels)
    assert len({*report.levels}) > 1
    assert torch.equal(run(case, pipe), expected)
    if case is EXPERTS:
        # Each guider has its own steps.
        assert pipe.guider.report.levels + pipe.guider_2.report.levels == report.levels
    else:
        assert pipe.guider.report == report


@pytest.mark.thorough
def test_the_second_guider_begins_with_full_steps():
    settings = {"levels": "FFFHHHHHHHHF"}
    applied = apply_tgate(EXPERTS.build(), TGateSchedule(**settings))
    expected, pipe = run(EXPERTS, applied), own(EXPERTS, **settings)
    assert torch.equal(run(EXPERTS, pipe), expected)
    assert pipe.guider_2.report.levels.startswith("FFH")


@settings_each
def test_a_saved_pipeline_has_it_too(case, settings, tmp_path):
    own(case, **settings).save_pretrained(tmp_path.as_posix(), overwrite_modular_index=True)
    saved = json.loads((tmp_path / "guider/guider_config.json").read_text())
    assert saved["_class_name"] == "TGateGuidance"
    assert saved["guidance_scale"] == case.scales[0]
    index = json.loads((tmp_path / "modular_model_index.json").read_text())
    assert index["guider"][:2] == ["tgate_processors", "TGateGuidance"]
    pipe = case._blocks().init_pipeline(tmp_path.as_posix())
    pipe.load_components()
    quiet(pipe)
    assert type(pipe.guider) is TGateGuidance
    assert {name: pipe.guider.config[name] for name in settings} == settings
    ratio = {} if case is not EXPERTS else {"boundary_ratio": 0.6}
    pipe.update_components(**ratio)
    found = run(case, pipe)
    assert torch.equal(run(case, pipe), found)
    # Loaded weights are aligned otherwise, so the pipeline to compare with is this one.
    applied = apply_tgate(plain_guiders(case, pipe), TGateSchedule(**settings))
    assert torch.equal(run(case, applied), found)
    assert get_tgate_report(applied).half_batch_forwards or get_tgate_report(applied).forecast_forwards


@pytest.mark.parametrize(
    "guider",
    [
        {"guidance_rescale": 0.7},
        {"use_original_formulation": True},
        {"start": 0.25, "stop": 0.8},
        {"enabled": False},
        {"guidance_scale": 1.0},
    ],
    ids=lambda guider: next(iter(guider)),
)
def test_what_a_guider_can_be_set_to_means_the_same(guider):
    guider = {"guidance_scale": 5.0, **guider}
    pipe = WAN.build()
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(**guider))
    applied = apply_tgate(pipe, "FFF--HF-FH-F")
    expected, report = run(WAN, applied), get_tgate_report(applied)
    pipe = WAN.build()
    pipe.update_components(guider=TGateGuidance(**guider, levels="FFF--HF-FH-F"))
    assert torch.equal(run(WAN, pipe), expected)
    assert pipe.guider.report == report
    assert "-" in report.levels


def test_a_tolerance_of_zero_is_the_plain_run():
    plain = run(WAN, WAN.build())
    assert torch.equal(run(WAN, own(WAN, tolerance=0)), plain)


# The calls of the denoiser: two in each of the first three steps, then one.
@pytest.mark.parametrize("failing", [2, 8], ids=["in_a_full_step", "in_a_half_step"])
def test_a_call_after_one_that_failed_is_a_call_of_its_own(failing):
    pipe = own(WAN, levels="FFFHHHF-FH-F")
    expected, calls = run(WAN, pipe), []

    def fail(module, args, kwargs):
        calls.append(1)
        if len(calls) == failing:
            raise RuntimeError("out of memory")

    handle = pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(WAN, pipe)
    handle.remove()
    # A pipeline that encodes the negative prompt only if guidance is on asks this before the first step.
    assert pipe.guider.num_conditions == 2
    assert torch.equal(run(WAN, pipe), expected)


def test_nothing_is_held_after_a_call_and_no_denoiser():
    pipe, held = own(WAN, levels="FFF--HF-FH-F"), []
    pipe.transformer.register_forward_pre_hook(lambda *_: held.append(pipe.guider._run.nbytes))
    run(WAN, pipe)
    assert 0 < max(held) <= pipe.guider.report.peak_bytes
    assert pipe.guider._run.nbytes == 0
    copied = copy.deepcopy(pipe.guider)
    assert copied.config == pipe.guider.config
    assert copied._denoiser is None


def test_new_keeps_the_other_settings():
    guider = TGateGuidance(7.0, tolerance=0.3, custom_processors="leave")
    other = guider.new(guidance_scale=3.0)
    assert type(other) is TGateGuidance
    assert dict(other.config) | {"guidance_scale": 7.0} == dict(guider.config)


def with_block(act):
    """A pipeline with a block of the user's in its loop, after the guider."""

    class Own(diffusers.modular_pipelines.ModularPipelineBlocks):
        model_name = "stable-diffusion-xl"

        @torch.no_grad()
        def __call__(self, components, block_state, i, t):
            act(components.guider, block_state, i, t)
            return components, block_state

    def change(blocks):
        # The loop without a ControlNet lies in three blocks of that name.
        loop = functools.reduce(lambda block, name: block.sub_blocks[name], ["denoise"] * 3, blocks)
        loop.sub_blocks.insert("own", Own(), 2)

    return SDXL.build(change)


def test_text_that_is_exchanged_gets_a_full_step():
    def exchange(guider, block_state, i, t):
        block_state.prompt_embeds = block_state.prompt_embeds * (0.5 if i == 4 else 1)

    pipe = own(SDXL, with_block(exchange), levels="FFFHHHHH")
    run(SDXL, pipe, num_inference_steps=8)
    assert pipe.guider.report.levels == "FFFHHFHH"


def test_a_loop_that_calls_it_more_often_is_refused_or_warned_of(caplog):
    plain = SDXL.run(SDXL.build())
    pipe = with_block(lambda guider, state, i, t: guider.set_state(step=i, num_inference_steps=6, timestep=t))
    with caplog.at_level(logging.WARNING, "tgate_processors"):
        assert torch.equal(SDXL.run(own(SDXL, pipe, levels="FFFHHH")), plain)
    (record,) = caplog.records
    assert "got step 1 of 6 where it expected the beginning or the end of step 0" in record.message
    pipe = with_block(lambda guider, state, i, t: guider.forward(state.noise_pred, state.noise_pred))
    with pytest.raises(ValueError, match=r"its set_state before .*\. Use diffusers' ClassifierFreeGuidance"):
        SDXL.run(own(SDXL, pipe, levels="FFFHHH"))


def test_it_is_refused_where_apply_tgate_is():
    pipe = own(WAN)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"cannot run together with .*: guidance is a guider here") as caught:
        run(WAN, pipe)
    assert "settings of TGateGuidance" in caught.value.__notes__[0]
    pipe = own(WAN)
    block = pipe.transformer.blocks[0]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    with pytest.raises(ValueError, match="a forward that is not its class's own"):
        run(WAN, pipe)
    plain = run(WAN, own(WAN, WAN.build(), levels="FFF--HF-FH-F"))
    assert torch.equal(run(WAN, own(WAN, pipe, levels="FFF--HF-FH-F", custom_forwards="gate")), plain)


def test_processors_that_may_count_their_calls_keep_all_of_guidance(caplog):
    class Own:
        def __init__(self, behind):
            self.behind = behind

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **more):
            return self.behind(attn, hidden_states, encoder_hidden_states, attention_mask)

    pipe = SDXL.build()
    pipe.unet.set_attn_processor({name: Own(behind) for name, behind in pipe.unet.attn_processors.items()})
    plain = SDXL.run(pipe)
    with caplog.at_level(logging.WARNING, "tgate_processors"):
        assert torch.equal(SDXL.run(own(SDXL, pipe, levels="FF-FH-")), plain)
    assert "guidance is kept in full" in caplog.text
    assert pipe.guider.report.levels == "FFFFFF"
    SDXL.run(own(SDXL, pipe, levels="FF-FH-", custom_processors="gate"))
    assert pipe.guider.report.levels == "FF-FH-"


def test_both_at_once_are_refused():
    with pytest.raises(ValueError, match="guider=TGateGuidance, which gates it already: use it without apply_tgate"):
        apply_tgate(own(WAN))


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, "`tolerance` must be", {"tolerance": -1}),
        (ValueError, "`levels` must be", {"levels": "X"}),
        (ValueError, '`custom_processors` must be "leave" or "gate"', {"custom_processors": "keep"}),
        (ValueError, "custom_forwards", {"custom_forwards": "leave"}),
        (TypeError, "`forecast` must be True or False", {"forecast": 1}),
    ],
)
def test_wrong_settings_are_refused(error, message, settings):
    with pytest.raises(error, match=message):
        TGateGuidance(**settings)
    with pytest.raises(ValueError, match="for each of the 12 steps that run, got 2"):
        run(WAN, own(WAN, levels="FF"))
