"""Modular pipelines, whose guidance is a guider: guidance alone is gated."""

import copy
import functools
import gc
import importlib
import logging
import math

import diffusers
import pytest
import torch

from tests.support.settings import FORECAST, apply_settings
from tests.zoo.case import seeded
from tests.zoo.catalogue import BY_NAME
from tests.zoo.modular import IS_THERE, MODULAR, Modular, hunyuan, hunyuan_image
from tgate_processors import apply_tgate, get_tgate_report, is_tgate_applied, measure_convergence, remove_tgate

pytestmark = pytest.mark.skipif(not IS_THERE, reason="this diffusers has no modular pipelines")
thorough = [pytest.mark.slow, pytest.mark.thorough]
SDXL, WAN, _, LTX, _ = MODULAR
STEPS = 12
SETTINGS = [{"forecast": False}, {"gate_step": 4}, {"gate_step": 0.25, "guidance": "predict", "cfg_interval": 4}]


@pytest.fixture(
    params=[pytest.param(case, id=case.name, marks=thorough[: 1 if case is WAN else 2]) for case in MODULAR]
)
def case(request):
    return request.param


@pytest.fixture
def sdxl():
    return SDXL.build()


def counted(case, pipe):
    """How often the denoisers are called, by step, where a step is a new timestep."""
    calls = {}

    def count(module, args, kwargs):
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        calls[float(timestep.flatten()[0])] = calls.get(float(timestep.flatten()[0]), 0) + 1

    for name in case.denoisers:
        getattr(pipe, name).register_forward_pre_hook(count, with_kwargs=True)
    return calls


def parts_of(pipe):
    """Everything in a pipeline, and everything in its denoisers that T-GATE elsewhere changes."""
    denoisers = [part for part in vars(pipe).values() if isinstance(part, torch.nn.Module)]
    modules = [module for denoiser in denoisers for module in denoiser.modules()]
    inner = [
        (module._forward_hooks, module._forward_pre_hooks, getattr(module, "processor", None)) for module in modules
    ]
    return type(pipe), dict(vars(pipe)), [(len(after), len(before), id(own)) for after, before, own in inner]


def test_full_steps_are_plain_half_steps_call_once_and_removal_restores_everything():
    pipe = WAN.build()
    before, plain = parts_of(pipe), WAN.run(pipe)
    assert torch.equal(WAN.run(apply_tgate(pipe, tolerance=0)), plain)
    guider, calls = pipe.guider, counted(WAN, apply_tgate(pipe, 2))
    guider.set_state(step=0, num_inference_steps=1, timestep=None)
    assert not torch.equal(WAN.run(pipe), plain)
    assert list(calls.values()) == [2, 2, 1, 1, 1, 1]
    assert get_tgate_report(pipe).half_batch_forwards == 4
    assert pipe.guider is guider
    # What it was told, it knows as without T-GATE.
    assert (guider._step, guider._num_inference_steps) == (5, 6)
    assert is_tgate_applied(pipe)
    assert not is_tgate_applied(remove_tgate(pipe))
    assert torch.equal(WAN.run(pipe), plain)
    pipe.transformer._forward_pre_hooks.clear()
    assert parts_of(pipe) == before


@pytest.mark.parametrize("settings", [{"tolerance": 0}, {"gate_step": STEPS}])
def test_full_steps_alone_change_no_bit(case, settings):
    pipe = case.build()
    plain = case.run(pipe, [0, 1], num_inference_steps=STEPS)
    calls = counted(case, apply_settings(pipe, **settings))
    assert torch.equal(case.run(pipe, [0, 1], num_inference_steps=STEPS), plain)
    assert set(calls.values()) == {2}
    assert len(calls) == STEPS


