"""Every scheduler that diffusers lists as compatible: steps are counted right, and the laws hold."""

import diffusers
import pytest
import torch

from tests.unit.run.test_steps import check, watch
from tests.zoo.core import BY_NAME, slow, with_scheduler
from tgate_processors import apply_tgate, get_tgate_report

CONFIG = {
    # Without a seed its noise differs from call to call.
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
    # Euler's configuration says "none".
    "EDMEulerScheduler": {"sigma_min": 0.002, "sigma_max": 80.0},
}


def compatible(name):
    return [(name, kind.__name__) for kind in sorted(BY_NAME[name].build().scheduler.compatibles, key=str)]


@pytest.mark.parametrize(("name", "scheduler"), [*compatible("sd"), *(slow(*row) for row in compatible("sdxl"))])
def test_steps_are_ticks_and_a_late_gate_changes_no_bit(name, scheduler):
    case = BY_NAME[name]
    pipe = with_scheduler(case.build(), scheduler, **CONFIG.get(scheduler, {}))
    baseline = case.run(pipe, num_inference_steps=8)
    assert baseline.isfinite().all()
    apply_tgate(pipe, 99)
    assert torch.equal(case.run(pipe, num_inference_steps=8), baseline)
    ticks, forwards = watch(apply_tgate(pipe, 3), case)
    gated = case.run(pipe, num_inference_steps=8)
    assert gated.isfinite().all()
    check(ticks, forwards, 3)
    assert get_tgate_report(pipe).num_inference_steps == ticks.total == ticks.done
    assert torch.equal(case.run(pipe, num_inference_steps=8), gated)


def test_there_are_many():
    assert len({scheduler for _, scheduler in compatible("sd")}) >= 14
    assert isinstance(BY_NAME["sd"].build().scheduler, diffusers.DDIMScheduler)
