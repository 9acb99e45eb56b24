"""Components that several pipelines share, calls inside calls, and threads."""

import threading

import diffusers
import pytest
import torch

from tests.support.threads import in_threads
from tests.zoo.case import quiet, slow
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate

GATE = 2


def sibling_of(pipe):
    """A pipeline around the same denoiser, with a scheduler of its own as running at the same time needs it."""
    return quiet(type(pipe).from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config)))


@pytest.mark.parametrize("name", ["sd", slow("sdxl"), "pixart_alpha", slow("sd_controlnet")])
def test_a_pipeline_that_a_callback_calls_runs_as_without_tgate(name):
    case = BY_NAME[name]
    pipe = case.build()
    sibling = sibling_of(pipe)
    baseline, expected = case.plain(), case.gated(GATE)
    apply_tgate(pipe, GATE)
    inner = []

    if case.has_callback:

        def on_step_end(pipe, step, timestep, kwargs):
            inner.append(case.run(sibling))
            return kwargs

        assert torch.equal(case.run(pipe, callback_on_step_end=on_step_end), expected)
    else:
        latents = case.run(pipe, callback=lambda *args: inner.append(case.run(sibling)), callback_steps=1)
        assert torch.equal(latents, expected)
    assert len(inner) == 6
    assert all(torch.equal(latents, baseline) for latents in inner)
    report = get_tgate_report(pipe)
    assert (report.cross_attention_computed, report.cross_attention_reused) == (2, 4)
    inner.clear()
    apply_tgate(sibling, 4)
    gated = case.gated(4)
    if case.has_callback:
        assert torch.equal(case.run(pipe, callback_on_step_end=on_step_end), expected)
        assert all(torch.equal(latents, gated) for latents in inner)


def test_a_callback_of_diffusers_kind_may_call_pipelines_too():
    case = BY_NAME["sd"]
    pipe = case.build()
    sibling = sibling_of(pipe)
    baseline, expected = case.plain(), case.gated(GATE)
    apply_tgate(pipe, GATE)
    seen = []

    class Peek(diffusers.callbacks.PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            seen.append(case.run(sibling))
            return callback_kwargs

    assert torch.equal(case.run(pipe, callback_on_step_end=Peek(cutoff_step_index=None)), expected)
    assert len(seen) == 6
    assert all(torch.equal(latents, baseline) for latents in seen)


def test_a_callback_may_apply_and_remove_tgate_on_another_pipeline():
    case = BY_NAME["sd"]
    pipe = case.build()
    sibling = sibling_of(pipe)
    at_four, expected = case.gated(4), case.gated(GATE)
    apply_tgate(pipe, GATE)
    inner = []

    def on_step_end(pipe, step, timestep, kwargs):
        if step in (1, 4):
            inner.append(case.run(apply_tgate(sibling, 4)))
        if step in (2, 5):
            remove_tgate(sibling)
        return kwargs

    assert torch.equal(case.run(pipe, callback_on_step_end=on_step_end), expected)
    assert len(inner) == 2
    assert all(torch.equal(latents, at_four) for latents in inner)
    remove_tgate(pipe)
    assert not any("TGate" in type(processor).__name__ for processor in pipe.unet.attn_processors.values())


def test_a_pipeline_cannot_be_called_by_its_own_callback():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), GATE)
    expected = case.gated(GATE)
    errors = []

    def on_step_end(pipe, step, timestep, kwargs):
        with pytest.raises(RuntimeError, match="is running already, in another thread or in a call of which") as error:
            case.run(pipe)
        errors.append(error)
        return kwargs

    assert torch.equal(case.run(pipe, callback_on_step_end=on_step_end), expected)
    assert len(errors) == 6


def in_turn(parties):
    """A callback that makes the pipelines wait for each other after every step."""
    barrier = threading.Barrier(parties, timeout=600)

    def on_step_end(pipe, step, timestep, kwargs):
        barrier.wait()
        return kwargs

    return {"callback_on_step_end": on_step_end}


