"""A ControlNet runs at half batch after the gate, and the picture is the same as if it did not."""

import json

import diffusers
import pytest
import torch

from tests.support.comparing import distance
from tests.support.paths import ROOT
from tests.zoo.case import rows, slow
from tests.zoo.catalogue import BY_NAME
from tests.zoo.core import CASES
from tgate_processors import apply_tgate, get_tgate_report
from tgate_processors._internal.measure.inputs import InputSize
from tgate_processors._internal.measure.macs import count_forwards
from tgate_processors._internal.measure.meta_model import make_inputs
from tgate_processors._internal.plan.step_plan import Action

WITH_CONTROLNET = rows(case for case in CASES if case.control)


def watch(pipe):
    """Batches that the first layers of the ControlNets and of the UNet really see, in order."""
    seen = []
    nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
    for name, layer in (*(("control", net.conv_in) for net in nets), ("unet", pipe.unet.conv_in)):
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.append((name, len(args[0]))))
    return seen


@pytest.mark.parametrize("case", WITH_CONTROLNET)
@pytest.mark.parametrize("prompts", [[0], [0, 1]], ids=["one", "two"])
def test_the_controlnet_is_halved_with_the_unet(case, prompts):
    pipe = apply_tgate(case.build(), 2)
    seen = watch(pipe)
    case.run(pipe, prompts)
    steps = get_tgate_report(pipe).num_inference_steps
    count = len(prompts)
    order = ["control"] * case.control_nets + ["unet"]
    assert seen == [(name, count * (2 if step < 2 else 1)) for step in range(steps) for name in order]


@pytest.mark.parametrize("case", WITH_CONTROLNET)
@pytest.mark.parametrize("half", ["unconditional", "conditional"])
def test_halving_the_controlnet_changes_nothing(case, half):
    pipe = apply_tgate(case.build(), 2, cfg_half=half)
    halved = case.run(pipe, [0, 1])
    seen = watch(pipe)

    def leave_out(pipe, step, timestep, tensors):
        # The hook that halves it, which every call puts back.
        pipe.controlnet._forward_pre_hooks.clear()
        return tensors

    assert distance(case.run(pipe, [0, 1], callback_on_step_end=leave_out), halved) < 1e-5
    assert ("control", 4) in seen[-4:]


@pytest.mark.parametrize("name", ["sd_controlnet", "sdxl_controlnet"])
@pytest.mark.parametrize("half", [None, "unconditional", "conditional"])
def test_in_guess_mode_the_half_with_the_control_stays(name, half):
    case = BY_NAME[name]
    pipe = case.build()
    apply_tgate(pipe, 2, cfg_half=half, custom_forwards="gate")
    seen = watch(pipe)
    residuals = []
    forward = pipe.unet.forward

    def watched(*args, **kwargs):
        residuals.append(kwargs["mid_block_additional_residual"].abs().amax((1, 2, 3)))
        return forward(*args, **kwargs)

    # The user's hooks see whole batches.
    pipe.unet.forward = watched
    case.run(pipe, guess_mode=True)
    assert seen == [
        (part, 1 if part == "control" or step > 1 else 2) for step in range(6) for part in ("control", "unet")
    ]
    assert [len(residual) for residual in residuals] == [2, 2, 1, 1, 1, 1]
    assert residuals[0][0] == 0
    assert all(bool(residual[-1] > 0) is (half != "unconditional") for residual in residuals[2:])


def test_an_exchanged_controlnet_is_followed():
    case = BY_NAME["sd_controlnet"]
    pipe, other = case.build(), case.build()
    torch.nn.init.normal_(other.controlnet.conv_in.weight)
    expected = case.run(apply_tgate(other, 2))
    apply_tgate(pipe, 2)
    case.run(pipe)
    first, pipe.controlnet = pipe.controlnet, other.controlnet
    assert torch.equal(case.run(pipe), expected)
    assert not first._forward_pre_hooks


def test_control_over_a_part_of_the_steps():
    case = BY_NAME["sd_controlnet"]
    pipe = case.build()
    call = {"control_guidance_start": 0.2, "control_guidance_end": 0.8, "controlnet_conditioning_scale": 0.7}
    baseline = case.run(pipe, **call)
    assert torch.equal(case.run(apply_tgate(pipe, 99), **call), baseline)
    gated = case.run(apply_tgate(pipe, 2), **call)
    assert not torch.equal(gated, case.run(pipe))


@pytest.mark.parametrize(
    ("name", "latent", "halved", "gated"), [("sd15", 64, 0.10, 0.005), slow("sdxl", 128, 0.12, 0.012)]
)
def test_what_the_controlnet_could_save(name, latent, halved, gated):
    """What docs/pipelines.md says of real architectures, counted without weights."""
    config = json.loads((ROOT / f"examples/configs/{name}.json").read_text())
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
        controlnet = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    macs = {}
    for part in (unet, controlnet):
        inputs = make_inputs(unet.to("meta"), 1, InputSize(latent, latent, 77, 1)) | {"return_dict": False}
        if part is controlnet:
            inputs["controlnet_cond"] = torch.empty(1, 3, 8 * latent, 8 * latent, device="meta")
        ways = [(action, Action.COMPUTE) for action in (Action.STORE, Action.REUSE)]
        counted = count_forwards(part.eval().to("meta"), lambda inputs=inputs: inputs, ways)
        for (action, _), (forward, _) in zip(ways, counted, strict=True):
            macs[part is controlnet, action] = forward.macs.total
    before = 2 * 10 * (macs[False, Action.STORE] + macs[True, Action.STORE])
    run = {
        "whole": before + 15 * (macs[False, Action.REUSE] + 2 * macs[True, Action.STORE]),
        "half": before + 15 * (macs[False, Action.REUSE] + macs[True, Action.STORE]),
        "gated": before + 15 * (macs[False, Action.REUSE] + macs[True, Action.REUSE]),
    }
    assert 1 - run["half"] / run["whole"] == pytest.approx(halved, abs=0.005)
    assert 1 - run["gated"] / run["half"] == pytest.approx(gated, abs=0.0005)
