"""The probe: what it measures, against what a run says, and that it leaves nothing behind."""

import csv
import math

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

from tests.support.custom_loops import Inverting, Loop, built
from tests.support.states import assert_same, snapshot
from tests.zoo.case import STEPS, slow
from tests.zoo.catalogue import BY_NAME
from tests.zoo.core import with_scheduler
from tgate_processors import apply_tgate, get_tgate_report, is_tgate_applied, measure_convergence
from tgate_processors._internal.families import attention_modules

SOME = pytest.mark.parametrize("name", ["sd", "pixart_alpha", "svd", *map(slow, ("sdxl", "sd_controlnet"))])


def probe(case, pipe, prompts=(0, 1), **options):
    return measure_convergence(pipe, [case.inputs([prompt]) for prompt in prompts], **options)


@SOME
def test_the_pipeline_is_as_it_was_and_draws_what_it_draws(name):
    case = BY_NAME[name]
    pipe = case.build()
    baseline = case.run(pipe)
    before = snapshot(pipe, case)
    seen = []
    denoiser = getattr(pipe, case.denoiser)
    handle = denoiser.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    case.run(pipe)
    plain, seen[:] = list(seen), []
    probe(case, pipe, [0])
    assert all(map(torch.equal, seen, plain))
    assert len(seen) == len(plain)
    handle.remove()
    assert not is_tgate_applied(pipe)
    after = snapshot(pipe, case)
    for each in (before, after):
        each["pipe"].pop("_guidance_scale", None)
    assert_same(before, after)
    assert torch.equal(case.run(pipe), baseline)


@SOME
def test_the_errors_are_those_of_a_run_with_every_step_a_full_one(name):
    case = BY_NAME[name]
    pipe = case.build()
    # Of two pictures, the one that is off most counts.
    found = measure_convergence(pipe, [case.inputs([0, 1])])
    case.run(apply_tgate(pipe, "auto", tolerance=0), [0, 1])
    expected = dict(get_tgate_report(pipe).prediction_errors)
    errors = found.steps["error"].dropna()
    assert list(errors.index) == list(expected) == list(range(2, STEPS))
    assert errors.to_dict() == pytest.approx(expected, rel=1e-4)
    assert found.steps["difference"].notna().tolist() == [False] + [True] * (STEPS - 1)


@pytest.mark.parametrize("name", ["sd", "pixart_alpha", "svd"])
def test_a_change_is_how_far_two_outputs_of_a_layer_are_apart(name):
    case = BY_NAME[name]
    pipe = case.build()
    found = probe(case, pipe, [0])
    layers = {key: layer for key, layer in attention_modules(getattr(pipe, case.denoiser)).items() if "attn2" in key}
    assert sorted(found.layers) == sorted(key.removesuffix(".processor") for key in layers)
    key = next(iter(layers))
    outputs = []
    layers[key].register_forward_hook(lambda module, args, output: outputs.append(output.flatten(1)))
    case.run(pipe)
    now, before = torch.stack(outputs[1:]), torch.stack(outputs[:-1])
    expected = ((now - before).norm(dim=2) / now.norm(dim=2)).mean(1)
    assert found.layers[key.removesuffix(".processor")].tolist()[1:] == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.steps["cross_attention"][1:].tolist() == pytest.approx(found.layers[1:].mean(axis=1).tolist())


@SOME
def test_the_settings_of_a_tolerance_are_those_of_such_a_run_while_it_goes_as_the_plain_one(name):
    case = BY_NAME[name]
    pipe = case.build()
    tolerances = (0.0, math.inf)
    settings = probe(case, pipe, [0], tolerances=tolerances).settings
    assert tuple(settings.index) == tolerances
    for tolerance in tolerances:
        case.run(apply_tgate(pipe, "auto", tolerance=tolerance))
        report = get_tgate_report(pipe)
        assert settings.loc[tolerance, "full_steps"] == len(report.full_steps)
        assert settings.loc[tolerance, "forecast_steps"] == report.forecast_forwards
        assert settings.loc[tolerance, "gate_step"] == report.gate_step
    assert settings.loc[0.0, "speedup"] == 1
    # Three full steps, two forecast ones and a half one, as the last step is not forecast.
    assert report.levels == "FFF--H"
    assert STEPS / 3.5 * 0.999 < settings.loc[math.inf, "speedup"] < STEPS / 3


