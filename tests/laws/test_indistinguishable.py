"""With its gate beyond the last step, a pipeline is the pipeline: the ideas of diffusers' own pipeline tests."""

import copy

import accelerate
import numpy as np
import pytest
import torch

from tests.zoo.case import slow, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateSchedule, apply_tgate, remove_tgate

NAMES = ["sd", thorough("sdxl_img2img"), "pixart_alpha", "svd", slow("sd_controlnet"), "lcm", slow("animatediff")]


@pytest.fixture(params=NAMES)
def case(request):
    return BY_NAME[request.param]


def call(case, pipe, **overrides):
    torch.manual_seed(0)
    return pipe(**case.inputs([0], **overrides))


def first(output):
    value = output[0]
    if isinstance(value, torch.Tensor):
        return value
    return torch.from_numpy(np.stack([np.asarray(image) for image in value]))


@pytest.mark.parametrize("form", ["pil", "latent"])
def test_outputs_in_every_form(case, form):
    pipe = case.build()
    plain = call(case, pipe, output_type=form)
    as_tuple = call(case, pipe, output_type=form, return_dict=False)
    apply_tgate(pipe, 99)
    gated = call(case, pipe, output_type=form)
    assert type(gated) is type(plain)
    assert list(gated.keys()) == list(plain.keys())
    assert type(gated[0]) is type(plain[0])
    assert torch.equal(first(gated), first(plain))
    gated = call(case, pipe, output_type=form, return_dict=False)
    assert type(gated) is type(as_tuple)
    assert len(gated) == len(as_tuple)
    assert torch.equal(first(gated), first(as_tuple))


def test_components_and_configuration(case):
    pipe = case.build()
    before = dict(pipe.config), list(pipe.components), pipe.dtype, pipe.device
    parts = {key: id(part) for key, part in pipe.components.items()}
    apply_tgate(pipe, 99)
    assert (dict(pipe.config), list(pipe.components), pipe.dtype, pipe.device) == before
    assert {key: id(part) for key, part in pipe.components.items()} == parts


def test_the_representation_ends_with_the_settings_as_long_as_they_are_there():
    pipe = BY_NAME["sd"].build()
    before = repr(pipe)
    assert repr(apply_tgate(pipe, 0.4)) == f"{before}\nwith T-GATE: {TGateSchedule(0.4)!r}"
    assert "gate_step=7," in repr(copy.deepcopy(apply_tgate(pipe, 7)))
    assert repr(remove_tgate(pipe)) == before


def test_seeds_mean_the_same(case):
    pipe = case.build()
    torch.manual_seed(3)
    plain = pipe(**case.inputs([0], generator=None))[0]
    apply_tgate(pipe, 99)
    torch.manual_seed(3)
    assert torch.equal(pipe(**case.inputs([0], generator=None))[0], plain)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    remove_tgate(pipe)(**case.inputs([0], generator=None))
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_arguments_get_the_errors_of_the_pipeline(case):
    pipe = case.build()
    calls = [{"num_inference_steps": -3}, {"unknown_argument": 1}, {"output_type": "latent", "generator": "no"}]
    if "height" in case.inputs([0]):
        calls.append({"height": 7})
    # SVD does not look at them if there is no callback.
    if case.has_callback and not case.video:
        calls.append({"callback_on_step_end_tensor_inputs": ["no_such_tensor"]})

    def errors():
        seen = []
        for wrong in calls:
            try:
                call(case, pipe, **wrong)
            except Exception as error:
                seen.append((type(error), str(error)))
            else:
                seen.append(None)
        return seen

    plain = errors()
    assert any(plain)
    baseline = first(call(case, pipe))
    apply_tgate(pipe, 99)
    assert errors() == plain
    assert torch.equal(first(call(case, pipe)), baseline)


# Every way of placing a pipeline is in test_offload_and_casting.
@pytest.mark.parametrize(
    "name", ["pixart_alpha", *map(slow, ("sd", "svd", "sd_controlnet")), *map(thorough, ("lcm", "animatediff"))]
)
@pytest.mark.parametrize("when", [slow("before"), "after"])
def test_sequential_offload(name, when):
    case = BY_NAME[name]
    pipe = case.build()
    baseline = first(call(case, pipe))
    gated = first(call(case, apply_tgate(pipe, 2)))
    if when == "before":
        remove_tgate(pipe)
    # What `enable_sequential_cpu_offload` does, which asks for an accelerator.
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    denoiser = getattr(pipe, case.denoiser)
    assert next(denoiser.parameters()).device.type == "meta"
    apply_tgate(pipe, 2)
    assert torch.equal(first(call(case, pipe)), gated)
    apply_tgate(pipe, 99)
    assert torch.equal(first(call(case, pipe)), baseline)
    remove_tgate(pipe)
    assert any(hasattr(module, "_hf_hook") for module in denoiser.modules())
    assert torch.equal(first(call(case, pipe)), baseline)
    pipe.remove_all_hooks()
    assert torch.equal(first(call(case, apply_tgate(pipe, 2))), gated)


def test_nothing_trains_and_nothing_keeps_a_graph(case):
    pipe = case.build()
    training = getattr(pipe, case.denoiser).training
    latents = first(call(case, apply_tgate(pipe, 2)))
    assert not latents.requires_grad
    assert getattr(pipe, case.denoiser).training is training
    assert all(parameter.grad is None for parameter in getattr(pipe, case.denoiser).parameters())