@pytest.mark.parametrize("settings", SETTINGS, ids=["auto", "drop", "predict"])
def test_a_half_step_is_one_call_and_agrees_with_the_classic_pipeline(case, settings):
    classic = case.classic.build()
    pipe = apply_settings(case.build(), **settings)
    apply_settings(classic, **settings, cross_attention=False)
    expected = case.unpacked(case.classic.run(classic, num_inference_steps=STEPS))
    calls = counted(case, pipe)
    latents = case.run(pipe, num_inference_steps=STEPS)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    report, told = get_tgate_report(pipe), get_tgate_report(classic)
    assert list(calls.values()) == [2 if step in report.full_steps else 1 for step in range(STEPS)]
    assert 1 < len(report.full_steps) < STEPS
    assert report.full_steps == told.full_steps
    assert (report.gate_step, report.num_inference_steps) == (told.gate_step, told.num_inference_steps)
    assert (report.full_batch_forwards, report.half_batch_forwards) == (
        told.full_batch_forwards,
        told.half_batch_forwards,
    )
    assert report.peak_bytes == told.peak_bytes
    assert [step for step, _ in report.prediction_errors] == [step for step, _ in told.prediction_errors]
    for (_, error), (_, other) in zip(report.prediction_errors, told.prediction_errors, strict=True):
        assert error == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("settings", [FORECAST, {"levels": "FFF--HF-FH-F"}], ids=["auto", "plan"])
def test_a_forecast_step_is_no_call_and_agrees_with_the_classic_pipeline(case, settings):
    classic = case.classic.build()
    pipe = apply_settings(case.build(), **settings)
    apply_settings(classic, **settings, cross_attention=False)
    expected = case.unpacked(case.classic.run(classic, num_inference_steps=STEPS))
    calls = counted(case, pipe)
    latents = case.run(pipe, num_inference_steps=STEPS)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    report, told = get_tgate_report(pipe), get_tgate_report(classic)
    assert "-" in report.levels
    assert report.levels == told.levels
    assert list(calls.values()) == [{"F": 2, "H": 1}[level] for level in report.levels if level != "-"]
    assert report.forecast_forwards == told.forecast_forwards == report.levels.count("-")
    assert report.peak_bytes == told.peak_bytes
    for (step, error), (other_step, other) in zip(report.forecast_errors, told.forecast_errors, strict=True):
        assert (step, error) == (other_step, pytest.approx(other, rel=1e-3))
    assert torch.equal(case.run(pipe, num_inference_steps=STEPS), latents)


def test_without_guidance_a_guider_is_asked_for_nothing_in_a_forecast_step():
    pipe = WAN.build()
    pipe.guider = pipe.guider.new(enabled=False)
    plain = WAN.run(pipe)
    assert torch.equal(WAN.run(apply_tgate(pipe, tolerance=0)), plain)
    calls = counted(WAN, apply_settings(pipe, **FORECAST))
    WAN.run(pipe)
    assert get_tgate_report(pipe).levels == "FFF--F"
    assert list(calls.values()) == [1] * 4
    assert torch.equal(WAN.run(remove_tgate(pipe)), plain)


def test_two_calls_agree_and_hold_nothing_afterwards(case):
    pipe = apply_tgate(case.build())
    first = case.run(pipe, num_inference_steps=STEPS)
    assert torch.equal(case.run(pipe, num_inference_steps=STEPS), first)
    gc.collect()
    assert not any(type(thing).__name__ == "GuiderRun" for thing in gc.get_objects())


@pytest.mark.slow
@pytest.mark.thorough
def test_nothing_is_held_while_the_latents_are_decoded():
    pipe, held = apply_tgate(WAN.build()), []
    state = vars(pipe)["_tgate"].state
    pipe.transformer.register_forward_pre_hook(lambda *_: held.append(state.nbytes))
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: held.append(-state.nbytes))
    latents = WAN.run(pipe, num_inference_steps=STEPS)
    # The decoder runs once for each frame of the latents.
    assert held[-latents.shape[2] :] == [0] * latents.shape[2]
    assert max(held) == get_tgate_report(pipe).peak_bytes == 4 * latents.nbytes


