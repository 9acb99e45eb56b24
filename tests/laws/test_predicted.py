"""Guidance after the gate: predicted in half steps, computed again in full ones."""

import copy
import gc
import logging
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.support.comparing import distance
from tests.support.compiling import compile_in_place, exchange_for_compiled
from tests.support.counting import count, samples_of
from tests.support.custom_loops import Inverting, Loop, built
from tests.support.macs import sizes, taken
from tests.support.offload import (
    group_offload_by_leaves,
    layerwise_casting,
    model_offload,
    sequential_offload,
    skip_if_missing,
)
from tests.support.operations import operations
from tests.support.prediction import errors_of, refuses_a_choice
from tests.support.settings import AUTO, EVERY, FIXED, PATIENT, apply_settings, full_steps
from tests.zoo.addons import HOSTS
from tests.zoo.audio import CLASS_CONDITIONED
from tests.zoo.case import STEPS, Case, rows, slow, thorough
from tests.zoo.catalogue import BY_NAME, OWN_DENOISERS
from tests.zoo.core import GUIDED, with_scheduler
from tgate_processors import (
    TGateAttnProcessor,
    TGateCallback,
    TGateSchedule,
    apply_tgate,
    estimate_cost,
    get_tgate_report,
    remove_tgate,
)
from tgate_processors._internal.families import attention_modules
from tgate_processors._internal.plan.schedule import FORECAST_TOLERANCE

# The families once each; their other pipelines take long.
QUICK = {"sd", "pixart_alpha", "svd", "sd_controlnet"}
ONE_BATCH = [*GUIDED, *(case for case in OWN_DENOISERS if case.is_guided), *CLASS_CONDITIONED]
guided = pytest.mark.parametrize("case", rows(GUIDED, default=QUICK))
families = pytest.mark.parametrize(
    "case",
    rows([case for case in GUIDED if case.name in QUICK | {"sdxl", "pixart_sigma"}], default=QUICK, others="slow"),
)
SOME_CASES = pytest.mark.parametrize("case", rows(GUIDED, default={"sd", "pixart_alpha", "pixart_sigma"}))
SOME = pytest.mark.parametrize("name", ["sd", "pixart_alpha", "svd", *map(slow, ("sdxl", "sd_controlnet"))])


@pytest.mark.parametrize("case", rows(ONE_BATCH, default=QUICK))
@pytest.mark.parametrize("settings", [FIXED, PATIENT, {**FIXED, "cfg_half": "unconditional"}], ids=str)
def test_the_halves_of_a_half_step_differ_by_the_prediction(case: Case, settings):
    if "cfg_half" in settings and refuses_a_choice(case):
        return
    pipe = case.gate(case.build(), **settings)
    outputs = []
    getattr(pipe, case.denoiser).register_forward_hook(
        lambda module, args, output: outputs.append([sample.clone() for sample in samples_of(output)])
    )
    case.run(pipe)
    report = get_tgate_report(pipe)
    assert report.half_batch_forwards > 0
    scales = [pipe._guidance_scale if case.video else case.guidance + case.scale_beyond, case.second_scale]
    judged, flipped = settings is PATIENT, {"conditional_first": case.conditional_first}
    errors = [
        errors_of(each, report.full_steps, case.guided_channels, scale, judged=judged, **flipped)
        for each, scale in zip(zip(*outputs, strict=True), scales, strict=False)
    ]
    # The prediction that is off most decides.
    errors = [max(found, key=lambda error: error[1].expected) for found in zip(*errors, strict=True)]
    assert list(report.prediction_errors) == errors
    assert bool(errors) is judged


@guided
@pytest.mark.parametrize("half", ["unconditional", "conditional"])
def test_a_half_step_reuses_the_half_that_goes_on(case: Case, half):
    pipe = apply_settings(case.build(), **FIXED, cfg_half=half)
    kept, reused = {}, []

    def watch(name):
        def hook(module, args, output):
            if len(output) == kept.get(name, output).shape[0]:
                kept[name] = output
            else:
                reused.append(torch.equal(output, kept[name].chunk(2)[half == "conditional"]))

        return hook

    for name, layer in attention_modules(getattr(pipe, case.denoiser)).items():
        if "attn2" in name:
            layer.register_forward_hook(watch(name))
    case.run(pipe)
    assert len(reused) == len(kept) * get_tgate_report(pipe).half_batch_forwards > 0
    assert all(reused)