def test_what_was_applied_is_applied_again_also_after_an_error():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 3)
    expected, report = case.run(pipe), get_tgate_report(pipe)
    probe(case, pipe)
    assert torch.equal(case.run(pipe), expected)
    with pytest.raises(ValueError, match="divisible by 8"):
        measure_convergence(pipe, [case.inputs([0]) | {"height": 7}])
    assert torch.equal(case.run(pipe), expected)
    assert get_tgate_report(pipe) == report
    assert not any(module._forward_hooks for module in pipe.unet.modules() if module is not pipe.unet)


@pytest.mark.parametrize("name", ["lcm", "lcm_pixart", "pag", "pix2pix"])
def test_without_guidance_of_two_halves_cross_attention_alone_is_measured(name):
    case = BY_NAME[name]
    found = probe(case, case.build())
    assert found.steps["cross_attention"].notna().sum() == STEPS - 1
    assert found.steps[["difference", "error"]].isna().all().all()
    assert (found.settings["speedup"] == 1).all()


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_steps_of_several_passes(scheduler):
    case = BY_NAME["sd"]
    pipe = with_scheduler(case.build(), scheduler)
    found = probe(case, pipe, [0])
    case.run(apply_tgate(pipe, "auto", tolerance=0))
    report = get_tgate_report(pipe)
    assert len(found.steps) == report.num_inference_steps
    assert set(dict(report.prediction_errors)) == set(found.steps["error"].dropna().index)


def test_what_runs_before_the_loop_is_no_step():
    case = BY_NAME["sd"]
    plain, inverting = (probe(case, built("sd", loop), [0]) for loop in (Loop, Inverting))
    assert len(inverting.steps) == STEPS
    assert inverting.steps["error"].equals(plain.steps["error"])
    assert inverting.settings.equals(plain.settings)


@pytest.mark.slow
def test_every_loop_of_a_call_begins_anew():
    host = BY_NAME["animatediff_free_init"]
    pipe = host.build()
    settings = measure_convergence(pipe, [host.inputs([0])], tolerances=(0.0, math.inf)).settings
    for tolerance in (0.0, math.inf):
        host.run(apply_tgate(pipe, "auto", tolerance=tolerance))
        report = get_tgate_report(pipe)
        assert settings.loc[tolerance, "full_steps"] == len(report.full_steps)
        assert settings.loc[tolerance, "gate_step"] == report.gate_step


def test_processors_of_any_kind_are_measured():
    case = BY_NAME["sd"]
    pipe = case.build()
    own = AttnProcessor2_0()
    pipe.unet.set_attn_processor(lambda *args, **kwargs: own(*args, **kwargs))
    before = pipe.unet.attn_processors
    found = probe(case, pipe, [0])
    assert found.steps["error"].notna().sum() == STEPS - 2
    assert all(after is before[name] for name, after in pipe.unet.attn_processors.items())


def test_a_table_and_a_figure(tmp_path):
    case = BY_NAME["sd"]
    found = probe(case, case.build())
    found.to_csv(tmp_path / "steps.csv")
    rows = list(csv.DictReader((tmp_path / "steps.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert float(rows[3]["error"]) == found.steps["error"][3]
    found.plot().savefig(tmp_path / "plot.png")
    assert len(Image.open(tmp_path / "plot.png").convert("RGB").getcolors(10**6)) > 50


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("a cat", TypeError, "pass a list"),
        ({"prompt": "a cat"}, TypeError, "pass a list"),
        ([], ValueError, "is empty"),
    ],
)
def test_prompts_of_the_wrong_kind(prompts, error, message):
    with pytest.raises(error, match=message):
        measure_convergence(BY_NAME["sd"].build(), prompts)


def test_what_is_no_pipeline():
    with pytest.raises(TypeError, match="not a diffusers pipeline"):
        measure_convergence("sd", ["a cat"])