def test_a_batch_of_two_is_two_single_pictures(case):
    pipe = apply_tgate(case.build(), 4, guidance="predict")
    both = case.run(pipe, [0, 1], num_inference_steps=STEPS)
    for number, latents in enumerate(both):
        one = case.run(pipe, [number], num_inference_steps=STEPS)
        torch.testing.assert_close(one[0], latents, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_controlnet_is_not_asked_for_the_half_that_is_left_out(guess_mode):
    classic = BY_NAME["sdxl_controlnet"]
    case, calls = Modular("sdxl_controlnet", SDXL.blocks, classic, SDXL.denoisers), []
    pipe, other = apply_tgate(case.build(), 3), apply_tgate(classic.build(), 3, guidance="drop", cross_attention=False)
    pipe.controlnet.register_forward_pre_hook(lambda *_: calls.append(1))
    given = {"image": None, "control_image": classic.inputs([0])["image"], "guess_mode": guess_mode}
    expected = classic.run(other, guess_mode=guess_mode)
    torch.testing.assert_close(case.run(pipe, **given), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == (6 if guess_mode else 9)


def test_a_guider_has_counted_what_it_counts_in_a_plain_run(sdxl):
    SDXL.run(sdxl)
    plain = {name: value for name, value in vars(sdxl.guider).items() if isinstance(value, (bool, int, float))}
    assert plain
    SDXL.run(apply_tgate(sdxl, 2))
    assert {name: vars(sdxl.guider)[name] for name in plain} == plain
    SDXL.run(remove_tgate(sdxl))
    assert {name: vars(sdxl.guider)[name] for name in plain} == plain


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("failing", [5, 8], ids=["in_a_full_step", "in_a_half_step"])
def test_a_failure_in_the_middle_leaves_the_pipeline_as_it_was(sdxl, failing):
    apply_tgate(sdxl, 4)
    guider, fresh, count = sdxl.guider, SDXL.run(sdxl, num_inference_steps=STEPS), []

    def fail(module, args):
        count.append(1)
        if len(count) == failing:
            raise RuntimeError("out of memory")

    handle = sdxl.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        SDXL.run(sdxl, num_inference_steps=STEPS)
    assert sdxl.guider is guider
    assert type(guider) is diffusers.ClassifierFreeGuidance
    handle.remove()
    assert torch.equal(SDXL.run(sdxl, num_inference_steps=STEPS), fresh)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_guider_that_the_user_exchanges_is_gated_too(sdxl):
    expected = SDXL.build()
    expected.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.7))
    apply_tgate(sdxl, 4)
    SDXL.run(sdxl)
    sdxl.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.7))
    guider = sdxl.guider
    assert torch.equal(SDXL.run(sdxl), SDXL.run(apply_tgate(expected, 4)))
    assert sdxl.guider is guider
    remove_tgate(sdxl)
    assert sdxl.guider is guider


@pytest.mark.slow
@pytest.mark.thorough
def test_two_denoisers_with_one_guider_have_a_difference_each():
    experts = MODULAR[2]
    one, two = experts.build(), experts.build()
    one.update_components(guider_2=one.guider)
    two.update_components(guider_2=diffusers.ClassifierFreeGuidance(guidance_scale=experts.scales[0]))
    first, second = (experts.run(apply_tgate(pipe), num_inference_steps=STEPS) for pipe in (one, two))
    assert torch.equal(first, second)
    assert get_tgate_report(one) == get_tgate_report(two)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("original", [False, True], ids=["diffusers", "original"])