@SOME_CASES
@pytest.mark.parametrize("settings", [FIXED, PATIENT], ids=["fixed", "auto"])
def test_two_calls_agree_and_removal_gives_the_plain_picture_back(case: Case, settings):
    pipe = case.build()
    baseline = case.plain()
    apply_settings(pipe, **settings)
    first = case.run(pipe)
    report = get_tgate_report(pipe)
    assert torch.equal(case.run(pipe), first)
    assert get_tgate_report(pipe) == report
    assert not torch.equal(first, baseline)
    assert torch.equal(case.run(remove_tgate(pipe)), baseline)


@SOME
def test_the_picture_that_is_off_most_decides_for_the_batch(name):
    case = BY_NAME[name]
    pipe = apply_settings(case.build(), **PATIENT)
    errors = []
    for prompts in ([0], [1], [0, 1]):
        case.run(pipe, prompts)
        # The first is measured before anything was predicted.
        errors.append(get_tgate_report(pipe).prediction_errors[0][1])
    assert errors[2] == pytest.approx(max(errors[:2]), rel=1e-3)
    assert errors[0] != pytest.approx(errors[1], rel=1e-3)


@SOME
def test_a_tolerance_between_the_errors_of_two_runs_tells_them_apart(name):
    case = BY_NAME[name]
    pipe = apply_settings(case.build(), **PATIENT)
    case.run(pipe)
    ((step, error), *_) = get_tgate_report(pipe).prediction_errors
    assert step == 2
    case.run(apply_tgate(pipe, TGateSchedule(tolerance=error * 1.01, forecast=False)))
    assert 3 not in get_tgate_report(pipe).full_steps
    case.run(apply_tgate(pipe, TGateSchedule(tolerance=error * 0.99, forecast=False)))
    assert get_tgate_report(pipe).full_steps[:4] == (0, 1, 2, 3)


@SOME
def test_predicting_is_nearer_to_the_plain_picture_than_dropping(name):
    case = BY_NAME[name]
    pipe = case.build()
    baseline = case.plain()
    dropped = distance(case.run(apply_tgate(pipe, 3)), baseline)
    predicted = distance(case.run(apply_tgate(pipe, TGateSchedule(3, guidance="predict", cfg_interval=2))), baseline)
    assert predicted < dropped


@families
@pytest.mark.parametrize("settings", [FIXED, PATIENT], ids=["fixed", "auto"])
def test_what_is_held_is_one_half_of_cross_attention_and_two_differences(case: Case, settings):
    pipe = apply_settings(case.build(), **settings)
    state = vars(pipe)["_tgate"].state
    sizes, differences = {}, []
    denoiser = getattr(pipe, case.denoiser)
    for name, module in attention_modules(denoiser).items():
        if "attn2" in name:
            module.register_forward_hook(lambda module, args, output, name=name: sizes.setdefault(name, output.nbytes))
    denoiser.register_forward_hook(
        lambda module, args, output: differences.append(output[0].nbytes // (4 if case.denoiser != "unet" else 2))
    )
    held = []
    denoiser.register_forward_hook(
        lambda module, args, output: held.extend(
            kept.tensor for kept in state.current().attention_cache.cached.values()
        )
    )
    case.run(pipe)
    assert get_tgate_report(pipe).peak_bytes == sum(sizes.values()) // 2 + 2 * differences[0]
    # None is a part of a larger tensor, which would be held with it.
    assert held
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)
    held.clear()
    gc.collect()
    assert state.nbytes == 0


class Stop(RuntimeError):
    """Not an error of diffusers'."""