@pytest.mark.parametrize("shared", [True, False], ids=["one_denoiser", "two_denoisers"])
@pytest.mark.parametrize("name", ["sd", slow("sdxl"), slow("sd_controlnet")])
def test_two_threads_do_not_mix(name, shared):
    case = BY_NAME[name]
    pipe = case.build()
    second, third = (
        sibling_of(pipe) if shared else case.build(),
        sibling_of(pipe) if shared else case.build(),
    )
    baseline, first_alone, second_alone = case.plain(), case.gated(GATE), case.gated(4)
    apply_tgate(pipe, GATE), apply_tgate(second, 4)
    for _ in range(2):
        turn = in_turn(3)
        results = in_threads(
            lambda turn=turn: case.run(pipe, **turn),
            lambda turn=turn: case.run(second, **turn),
            lambda turn=turn: case.run(third, **turn),
        )
        assert torch.equal(results[0], first_alone)
        assert torch.equal(results[1], second_alone)
        assert torch.equal(results[2], baseline)


def test_one_pipeline_in_two_threads_is_an_error_for_the_second():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), GATE)
    expected = case.gated(GATE)
    started, refused = threading.Event(), threading.Event()

    def on_step_end(pipe, step, timestep, kwargs):
        started.set()
        assert refused.wait(600)
        return kwargs

    def late():
        assert started.wait(600)
        with pytest.raises(RuntimeError, match="is running already"):
            case.run(pipe)
        refused.set()

    results = in_threads(lambda: case.run(pipe, callback_on_step_end=on_step_end), late)
    assert torch.equal(results[0], expected)


def test_auto_pipelines_share_and_stay_apart():
    case, other = BY_NAME["sd"], BY_NAME["sd_img2img"]
    pipe = case.build()
    baseline, expected = case.plain(), case.gated(GATE)
    apply_tgate(pipe, GATE)
    image = quiet(diffusers.AutoPipelineForImage2Image.from_pipe(pipe))
    assert type(image) is diffusers.StableDiffusionImg2ImgPipeline
    assert not is_tgate_applied(image)
    plain = other.plain()
    assert torch.equal(other.run(image), plain)
    assert torch.equal(case.run(pipe), expected)
    assert torch.equal(other.run(image), plain)
    assert remove_tgate(image) is image
    assert torch.equal(case.run(pipe), expected)
    gated = other.run(apply_tgate(image, GATE))
    assert not torch.equal(gated, plain)
    text = quiet(diffusers.AutoPipelineForText2Image.from_pipe(image))
    assert type(text) is diffusers.StableDiffusionPipeline
    assert torch.equal(case.run(text), baseline)
    for left in (pipe, image):
        remove_tgate(left)
    assert torch.equal(case.run(pipe), baseline)
    assert torch.equal(other.run(image), plain)


def test_what_is_changed_after_apply_is_followed():
    case = BY_NAME["sd"]
    pipe, other = case.build(), case.build()
    torch.nn.init.normal_(other.unet.conv_in.weight, std=0.3)
    for scheduler in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        other.scheduler = getattr(diffusers, scheduler).from_config(other.scheduler.config)
        expected = case.run(apply_tgate(other, GATE))
        remove_tgate(other)
        apply_tgate(pipe, GATE)
        case.run(pipe)
        former, pipe.unet, pipe.scheduler = pipe.unet, other.unet, other.scheduler
        assert torch.equal(case.run(pipe), expected)
        assert not former._forward_pre_hooks
        assert not any("TGate" in type(processor).__name__ for processor in former.attn_processors.values())
        remove_tgate(pipe)
        pipe.unet = former
    pipe = apply_tgate(case.build(), GATE).to(torch.float64)
    inputs = case.inputs([0])
    inputs = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    assert pipe(**inputs).images.dtype is torch.float64