def test_both_formulations_of_guidance_measure_the_same_errors(original):
    # The original one adds the difference once more.
    pipe, other = SDXL.build(), SDXL.build()
    scale = 4.0 if original else 5.0
    other.update_components(
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=scale, use_original_formulation=original)
    )
    for each in (pipe, other):
        SDXL.run(apply_tgate(each), num_inference_steps=STEPS)
    errors = [dict(get_tgate_report(each).prediction_errors) for each in (pipe, other)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_without_guidance_nothing_changes_and_a_warning_says_so(case, caplog):
    # The blocks of SDXL switch their guider on.
    off = {"guidance_scale": 1.0} if case is SDXL else {"enabled": False}
    pipe = case.build()
    for name in ("guider", "guider_2")[: len(case.scales)]:
        pipe.update_components(**{name: diffusers.ClassifierFreeGuidance(**off)})
    plain = case.run(pipe)
    calls = counted(case, apply_tgate(pipe, 2))
    with caplog.at_level(logging.WARNING, "tgate_processors"):
        assert torch.equal(case.run(pipe), plain)
    assert set(calls.values()) == {1}
    assert "no guidance in which half of the batch could be left out" in caplog.text
    assert "a guider that is enabled and has a guidance_scale other than 1" in caplog.text


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("settings", SETTINGS, ids=["auto", "drop", "predict"])
def test_an_interval_of_guidance_stays_an_interval(sdxl, settings):
    sdxl.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0, start=0.25, stop=0.75))
    plain, calls = SDXL.run(sdxl, num_inference_steps=STEPS), counted(SDXL, sdxl)
    # A call that begins with the state of the last one has no text of the other half: so it is without T-GATE too.
    sdxl.guider._step = sdxl.guider._num_inference_steps = None
    assert torch.equal(SDXL.run(apply_tgate(sdxl, tolerance=0), num_inference_steps=STEPS), plain)
    calls.clear()
    sdxl.guider._step = sdxl.guider._num_inference_steps = None
    SDXL.run(apply_settings(sdxl, **settings), num_inference_steps=STEPS)
    asked = [2 if 3 <= step < 9 else 1 for step in range(STEPS)]
    full = get_tgate_report(sdxl).full_steps
    assert list(calls.values()) == [number if step in full else 1 for step, number in enumerate(asked)]
    assert calls != dict(zip(calls, asked, strict=True))
    # Nothing is known of guidance before its first step, and steps without it are as the pipeline asks.
    assert {0, 1, 2, 3, 9, 10, 11} <= set(full)


GUIDERS = {
    "AdaptiveProjectedGuidance": {},
    "AdaptiveProjectedMixGuidance": {},
    "AutoGuidance": {"auto_guidance_layers": [0], "dropout": 0.1},
    "ClassifierFreeZeroStarGuidance": {},
    "LTX2Guidance": {},
    "MagnitudeAwareGuidance": {},
    "PerturbedAttentionGuidance": {"perturbed_guidance_layers": [0]},
    "SkipLayerGuidance": {"skip_layer_guidance_layers": [0]},
    "SmoothedEnergyGuidance": {"seg_guidance_layers": [0]},
    "TangentialClassifierFreeGuidance": {},
}


# The last one needs a processor that diffusers has a description of, which none of these pipelines has.
OTHERS = [name for name in GUIDERS if name not in ("LTX2Guidance", "PerturbedAttentionGuidance")]
QUICK = ("SkipLayerGuidance", "AdaptiveProjectedGuidance")


def perturbing():
    """The settings of guiders that perturb a layer."""
    hooks = importlib.import_module("diffusers.hooks.smoothed_energy_guidance_utils")
    block = diffusers.hooks.LayerSkipConfig([0], fqn="blocks")
    smoothed = hooks.SmoothedEnergyGuidanceConfig([0], fqn="blocks")
    return {
        "AutoGuidance": {"auto_guidance_config": block},
        "SkipLayerGuidance": {"skip_layer_config": block, "skip_layer_guidance_stop": 1.0},
        "SmoothedEnergyGuidance": {"seg_guidance_config": smoothed},
    }