@pytest.mark.parametrize("name", ["lcm", "lcm_pixart", "sd", *map(thorough, ("lcm_sdxl", "svd"))])
def test_without_guidance_there_is_nothing_to_predict(name, caplog):
    case = BY_NAME[name]
    scale = {} if case not in GUIDED else {"guidance_scale": 1.0}
    pipe = case.build()
    baseline = case.run(pipe, **scale)
    dropped = case.run(apply_tgate(pipe, 3), **scale)
    assert torch.equal(case.run(apply_tgate(pipe, 3, guidance="predict"), **scale), dropped)
    case.run(apply_settings(pipe, **FIXED), **scale)
    assert get_tgate_report(pipe).cross_attention_computed == len(full_steps(STEPS, FIXED))
    assert get_tgate_report(pipe).half_batch_forwards == 0
    apply_settings(pipe, **AUTO)
    caplog.clear()
    for _ in range(2):
        assert torch.equal(case.run(pipe, **scale), baseline)
    (message,) = [record.message for record in caplog.records if "tgate" in record.name]
    assert message.startswith('T-GATE: gate_step="auto" is set by the error of predicted guidance, and this call of ')


def switch_guidance_off_in(step):
    def callback(pipe, index, timestep, tensors):
        if index == step - 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


@pytest.mark.parametrize("step", [2, 4, *map(slow, (3, 5))])
@pytest.mark.parametrize("settings", [FIXED, PATIENT], ids=["fixed", "auto"])
def test_guidance_that_a_callback_switches_off(step, settings, caplog):
    case = BY_NAME["sd"]
    pipe = case.build()
    baseline = case.run(pipe, **switch_guidance_off_in(step))
    apply_settings(pipe, **settings)
    assert case.run(pipe, **switch_guidance_off_in(step)).isfinite().all()
    # Up to there it was gated as ever.
    assert not [record for record in caplog.records if "tgate" in record.name]
    # With everything full up to there, what comes after is the same but for reused cross-attention.
    apply_settings(pipe, **EVERY[0])
    assert torch.equal(case.run(pipe, **switch_guidance_off_in(step)), baseline)
    apply_settings(pipe, **EVERY[1])
    assert torch.equal(case.run(pipe, **switch_guidance_off_in(step)), baseline)


def test_latents_of_another_size_begin_anew():
    case = BY_NAME["sd"]

    def callback(pipe, index, timestep, tensors):
        if index == 3:
            tensors["latents"] = torch.nn.functional.interpolate(tensors["latents"], scale_factor=2)
        return tensors

    pipe = apply_settings(case.build(), **PATIENT)
    batches = count(pipe, case)["denoiser"]
    case.run(pipe, callback_on_step_end=callback)
    # The size changes after step 3: the step after is full, and so are those until two differences are known.
    assert get_tgate_report(pipe).full_steps == (0, 1, 2, 4, 5)
    assert batches == [2, 2, 2, 1, 2, 2]


@pytest.mark.parametrize("settings", [FIXED, PATIENT], ids=["fixed", "auto"])
def test_what_runs_before_the_loop_is_no_step(settings):
    case = BY_NAME["sd"]
    pictures, reports = [], []
    for loop in (Loop, Inverting):
        pipe = apply_settings(built("sd", loop), **settings)
        pictures.append(case.run(pipe))
        reports.append(get_tgate_report(pipe))
    assert torch.equal(*pictures)
    assert reports[0] == reports[1]


class Reversed(Loop):
    """The conditional half first."""

    def predict(self, i, x, t, texts, pooled, scale):
        both = [None, None] if pooled[1] is None else pooled[::-1]
        c, u = self.denoise(torch.cat([x, x]), t, torch.cat(texts[::-1]), both).chunk(2)
        return u + scale * (c - u)


@pytest.mark.parametrize("name", ["sdxl", slow("sd")])
@pytest.mark.parametrize("settings", [FIXED, PATIENT, {**FIXED, "gate_step": 1}], ids=["fixed", "auto", "gate 1"])
def test_the_order_of_the_halves_is_that_of_the_loop(name, settings):
    case = BY_NAME[name]
    pictures, errors, full = [], [], []
    for loop in (Loop, Reversed):
        pipe = built(name, loop)
        plain = case.run(pipe)
        pictures.append((plain, case.run(apply_settings(pipe, **settings))))
        errors.append(dict(get_tgate_report(pipe).prediction_errors))
        full.append(get_tgate_report(pipe).full_steps)
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    assert bool(errors[0]) is (settings is PATIENT)
    (plain, ours), (turned, theirs) = pictures
    assert distance(turned, plain) < 1e-4
    assert distance(ours, plain) > 1e-3
    if settings["gate_step"] != 1:
        assert distance(theirs, ours) < 1e-3
    else:
        # Which half is which is known when the first step is over: what that one kept may be the other one.
        assert full == [(0, 2, 4), (0, 1, 2, 4)]


