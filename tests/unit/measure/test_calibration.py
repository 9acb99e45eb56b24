"""A calibrated plan: within its budget, near to the full runs, and the pipeline as it was."""

import pytest
import torch

from examples.benchmarks.loading import MODELS, load_pipeline
from tests.support.comparing import distance
from tests.zoo.case import STEPS, slow
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, calibrate_schedule, get_tgate_report, is_tgate_applied, remove_tgate
from tgate_processors._internal.measure.calls import half_cost


def calibrated(case, pipe, **options):
    return calibrate_schedule(pipe, [case.inputs([0]), case.inputs([1])], **{"budget": 4, "trials": 3, **options})


@pytest.mark.parametrize("name", ["sd", slow("wan"), slow("pixart_alpha"), slow("sd3"), slow("pix2pix")])
def test_a_plan_keeps_its_budget_and_the_pipeline_is_as_it_was(name):
    case = BY_NAME[name]
    pipe = case.build()
    schedule = calibrated(case, pipe)
    assert len(schedule.levels) == STEPS
    assert schedule.levels.count("F") <= 4
    assert not is_tgate_applied(pipe)
    assert torch.equal(case.run(pipe), case.plain())
    case.run(apply_tgate(pipe, schedule))
    assert get_tgate_report(pipe).levels == schedule.levels


def test_a_half_step_costs_half_where_cross_attention_is_computed():
    def share(name, **choice):
        return half_cost(BY_NAME[name].build(), BY_NAME[name].inputs([0]), STEPS, **choice)

    assert share("wan") == 0.5
    assert share("wan", cross_attention=True) < 0.5
    assert 0.3 < share("sd") < 0.5


@pytest.mark.slow
def test_trials_bring_a_plan_closer():
    pipe = load_pipeline(str(MODELS / "shapes-sd"), "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    prompt = "a large red circle at the top left, on a white background"
    call = {"num_inference_steps": 12, "guidance_scale": 7.0, "output_type": "latent"}

    def draw():
        return pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images

    plain, apart = draw(), []
    for trials in (0, 12):
        schedule = calibrate_schedule(pipe, [prompt], call, budget=6, trials=trials)
        apply_tgate(pipe, schedule)
        apart.append(distance(draw(), plain))
        assert schedule.levels.count("F") <= 6
        remove_tgate(pipe)
    assert apart[1] < apart[0] < 0.5


def test_two_calibrations_agree_and_the_users_generator_stays_where_it_was():
    case = BY_NAME["sd"]
    generator = torch.Generator().manual_seed(5)
    call = {**case.inputs([0]), "latents": None, "generator": generator}
    plans = [calibrate_schedule(case.build(), [call], budget=4, trials=2) for _ in range(2)]
    assert plans[0] == plans[1]
    assert generator.initial_seed() == 5
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())


def test_what_was_applied_is_applied_again_also_after_an_error():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 3)
    expected = case.run(pipe)
    calibrated(case, pipe, trials=0)
    assert torch.equal(case.run(pipe), expected)
    with pytest.raises(ValueError, match=r"budget=0\.5 is too small for 6 steps"):
        calibrated(case, pipe, budget=0.5)
    assert torch.equal(case.run(pipe), expected)
    assert torch.equal(case.run(remove_tgate(pipe)), case.plain())


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("a cat", {}, TypeError, "prompts='a cat' is of type str: pass a list"),
        ([], {}, ValueError, "is empty: pass some prompts"),
        ([0], {"budget": "much"}, TypeError, "`budget` must be a number of full steps .* got 'much' of type str"),
        ([0], {"trials": -1}, ValueError, "`trials` must be an int of at least 0, got -1"),
        ([0], {"call": 3}, TypeError, "call=3 is of type int"),
        ([0], {"output_type": "pil"}, ValueError, 'pass a call with output_type="latent" or "pt"'),
        ([0, 1], {"num_inference_steps": 7}, ValueError, r"the calls have \[6, 7\] steps"),
    ],
)
def test_bad_arguments(prompts, options, error, message):
    case = BY_NAME["sd"]
    own = {name: options.pop(name) for name in ("output_type", "num_inference_steps") if name in options}
    if isinstance(prompts, list):
        prompts = [case.inputs([prompt]) for prompt in prompts]
        for each in prompts[-1:]:
            each.update(own)
    with pytest.raises(error, match=message):
        calibrate_schedule(case.build(), prompts, **{"budget": 4, **options})