def with_guider(name, **settings):
    """A modular pipeline with another guider, and its case."""
    # Its norm is that of latents in three dimensions.
    case = LTX if name == "MagnitudeAwareGuidance" else WAN
    pipe = case.build()
    given = perturbing().get(name, {}) | settings
    pipe.update_components(guider=getattr(diffusers.guiders, name)(**given))
    return case, pipe


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in OTHERS]
)
def test_a_guider_of_another_kind_has_its_output_forecast(name):
    case, pipe = with_guider(name)
    guider, plain_calls = pipe.guider, []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, args: plain_calls.append(1))
    plain = case.run(pipe)
    handle.remove()
    before = parts_of(pipe)
    assert torch.equal(case.run(apply_tgate(pipe, tolerance=0)), plain)
    calls = counted(case, apply_settings(pipe, **FORECAST))
    gated = case.run(pipe)
    # Those with a third prediction have it from the second step on, and what comes then is not what came before.
    further = len(guider._input_predictions) > 2
    assert get_tgate_report(pipe).levels == ("FFFF-F" if further else "FFF--F")
    assert list(calls.values()) == ([2, 3, 3, 3, 3] if further else [2] * 4)
    assert len(plain_calls) == (17 if further else 12)
    assert not torch.equal(gated, plain)
    assert torch.equal(case.run(pipe), gated)
    assert pipe.guider is guider
    # A letter for half a step is a full one: it has no halves.
    case.run(apply_tgate(pipe, "FFFFH-"))
    assert get_tgate_report(pipe).levels == "FFFFF-"
    pipe.transformer._forward_pre_hooks.clear()
    remove_tgate(pipe)
    assert parts_of(pipe)[1] == before[1]
    assert torch.equal(case.run(pipe), plain)


def outputs_of(pipe):
    """What the scheduler gets in each step."""
    given, step = [], pipe.scheduler.step

    def watch(output, *args, **kwargs):
        given.append(output.clone())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = watch
    return given


def test_the_output_of_such_a_guider_goes_on_in_a_line_and_its_error_is_measured():
    case, pipe = with_guider("AdaptiveProjectedGuidance")
    given = outputs_of(apply_tgate(pipe, "FF-FFF"))
    case.run(pipe)
    torch.testing.assert_close(given[2], 2 * given[1] - given[0])
    given.clear()
    computed = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: computed.append(output[0].clone()))
    case.run(apply_tgate(pipe, tolerance=0))
    handle.remove()
    # What it makes of both predictions, and the conditional one, which comes first.
    errors = [(2 * each[1] - each[0] - each[2]).norm() / each[2].norm() for each in (given, computed[::2])]
    (step, measured), *_ = get_tgate_report(pipe).forecast_errors
    assert step == 2
    assert measured == pytest.approx(float(max(errors)), rel=1e-4)
    assert get_tgate_report(pipe).prediction_errors == ()