@pytest.mark.parametrize(
    ("scheduler", "passes"),
    [
        ("HeunDiscreteScheduler", 2),
        thorough("KDPM2DiscreteScheduler", 2),
        ("PNDMScheduler", 1),
        slow("DDIMScheduler", 1),
    ],
)
@pytest.mark.parametrize("settings", [thorough(FIXED), PATIENT], ids=["fixed", "auto"])
def test_steps_are_full_or_half_with_all_their_passes(scheduler, passes, settings):
    case = BY_NAME["sd"]
    pipe = with_scheduler(case.build(), scheduler)
    baseline = case.run(pipe)
    apply_settings(pipe, **settings)
    rows = count(pipe, case)["denoiser"]
    assert case.run(pipe).isfinite().all()
    report = get_tgate_report(pipe)
    steps = [2 if step in report.full_steps else 1 for step in range(report.num_inference_steps)]
    if passes == 2:
        assert rows[: 2 * len(steps) : 2] == steps
        assert all(rows[2 * step + 1] == steps[step] for step in range(len(steps) - 1))
    assert 1 in steps
    for every in EVERY:
        assert torch.equal(case.run(apply_settings(pipe, **every)), baseline)


@pytest.mark.parametrize(
    "name", ["sd_controlnet", "adapter", *map(slow, ("sdxl_controlnet", "union", "ip_adapter", "gligen"))]
)
def test_what_runs_in_a_step_besides_is_halved_with_it(name):
    case = BY_NAME[name]
    pipe = case.build()
    baseline = case.plain()
    for every in EVERY:
        assert torch.equal(case.run(apply_settings(pipe, **every)), baseline)
    apply_settings(pipe, **FIXED)
    rows = []
    if getattr(pipe, "controlnet", None) is not None:
        pipe.controlnet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    first = case.run(pipe)
    assert torch.equal(case.run(pipe), first)
    report = get_tgate_report(pipe)
    assert report.full_steps == full_steps(report.num_inference_steps, FIXED)
    one_run = [2 if step in report.full_steps else 1 for step in range(report.num_inference_steps)]
    assert rows in ([], one_run * 2)


