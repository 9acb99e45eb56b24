"""Steps are ticks of the progress bar, whatever the scheduler and however the loop is shortened."""

import diffusers
import pytest
import torch

from tests.zoo.case import slow
from tests.zoo.catalogue import BY_NAME
from tests.zoo.core import with_scheduler
from tgate_processors import apply_tgate, get_tgate_report, remove_tgate


class Ticks:
    """A progress bar that counts."""

    def __init__(self):
        self.total = self.done = 0

    def __call__(self, iterable=None, total=None):
        self.total, self.done = total, 0
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def update(self):
        self.done += 1


def watch(pipe, case):
    """`[ticks of the progress bar so far, batch, cross-attention ran]` for every denoiser forward."""
    pipe.progress_bar = ticks = Ticks()
    denoiser = getattr(pipe, case.denoiser)
    forwards = []
    first = denoiser.conv_in if hasattr(denoiser, "conv_in") else denoiser.pos_embed.proj
    first.register_forward_pre_hook(lambda module, args: forwards.append([ticks.done, len(args[0]), False]))
    cross = next(module for name, module in denoiser.named_modules() if name.endswith("attn2"))
    cross.to_k.register_forward_hook(lambda module, args, output: forwards[-1].__setitem__(2, True))
    return ticks, forwards


def check(ticks, forwards, gate, guided=True):
    assert forwards == [[step, 2 if step < gate and guided else 1, step < gate] for step, _, _ in forwards]
    assert {True, False} == {ran for _, _, ran in forwards}
    assert ticks.done == forwards[-1][0] + 1


# Every scheduler steps SDXL below too.
@pytest.mark.parametrize(
    "name", ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd_img2img")), "pixart_alpha"]
)
@pytest.mark.parametrize(
    ("scheduler", "config", "passes"),
    [
        ("DDIMScheduler", {}, 8),
        ("HeunDiscreteScheduler", {}, 15),
        ("KDPM2DiscreteScheduler", {}, 15),
        ("KDPM2AncestralDiscreteScheduler", {}, 15),
        ("PNDMScheduler", {"skip_prk_steps": True}, 9),
        ("PNDMScheduler", {"skip_prk_steps": False}, 17),
        ("DPMSolverMultistepScheduler", {}, 8),
        ("DPMSolverSinglestepScheduler", {}, 8),
        ("UniPCMultistepScheduler", {}, 8),
        ("EulerAncestralDiscreteScheduler", {}, 8),
        ("LCMScheduler", {"original_inference_steps": 50}, 8),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_gate_step_counts_ticks_of_the_progress_bar(name, scheduler, config, passes):
    case = BY_NAME[name]
    pipe = case.build()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **config)
    baseline = case.run(pipe, num_inference_steps=8)
    for gate in (1, 3):
        apply_tgate(pipe, gate)
        ticks, forwards = watch(pipe, case)
        latents = case.run(pipe, num_inference_steps=8)
        assert latents.isfinite().all()
        assert len(forwards) == passes
        check(ticks, forwards, gate)
        report = get_tgate_report(pipe)
        assert (report.num_inference_steps, report.gate_step) == (8, gate)
    remove_tgate(pipe)
    assert torch.equal(case.run(pipe, num_inference_steps=8), baseline)


@pytest.mark.parametrize(
    ("name", "call", "steps"),
    [
        ("sd_img2img", {"num_inference_steps": 10, "strength": 0.5}, 5),
        ("sd_inpaint", {"num_inference_steps": 10, "strength": 0.5}, 5),
        ("sdxl_img2img", {"num_inference_steps": 10, "strength": 0.5}, 5),
        ("sdxl_inpaint", {"num_inference_steps": 10, "strength": 0.5}, 5),
        ("sdxl", {"num_inference_steps": 10, "denoising_end": 0.6}, 6),
        ("sdxl_img2img", {"num_inference_steps": 10, "denoising_start": 0.6}, 4),
        ("sd", {"num_inference_steps": None, "timesteps": [900, 700, 500, 300, 100]}, 5),
        ("sd", {"num_inference_steps": None, "sigmas": [14.0, 7.0, 3.0, 1.0, 0.3]}, 5),
    ],
)
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_only_the_steps_that_really_run_count(name, call, steps, scheduler):
    if "sigmas" in call and scheduler == "HeunDiscreteScheduler":
        call = {"num_inference_steps": None, "timesteps": [900, 700, 500, 300, 100]}
    case = BY_NAME[name]
    pipe = case.build()
    config = {"timestep_spacing": "linspace", "use_karras_sigmas": False}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **config)
    apply_tgate(pipe, 0.5)
    ticks, forwards = watch(pipe, case)
    case.run(pipe, **call)
    report = get_tgate_report(pipe)
    assert report.num_inference_steps == ticks.done
    assert abs(ticks.done - steps) <= 1
    assert report.gate_step == int(ticks.done * 0.5 + 0.5)
    check(ticks, forwards, report.gate_step)


def test_the_same_share_is_the_same_part_of_every_run():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 0.4)
    for steps, gate in ((5, 2), (10, 4), (25, 10)):
        case.run(pipe, num_inference_steps=steps)
        report = get_tgate_report(pipe)
        assert (report.gate_step, report.cross_attention_computed) == (gate, gate)
        assert report.num_inference_steps == steps


CONFIG = {
    # Without a seed its noise differs from call to call.
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
    # Euler's configuration says "none".
    "EDMEulerScheduler": {"sigma_min": 0.002, "sigma_max": 80.0},
}


# Every scheduler that diffusers lists as compatible.
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