def test_where_a_guider_combines_more_predictions_its_output_is_computed_anew():
    case, pipe = with_guider("SkipLayerGuidance", skip_layer_guidance_stop=0.5)
    calls = counted(case, apply_settings(pipe, **FORECAST))
    case.run(pipe, num_inference_steps=STEPS)
    # Three predictions in the steps 1 to 5.
    assert get_tgate_report(pipe).levels == "FFFF--FFF--F"
    assert list(calls.values()) == [2, 3, 3, 3, 2, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", GUIDERS)
def test_other_guiders_are_refused_where_nothing_is_forecast(sdxl, name):
    apply_tgate(sdxl, 2)
    guider = getattr(diffusers.guiders, name)(**GUIDERS[name])
    what = r"combines \d predictions" if len(guider._input_predictions) > 2 else "makes something else of its two"
    message = rf"cannot be gated with guider={name}: .* this guider {what}.*update_components\(guider=Class"
    sdxl.update_components(guider=guider)
    # One that comes after T-GATE is refused by the next call.
    with pytest.raises(ValueError, match=message):
        SDXL.run(sdxl)
    assert sdxl.guider is guider
    remove_tgate(sdxl)
    for settings in ({"gate_step": 2}, {"forecast": False}, *([{}] if name == "LTX2Guidance" else [])):
        with pytest.raises(ValueError, match=message):
            apply_settings(sdxl, **settings)
    assert not is_tgate_applied(sdxl)


def test_every_guider_of_diffusers_is_known():
    names = {name for name in dir(diffusers.guiders) if name.endswith("Guidance") and name != "BaseGuidance"}
    # The last one is made with a package of its own, and is like the others with two predictions.
    assert names == {*GUIDERS, "ClassifierFreeGuidance", "FrequencyDecoupledGuidance"}


@pytest.mark.slow
@pytest.mark.thorough
def test_a_guider_of_the_users_is_judged_by_what_it_changes(sdxl):
    class Rising(diffusers.ClassifierFreeGuidance):
        def set_state(self, step, num_inference_steps, timestep):
            super().set_state(step, num_inference_steps, timestep)
            self.guidance_scale = 2.0 + step

    class Doubled(diffusers.ClassifierFreeGuidance):
        def forward(self, pred_cond, pred_uncond=None):
            return super().forward(2 * pred_cond, pred_uncond)

    class Bare(diffusers.ClassifierFreeGuidance):
        def forward(self, pred_cond, pred_uncond=None):
            return (pred_cond,)

    class Called(diffusers.ClassifierFreeGuidance):
        def __call__(self, data):
            return super().__call__(data)

    sdxl.update_components(guider=Rising())
    plain = SDXL.run(sdxl)
    assert torch.equal(SDXL.run(apply_tgate(sdxl, tolerance=0)), plain)
    assert not torch.equal(SDXL.run(apply_tgate(sdxl, 2)), plain)
    sdxl.update_components(guider=Doubled())
    with pytest.raises(ValueError, match=r"guider=Doubled: .* makes something else of its two predictions"):
        apply_tgate(sdxl, 2)
    SDXL.run(apply_settings(sdxl, **FORECAST))
    assert get_tgate_report(sdxl).levels == "FFF--F"
    sdxl.update_components(guider=Bare())
    with pytest.raises(ValueError, match="Bare gave a tuple, where T-GATE expects a GuiderOutput"):
        SDXL.run(sdxl)
    sdxl.update_components(guider=Called())
    with pytest.raises(ValueError, match=r"guider=Called: .* makes something else of its two predictions"):
        apply_tgate(sdxl)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cross_attention": True}, "cross_attention=True is not possible: .* a guider, .* Leave cross_attention out"),
        (
            {"max_memory": "2GB"},
            "max_memory=2000000000 is for kept cross-attention: .* a guider, .* Leave max_memory out",
        ),
        ({"gate_step": 4, "sp_interval": 2}, "sp_interval=2 and fi_interval=1 reuse self-attention: .* Leave them out"),
        ({"cfg_half": "unconditional"}, "cfg_half='unconditional' is not possible: .* Leave cfg_half out"),
        ({"deepcache": object()}, r"deepcache is not possible: .* call helper.disable\(\)"),
    ],
)
@pytest.mark.slow
@pytest.mark.thorough
def test_settings_of_attention_layers_are_refused(sdxl, settings, message):
    with pytest.raises(ValueError, match=message):
        apply_settings(sdxl, **settings)
    assert type(sdxl) is diffusers.StableDiffusionXLModularPipeline


@pytest.mark.slow
@pytest.mark.thorough
def test_a_pipeline_without_a_guider_is_refused():
    pipe = diffusers.modular_pipelines.FluxAutoBlocks().init_pipeline()
    with pytest.raises(ValueError, match="FluxModularPipeline cannot be gated: it has no guider, so there is no half"):
        apply_tgate(pipe)