@SOME
def test_self_attention_at_intervals(name):
    case = BY_NAME[name]
    settings = {**FIXED, "gate_step": 3, "cfg_interval": 4, "sp_interval": 2, "fi_interval": 2}
    pipe = apply_settings(case.build(), **settings)
    seen = count(pipe, case)
    first = case.run(pipe, num_inference_steps=9)
    seen.pop("denoiser")
    report = get_tgate_report(pipe)
    assert report.full_steps == (0, 1, 2, 6)
    # Before the gate every second step; in full steps after it always; in half steps where they are even.
    ran = [0, 2, 4, 6, 8]
    assert report.self_attention_computed == len(ran)
    for key, batches in seen.items():
        if key.endswith("attn1"):
            assert batches == [batches[0] // (1 if step in report.full_steps else 2) for step in ran]
    assert torch.equal(case.run(pipe, num_inference_steps=9), first)


@pytest.mark.parametrize("name", ["sd", "pixart_alpha", *map(thorough, ("sdxl", "sd_controlnet"))])
def test_one_number_is_read_in_a_full_step_and_none_in_a_half_step(name):
    case = BY_NAME[name]
    pipe = case.build()
    plain = operations(case, pipe).waiting
    assert operations(case, apply_settings(pipe, **FIXED)).waiting <= plain
    waiting = operations(case, apply_settings(pipe, **PATIENT)).waiting
    assert waiting == plain + len(get_tgate_report(pipe).prediction_errors)


@pytest.mark.parametrize(("gate", "more"), [(STEPS, {}), (99, {"cfg_interval": 3})])
def test_with_a_late_gate_torch_is_asked_for_the_very_same_operations(gate, more):
    for name in ("sd", "pixart_alpha"):
        case = BY_NAME[name]
        pipe = case.build()
        plain = operations(case, pipe).names
        assert operations(case, apply_settings(pipe, gate, guidance="predict", **more)).names == plain


@families
@pytest.mark.parametrize("settings", [{"gate_step": 3}, FIXED], ids=["drop", "predict"])
def test_guidance_alone_keeps_nothing_of_cross_attention(case: Case, settings):
    settings = {**settings, "cross_attention": False}
    pipe = apply_settings(case.build(), **settings)
    seen = count(pipe, case)
    both = case.run(pipe, [0, 1])
    report = get_tgate_report(pipe)
    assert {len(batches) for batches in seen.values()} == {report.num_inference_steps}
    assert len(set(seen["denoiser"])) == 2
    assert report.cross_attention_reused == 0
    assert report.half_batch_forwards == report.num_inference_steps - len(report.full_steps) > 0
    # The last two differences, of two pictures.
    held = 2 * both.numel() * both.element_size() if settings.get("guidance") == "predict" else 0
    assert report.peak_bytes == held
    assert distance(both, torch.cat([case.gated(prompts=[each], **settings) for each in (0, 1)])) < 1e-4
    assert torch.equal(case.run(remove_tgate(pipe)), case.plain())


@pytest.mark.parametrize("settings", [{"gate_step": 3}, AUTO], ids=["number", "auto"])
def test_guidance_alone_says_that_a_call_without_guidance_has_nothing_to_gate(settings, caplog):
    case = BY_NAME["sd"]
    pipe = apply_settings(case.build(), **settings, cross_attention=False)
    for _ in range(2):
        assert torch.equal(case.run(pipe, guidance_scale=1.0), case.plain(guidance_scale=1.0))
    (message,) = (record.message for record in caplog.records if "tgate" in record.name)
    assert message.startswith(
        "T-GATE: guidance alone is gated, and this call of StableDiffusionPipeline has no guidance"
    )
    number = "gate_step as a number of steps and " if settings is AUTO else ""
    assert message.endswith(f"nothing is gated. Give {number}cross_attention=True to reuse cross-attention alone.")


@pytest.mark.parametrize("name", ["pag", "pix2pix"])
def test_guidance_alone_of_other_parts_is_refused(name):
    with pytest.raises(
        ValueError, match=r"cross_attention=False gates guidance alone, and that of .* is not two halves"
    ):
        apply_tgate(BY_NAME[name].build(), 3, cross_attention=False)


@families
def test_without_settings_the_run_decides(case: Case):
    pipe = apply_tgate(case.build())
    assert torch.equal(case.run(pipe), case.gated("auto", tolerance=FORECAST_TOLERANCE))
    assert get_tgate_report(pipe).prediction_errors


@pytest.mark.parametrize("name", ["pag", "pag_pixart", "pix2pix", "sdxl_pix2pix"])
def test_guidance_of_other_parts_is_refused(name):
    case = BY_NAME[name]
    pipe = case.build()
    for settings in (FIXED, AUTO, {"levels": "FFH"}):
        with pytest.raises(ValueError, match=r"guidance, and that of .* is not two halves.*tgate\(pipe, 10\)"):
            apply_settings(pipe, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": "keep"}, "got 'keep'"),
        ({"gate_step": "auto", "guidance": "drop"}, '`guidance` must be left out with gate_step="auto", got .drop'),
        ({"gate_step": "auto", "cfg_interval": 3}, "`cfg_interval` must be left out with gate_step"),
        ({"gate_step": "auto", "sp_interval": 2}, "`sp_interval` must be left out .* got 2"),
        ({"gate_step": "auto", "warm_up": 2}, "`warm_up` must be left out .* got 2"),
        ({"gate_step": 5, "tolerance": 0.1}, "`tolerance` must be left out with gate_step=5, got 0.1"),
        ({"gate_step": 5, "cfg_interval": 2}, '`cfg_interval` must be left out .* got 2.*give guidance="predict"'),
        ({"guidance": "predict", "cfg_interval": 0}, "`cfg_interval` must be an int of at least 1, got 0"),
        ({"gate_step": "auto", "tolerance": -0.1}, "`tolerance` must be a relative error between 0 and 2 .* got -0.1"),
        (
            {"gate_step": "auto", "tolerance": float("nan")},
            "`tolerance` must be a relative error between 0 and 2 .* got nan",
        ),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TGateSchedule(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"guidance": "predict", "cfg_interval": 2.0}, {"gate_step": "auto", "tolerance": "0.1"}, {"gate_step": [5]}],
    ids=str,
)
def test_settings_of_the_wrong_kind(settings):
    with pytest.raises(TypeError, match=r"must be .* of type"):
        TGateSchedule(**settings)


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ({"tolerance": 0.3}, 'apply_tgate(pipe, "auto", tolerance=0.3)'),
        ({"cfg_interval": 3}, 'apply_tgate(pipe, TGateSchedule(10, guidance="predict", cfg_interval=3))'),
        ({"guidance": "drop"}, "apply_tgate(pipe, 10, guidance='drop')"),
        ({"sp_interval": 2}, "apply_tgate(pipe, TGateSchedule(10, sp_interval=2))"),
        ({"fi_interval": 2}, "apply_tgate(pipe, TGateSchedule(10, fi_interval=2))"),
    ],
)
def test_settings_in_the_call_are_told_how_to_be_given(setting, remedy):
    case = BY_NAME["pixart_alpha"]
    pipe = apply_tgate(case.build(), 3)
    with pytest.raises(TypeError, match=re.escape(remedy)):
        case.run(pipe, **setting)
    # And that works as written.
    eval(remedy)


def test_the_plan_of_a_run_that_decides_itself_is_the_shortest():
    plan = TGateSchedule(**AUTO).plan(12)
    assert "".join("." if step.cross_attention.value == "reuse" else "F" for step in plan) == "FFF.F..F...F"
    assert TGateSchedule(**AUTO).resolve_gate_step(12) == 3
    assert all(step.cross_attention.value == "compute" for step in TGateSchedule("auto", tolerance=0).plan(5))


def test_a_published_run_is_what_it_was():
    # `tests/laws/test_golden.py` holds its pictures; that is what a number alone means.
    assert TGateSchedule(10) == TGateSchedule(10, guidance="drop")
    assert TGateSchedule("auto") == TGateSchedule("auto", guidance="predict", tolerance=0.2, forecast=True)


def test_it_says_nothing(caplog):
    case = BY_NAME["sd"]
    with caplog.at_level(logging.INFO, "tgate_processors"):
        for settings in (FIXED, PATIENT, *EVERY):
            case.run(apply_settings(case.build(), **settings))
    assert not [record for record in caplog.records if "tgate" in record.name]


@pytest.mark.parametrize("name", ["sd", "pixart_alpha", "svd", slow("sdxl")])
@pytest.mark.parametrize("settings", [FIXED, PATIENT], ids=["fixed", "auto"])
def test_the_estimate_is_what_a_run_takes(name, settings):
    case = BY_NAME[name]
    pipe = case.build()
    cost = estimate_cost(
        pipe, TGateSchedule(**settings), STEPS, do_classifier_free_guidance=True, batch_size=2, **sizes(case)
    )
    assert cost.without_tgate == taken(pipe, case, [0, 1])
    assert cost.with_tgate == taken(apply_settings(pipe, **settings), case, [0, 1])
    report = get_tgate_report(pipe)
    assert cost.report.peak_bytes == report.peak_bytes
    assert cost.report.full_steps == report.full_steps
    # Without values nothing is wrong.
    assert {error for _, error in cost.report.prediction_errors} <= {0.0}
    assert replace(cost.report, prediction_errors=report.prediction_errors) == report