@pytest.mark.slow
@pytest.mark.thorough
def test_the_probe_refuses_what_it_does_not_watch(sdxl):
    with pytest.raises(ValueError, match="is two calls of its denoiser, and the probe watches guidance in one batch"):
        measure_convergence(sdxl, ["a cat"])


@pytest.mark.slow
@pytest.mark.thorough
def test_a_cache_on_the_denoiser_is_refused():
    pipe = WAN.build()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"cannot run together with .*: guidance is a guider here"):
        apply_tgate(pipe)


@pytest.mark.slow
def test_a_cache_on_a_controlnet_is_refused():
    pipe = Modular("sdxl_controlnet", SDXL.blocks, BY_NAME["sdxl_controlnet"], SDXL.denoisers).build()
    config = diffusers.hooks.TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=[r".*attn1"])
    diffusers.hooks.apply_taylorseer_cache(pipe.controlnet, config)
    with pytest.raises(ValueError, match="cannot run together with TaylorSeerCacheHook on ControlNetModel"):
        apply_tgate(pipe)


@pytest.mark.slow
@pytest.mark.thorough
def test_processors_that_may_count_their_calls_keep_all_of_guidance(sdxl, caplog):
    class Own:
        def __init__(self, behind):
            self.behind = behind

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **more):
            return self.behind(attn, hidden_states, encoder_hidden_states, attention_mask)

    sdxl.unet.set_attn_processor({name: Own(behind) for name, behind in sdxl.unet.attn_processors.items()})
    plain = SDXL.run(sdxl)
    with caplog.at_level(logging.WARNING, "tgate_processors"):
        assert torch.equal(SDXL.run(apply_tgate(sdxl, 2)), plain)
    assert "guidance is kept in full" in caplog.text
    SDXL.run(apply_tgate(sdxl, 2, custom_processors="gate"))
    assert get_tgate_report(sdxl).half_batch_forwards == 4


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("twice", ["set_state", "__call__"])
def test_a_loop_that_tells_its_guider_something_else_is_refused(twice):
    class Twice(diffusers.modular_pipelines.ModularPipelineBlocks):
        model_name = "stable-diffusion-xl"

        @torch.no_grad()
        def __call__(self, components, block_state, i, t):
            if twice == "set_state":
                components.guider.set_state(step=i, num_inference_steps=6, timestep=t)
            else:
                components.guider.forward(block_state.noise_pred, block_state.noise_pred)
            return components, block_state

    def change(blocks):
        # The loop without a ControlNet lies in three blocks of that name.
        loop = functools.reduce(lambda block, name: block.sub_blocks[name], ["denoise"] * 3, blocks)
        loop.sub_blocks.insert("twice", Twice(), 2)

    sdxl = SDXL.build(change)
    plain = SDXL.run(sdxl)
    expected = "every step has to call the guider's set_state once" if twice == "set_state" else "its set_state before"
    apply_tgate(sdxl, 2)
    with pytest.raises(ValueError, match=expected):
        SDXL.run(sdxl)
    assert torch.equal(SDXL.run(remove_tgate(sdxl)), plain)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["prompt_embeds", "negative_pooled_prompt_embeds"])
@pytest.mark.parametrize(
    ("settings", "full"),
    [
        ({"gate_step": 3}, (0, 1, 2)),
        ({"gate_step": 3, "guidance": "predict"}, (0, 1, 2, 5)),
        ({"tolerance": math.inf, "forecast": False}, (0, 1, 2, 4, 5, 6, 7, 9)),
        (FORECAST, (0, 1, 2, 5, 6, 7)),
    ],
    ids=["drop", "predict", "auto", "forecast"],
)
def test_text_that_a_block_exchanges_gets_a_full_step_where_guidance_is_predicted(field, settings, full, caplog):
    class Travel(diffusers.modular_pipelines.ModularPipelineBlocks):
        model_name = "stable-diffusion-xl"

        @torch.no_grad()
        def __call__(self, components, block_state, i, t):
            value = getattr(block_state, field)
            # In the other steps it is another object.
            setattr(block_state, field, value * 0.5 if i == 4 else value.clone())
            return components, block_state

    def change(blocks):
        loop = functools.reduce(lambda block, name: block.sub_blocks[name], ["denoise"] * 3, blocks)
        loop.sub_blocks.insert("travel", Travel(), 2)

    sdxl = apply_settings(SDXL.build(change), **settings)
    calls = counted(SDXL, sdxl)
    SDXL.run(sdxl, num_inference_steps=STEPS)
    report = get_tgate_report(sdxl)
    assert report.full_steps == full
    computed = [step for step, level in enumerate(report.levels) if level != "-"]
    assert list(calls.values()) == [2 if step in full else 1 for step in computed]
    assert (len(computed) < STEPS) is (settings is FORECAST)
    assert not caplog.records