@pytest.mark.parametrize(
    ("name", "compile_it"),
    [
        ("pixart_alpha", compile_in_place),
        slow("pixart_alpha", exchange_for_compiled),
        thorough("sd", compile_in_place),
    ],
)
def test_three_graphs_and_none_for_other_plans(name, compile_it):
    case = BY_NAME[name]
    pipe = case.build()
    ways = [PATIENT, FIXED, {**FIXED, "cfg_interval": 3}, {**AUTO, "tolerance": 0.5}]
    expected = [case.run(apply_settings(pipe, **settings)) for settings in ways]
    torch._dynamo.reset()
    remove_tgate(pipe)
    counter = CompileCounter()
    compile_it(pipe, case, counter)
    apply_settings(pipe, **ways[0])
    torch.testing.assert_close(case.run(pipe), expected[0])
    # Compute; compute and store; reuse.
    assert counter.frame_count == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        for settings, plain in zip(ways, expected, strict=True):
            torch.testing.assert_close(case.run(apply_settings(pipe, **settings)), plain, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 3
    torch._dynamo.reset()


@pytest.mark.parametrize("way", [model_offload, sequential_offload, group_offload_by_leaves, layerwise_casting])
@pytest.mark.parametrize("name", ["pixart_alpha", slow("sd")])
def test_placed_elsewhere(name, way, tmp_path):
    skip_if_missing(way)
    case = BY_NAME[name]
    pipe = case.build()
    way(pipe, case, tmp_path)
    apply_settings(pipe, **PATIENT)
    placed = case.run(pipe)
    report = get_tgate_report(pipe)
    plain = case.build()
    if way is layerwise_casting:
        way(plain, case, tmp_path)
    assert torch.equal(case.run(apply_settings(plain, **PATIENT)), placed)
    assert get_tgate_report(plain) == report


def test_two_threads_do_not_mix():
    case = BY_NAME["sd"]
    first = apply_settings(case.build(), **PATIENT)
    second = copy.copy(first)
    second.scheduler = copy.deepcopy(first.scheduler)
    expected = [case.run(first, [0]), case.run(first, [1])]
    barrier = threading.Barrier(2)

    def run(pipe, prompts):
        barrier.wait()
        return case.run(pipe, prompts)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            found = [each.result() for each in (pool.submit(run, first, [0]), pool.submit(run, second, [1]))]
            assert all(map(torch.equal, found, expected))


def test_wired_by_hand():
    case = BY_NAME["sd"]
    pipe = case.build()
    expected = case.run(apply_tgate(pipe, TGateSchedule(3, guidance="predict", cfg_interval=2)))
    report = get_tgate_report(pipe)
    remove_tgate(pipe)
    callback = TGateCallback(TGateSchedule(3, guidance="predict", cfg_interval=2))
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({name: TGateAttnProcessor(p, callback.state) for name, p in before.items()})
    for _ in range(2):
        assert torch.equal(case.run(pipe, callback_on_step_end=callback), expected)
    assert callback.state.report == report
    # What decides by errors has not seen the first step, so it begins one later.
    callback = TGateCallback(TGateSchedule("auto", tolerance=math.inf))
    pipe.unet.set_attn_processor({name: TGateAttnProcessor(p, callback.state) for name, p in before.items()})
    case.run(pipe, callback_on_step_end=callback)
    assert callback.state.report.full_steps == (0, 1, 2, 3, 5)


def test_with_gradients():
    case = BY_NAME["sd"]
    pipe = apply_settings(case.build(), **PATIENT)
    inputs = case.inputs([0])
    inputs["prompt_embeds"].requires_grad_()
    output = type(pipe).__call__.__wrapped__(pipe, **inputs).images
    output.square().mean().backward()
    assert inputs["prompt_embeds"].grad.isfinite().all()
    assert inputs["prompt_embeds"].grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_every_pipeline_with_guidance_of_two_halves(host):
    pipe = host.build()
    baseline = host.plain()
    if host.guidance_parts:
        with pytest.raises(ValueError, match="is not two halves"):
            apply_settings(pipe, **FIXED)
        return
    for every in EVERY:
        assert torch.equal(host.run(apply_settings(pipe, **every)), baseline)
    for settings in (FIXED, PATIENT):
        apply_settings(pipe, **settings)
        first = host.run(pipe)
        report = get_tgate_report(pipe)
        assert torch.equal(host.run(pipe), first)
        assert get_tgate_report(pipe) == report
        assert first.isfinite().all()
        if settings is FIXED and "free_init" not in host.name:
            halved = report.half_batch_forwards > 0
            full = full_steps(report.num_inference_steps, FIXED)
            assert report.full_steps == (full if halved else tuple(range(report.num_inference_steps)))
    assert torch.equal(host.run(remove_tgate(pipe)), baseline)