def hunyuan_embeds():
    """The text of both halves, for both text encoders."""
    embeds = {}
    for name, seed in (("", 100), ("negative_", 200)):
        for suffix in ("", "_2"):
            embeds[f"{name}prompt_embeds{suffix}"] = seeded((1, 5, 8), seed + len(suffix))
            embeds[f"{name}prompt_embeds_mask{suffix}"] = torch.ones(1, 5, dtype=torch.long)
    return embeds


@pytest.mark.slow
@pytest.mark.thorough
def test_a_classic_pipeline_with_a_guider_is_gated_by_it():
    pipe, embeds = hunyuan(), hunyuan_embeds()

    def run():
        size = {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}
        return pipe(**embeds, **size, num_inference_steps=6, generator=torch.Generator().manual_seed(0)).frames

    guider, plain = pipe.guider, run()
    assert torch.equal((apply_tgate(pipe, tolerance=0), run())[1], plain)
    apply_tgate(pipe, 2)
    assert not torch.equal(run(), plain)
    assert get_tgate_report(pipe).half_batch_forwards == 4
    assert remove_tgate(pipe).guider is guider
    assert torch.equal(run(), plain)
    pipe.guider = diffusers.AdaptiveProjectedMixGuidance()
    with pytest.raises(ValueError, match=r"or give pipe.guider=ClassifierFreeGuidance\("):
        apply_tgate(pipe, 2)
    plain = run()
    assert torch.equal((apply_tgate(pipe, tolerance=0), run())[1], plain)
    apply_settings(pipe, **FORECAST)
    assert not torch.equal(run(), plain)
    assert get_tgate_report(pipe).levels == "FFF--F"


@pytest.mark.slow
def test_a_classic_pipeline_with_a_guider_of_another_kind_is_forecast():
    if not hasattr(diffusers, "HunyuanImagePipeline"):
        pytest.skip("this diffusers has no Hunyuan-Image")
    pipe, embeds = hunyuan_image(), hunyuan_embeds()

    def run():
        size = {"height": 64, "width": 64, "output_type": "latent"}
        return pipe(**embeds, **size, num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images

    plain, calls = run(), []
    assert torch.equal((apply_tgate(pipe, tolerance=0), run())[1], plain)
    apply_settings(pipe, **FORECAST)
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(1))
    gated = run()
    assert get_tgate_report(pipe).levels == "FFF---FF"
    assert len(calls) == 2 * 5
    assert torch.equal(run(), gated)
    assert torch.equal((remove_tgate(pipe), run())[1], plain)


@pytest.mark.slow
@pytest.mark.thorough
def test_copies_are_gated_and_own_their_guiders(sdxl):
    apply_tgate(sdxl, 2)
    expected = SDXL.run(sdxl)
    for other in (copy.copy(sdxl), copy.deepcopy(sdxl)):
        assert torch.equal(SDXL.run(other), expected)
        assert get_tgate_report(other).half_batch_forwards == 4
        assert not is_tgate_applied(remove_tgate(other))
    assert torch.equal(SDXL.run(sdxl), expected)
