"""Nothing outlives its pipeline, and nothing of a run outlives its call: dropped, pickled, copied, differentiated."""

import copy
import functools
import gc
import inspect
import multiprocessing
import pickle
import threading

import pytest
import torch

from tests.support.comparing import assert_same_but_for_rounding
from tests.support.custom_loops import Loop
from tests.support.settings import apply_settings
from tests.support.states import state_of
from tests.support.threads import in_threads
from tests.zoo.case import quiet, slow, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateSchedule, apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate
from tgate_processors._internal.attention.layers import attention_modules

GATE = 3
NAMES = ["sd", slow("sdxl"), "pixart_alpha", slow("sd_controlnet")]


@pytest.fixture(params=NAMES)
def case(request):
    return BY_NAME[request.param]


def around(pipe):
    """Another pipeline around the same parts, as a server makes for each request."""
    cls = type(pipe).__mro__[1] if is_tgate_applied(pipe) else type(pipe)
    more = {"requires_safety_checker": False} if "requires_safety_checker" in pipe.config else {}
    return quiet(cls(**pipe.components, **more))


def traces(pipe, case):
    denoiser = getattr(pipe, case.denoiser)
    gates = [layer for layer in attention_modules(denoiser).values() if "TGate" in type(layer.processor).__name__]
    parts = [denoiser, getattr(pipe, "controlnet", None)]
    hooks = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in parts if part is not None]
    return len(gates), sum(hooks)


def test_a_pipeline_that_is_dropped_takes_its_gates_and_hooks_with_it(case):
    base = case.build()
    baseline = case.plain()
    for request in range(12):
        pipe = apply_tgate(around(base), GATE)
        if request % 4 == 0:
            case.run(pipe, num_inference_steps=4)
        del pipe
        assert traces(base, case) == (0, 0)
    assert torch.equal(case.run(base), baseline)


def test_of_several_the_one_that_is_dropped_goes_and_the_others_stay(case):
    base = case.build()
    baseline = case.plain()
    first, second, third = (apply_tgate(around(base), gate) for gate in (1, GATE, 5))
    expected = case.gated(GATE)
    case.run(first), case.run(third)
    del first
    gc.collect()
    assert torch.equal(case.run(second), expected)
    del third
    gc.collect()
    assert torch.equal(case.run(second), expected)
    processor = next(iter(attention_modules(getattr(base, case.denoiser)).values())).processor
    assert not hasattr(processor.original, "original")
    del second
    gc.collect()
    assert traces(base, case) == (0, 0)
    assert torch.equal(case.run(base), baseline)


def test_a_pipeline_that_failed_can_be_dropped_too():
    case = BY_NAME["sd"]
    base = case.build()
    pipe = apply_tgate(around(base), GATE)
    with pytest.raises(ValueError, match="divisible by 8"):
        case.run(pipe, height=63)
    del pipe
    gc.collect()
    assert traces(base, case) == (0, 0)


@pytest.mark.parametrize("called", [True, thorough(False)], ids=["called", "never_called"])
def test_a_gated_pipeline_pickles_and_its_copy_is_gated_on_its_own(case, called):
    pipe = case.build()
    baseline, expected = case.plain(), case.gated(GATE, sp_interval=2, warm_up=1)
    apply_tgate(pipe, TGateSchedule(GATE, sp_interval=2, warm_up=1))
    if called:
        case.run(pipe)
    loaded = quiet(pickle.loads(pickle.dumps(pipe)))
    assert is_tgate_applied(loaded)
    assert type(loaded) is type(pipe)
    assert traces(loaded, case) == traces(pipe, case)
    assert_same_but_for_rounding(case.run(loaded), expected)
    assert get_tgate_report(loaded).half_batch_forwards == 6 - GATE
    remove_tgate(loaded)
    assert traces(loaded, case) == (0, 0)
    assert_same_but_for_rounding(case.run(loaded), baseline)
    assert torch.equal(case.run(pipe), expected)
    again = pickle.loads(pickle.dumps(quiet(pickle.loads(pickle.dumps(pipe)))))
    denoiser = getattr(again, case.denoiser)
    assert_same_but_for_rounding(case.run(quiet(again)), expected)
    # A copy that is dropped takes its own gates with it.
    components = again.components
    del again
    gc.collect()
    assert not denoiser._forward_hooks
    assert components


def pickled_copy(pipe):
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled_copy], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["sd3", slow("sd"), slow("wan"), slow("sd_controlnet"), slow("pixart_alpha")])
def test_copies_of_a_plain_pipeline_beside_a_gated_one_are_plain(name, clone):
    case = BY_NAME[name]
    base = case.build()
    plain = case.run(base)
    expected = state_of(base, case)
    sibling = apply_tgate(around(base), GATE, cross_attention=False if name == "sd3" else None)
    gated = case.run(sibling)
    denoiser = getattr(base, case.denoiser)
    copies = []

    def on_step_end(pipe, step, timestep, tensors):
        # While the sibling runs, too.
        if step == GATE:
            copies.append(clone(base))
        return tensors

    copies += [clone(base), clone(base)]
    setattr(copies[1], case.denoiser, clone(denoiser))
    if "callback_on_step_end" in inspect.signature(type(base).__call__).parameters:
        case.run(sibling, callback_on_step_end=on_step_end)
    for copied in map(quiet, copies):
        kind, attributes, hooks, layers, parts = state_of(copied, case)
        assert (kind, attributes, hooks, parts) == (expected[0], expected[1], expected[2], expected[4])
        assert not any("TGate" in type(processor).__name__ for processor, _ in layers)
        assert_same_but_for_rounding(case.run(copied), plain)
        # It can be gated like any other.
        apply_tgate(copied, GATE, cross_attention=False if name == "sd3" else None)
        assert_same_but_for_rounding(case.run(copied), gated)
        remove_tgate(copied)
    assert torch.equal(case.run(sibling), gated)
    remove_tgate(sibling)
    assert state_of(base, case) == expected


def test_a_copy_of_a_gated_pipeline_that_cannot_be_gated_any_more_says_so_when_it_is_called():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), GATE)
    pipe.unet.forward = functools.partial(type(pipe.unet).forward, pipe.unet)
    pipe.unet.forward = lambda *args, own=pipe.unet.forward, **kwargs: own(*args, **kwargs)
    copied = quiet(copy.deepcopy(pipe))
    with pytest.raises(ValueError, match="forward"):
        case.run(copied)
    remove_tgate(copied)
    assert case.run(copied).isfinite().all()


def test_the_report_is_that_of_the_copy_that_ran():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 2)
    first, second = shallow(pipe), shallow(pipe)
    case.run(first, num_inference_steps=5)
    case.run(second, num_inference_steps=7)
    assert get_tgate_report(first).num_inference_steps == 5
    assert get_tgate_report(second).num_inference_steps == 7
    assert get_tgate_report(pipe).num_inference_steps == 0
    with pytest.raises(ValueError, match="divisible by 8"):
        case.run(first, height=63)
    assert get_tgate_report(first).num_inference_steps == 0
    assert get_tgate_report(second).num_inference_steps == 7


@pytest.mark.parametrize("name", ["sd", "sd3", slow("wan")])
def test_a_copy_that_starts_or_fails_leaves_the_one_that_runs_alone(name):
    case = BY_NAME[name]
    pipe = apply_tgate(case.build(), GATE, cross_attention=False if name == "sd3" else None)
    expected = case.run(pipe)
    other = shallow(pipe)

    def on_step_end(pipe, step, timestep, tensors):
        with pytest.raises(ValueError, match="divisible"):
            case.run(other, height=63)
        return tensors

    assert torch.equal(case.run(pipe, callback_on_step_end=on_step_end), expected)


def work(pickled, answers):
    pipe = quiet(pickle.loads(pickled))
    latents = BY_NAME["sd"].run(pipe)
    answers.put((latents.numpy(), get_tgate_report(pipe).half_batch_forwards))


@pytest.mark.slow
def test_a_spawned_worker_takes_a_gated_pipeline():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), GATE)
    expected = case.gated(GATE)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=work, args=(pickle.dumps(pipe), answers))
    worker.start()
    latents, halves = answers.get(timeout=800)
    worker.join(timeout=60)
    assert halves == 6 - GATE
    assert_same_but_for_rounding(torch.from_numpy(latents), expected)


def shallow(pipe):
    """The remedy that the error about overlapping calls names."""
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    return other


@pytest.mark.parametrize("name", ["sd", slow("sdxl"), slow("sd_controlnet")])
def test_shallow_copies_of_one_pipeline_run_at_the_same_time_gated(name):
    case = BY_NAME[name]
    pipe = apply_tgate(case.build(), GATE)
    baseline = case.plain()
    expected = [case.gated(GATE, [prompt]) for prompt in range(3)]
    copies = [pipe, shallow(pipe), shallow(pipe)]
    barrier = threading.Barrier(3, timeout=600)

    def on_step_end(pipe, step, timestep, tensors):
        barrier.wait()
        return tensors

    for _ in range(2):
        runs = [lambda p=p, n=n: case.run(p, [n], callback_on_step_end=on_step_end) for n, p in enumerate(copies)]
        assert all(torch.equal(*pair) for pair in zip(in_threads(*runs), expected, strict=True))
        assert all(get_tgate_report(each).half_batch_forwards == 6 - GATE for each in copies)
    remove_tgate(pipe)
    assert torch.equal(case.run(pipe), baseline)
    assert torch.equal(case.run(copies[1]), expected[0])
    for each in copies[1:]:
        remove_tgate(each)
    assert traces(pipe, case) == (0, 0)
    assert torch.equal(case.run(copies[2]), baseline)


def test_a_shallow_copy_may_be_called_by_a_callback_of_the_other():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), GATE)
    expected, inner = case.gated(GATE), []
    other = shallow(pipe)

    def on_step_end(pipe, step, timestep, tensors):
        inner.append(case.run(other))
        return tensors

    assert torch.equal(case.run(pipe, callback_on_step_end=on_step_end), expected)
    assert len(inner) == 6
    assert all(torch.equal(latents, expected) for latents in inner)


def test_a_shallow_copy_with_another_denoiser_leaves_the_first_one_alone():
    case = BY_NAME["sd"]
    pipe, second = case.build(), case.build()
    torch.nn.init.normal_(second.unet.conv_in.weight, std=0.3)
    expected, other_expected = case.gated(GATE), case.run(apply_tgate(second, GATE))
    remove_tgate(second)
    apply_tgate(pipe, GATE)
    other = shallow(pipe)
    other.unet = second.unet
    for _ in range(2):
        assert torch.equal(case.run(other), other_expected)
        assert torch.equal(case.run(pipe), expected)
    remove_tgate(other)
    assert traces(second, case) == (0, 0)
    assert torch.equal(case.run(pipe), expected)
    remove_tgate(pipe)
    assert traces(pipe, case) == (0, 0)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart_alpha", "svd"])
def test_what_the_call_wraps_is_the_call_with_gradients_gated(name):
    case = BY_NAME[name]
    pipe = case.build()
    plain = type(pipe).__call__.__wrapped__
    expected = case.gated(GATE)
    apply_tgate(pipe, GATE)
    wrapped = type(pipe).__call__.__wrapped__
    assert wrapped is not plain
    assert not hasattr(wrapped, "__wrapped__")
    inputs = case.inputs([0])
    embeds = inputs.get("prompt_embeds")
    if embeds is not None:
        embeds.requires_grad_()
    latents = wrapped(pipe, **inputs)[0]
    assert torch.equal(latents.detach(), expected)
    assert get_tgate_report(pipe).half_batch_forwards == 6 - GATE
    if embeds is not None:
        latents.square().mean().backward()
        assert embeds.grad.abs().sum() > 0
    assert type(remove_tgate(pipe)).__call__.__wrapped__ is plain


class Trained(Loop):
    """A loop that is trained through."""

    __call__ = Loop.__call__.__wrapped__


def gradient(name, checkpointing, settings):
    from tests.support.custom_loops import built

    case = BY_NAME[name]
    pipe = built(name, Trained) if case.has_callback else case.build()
    denoiser = getattr(pipe, case.denoiser)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    given = {
        m: m._gradient_checkpointing_func for m in denoiser.modules() if hasattr(m, "_gradient_checkpointing_func")
    }
    if settings:
        apply_settings(pipe, **settings)
    inputs = case.inputs([0])
    inputs["prompt_embeds"].requires_grad_()
    call = type(pipe).__call__ if case.has_callback else type(pipe).__call__.__wrapped__
    output = call(pipe, **inputs)
    (output.images if hasattr(output, "images") else output[0]).square().mean().backward()
    assert all(module._gradient_checkpointing_func is function for module, function in given.items())
    return inputs["prompt_embeds"].grad


@pytest.mark.parametrize(
    "settings", [None, {"gate_step": GATE}, {"gate_step": 4, "sp_interval": 2, "fi_interval": 2, "warm_up": 1}], ids=str
)
@pytest.mark.parametrize("name", [slow("sd"), thorough("sdxl"), "pixart_alpha"])
def test_gradient_checkpointing_gives_the_same_gradient(name, settings):
    unet = BY_NAME["sd"].build().unet
    unet.enable_gradient_checkpointing()
    if settings and not hasattr(unet.mid_block, "_gradient_checkpointing_func"):
        # The oldest diffusers holds no function that could be exchanged.
        with pytest.raises(ValueError, match="where T-GATE cannot reach them"):
            gradient(name, True, settings)
        return
    torch.testing.assert_close(gradient(name, True, settings), gradient(name, False, settings), rtol=1e-4, atol=1e-6)


def test_a_denoiser_that_is_checkpointed_as_a_whole_is_an_error_of_our_own():
    from tests.support.custom_loops import built

    class Whole(Trained):
        def denoise(self, x, t, text, pooled):
            def forward(x):
                return self.unet(x, t, encoder_hidden_states=text).sample

            return torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)

    case = BY_NAME["sd"]
    pipe = built("sd", Whole)

    def gradient(pipe):
        inputs = case.inputs([0])
        inputs["prompt_embeds"].requires_grad_()
        pipe(**inputs).images.square().mean().backward()
        return inputs["prompt_embeds"].grad

    plain = gradient(pipe)
    apply_tgate(pipe, GATE)
    with pytest.raises(ValueError, match="the whole denoiser is checkpointed"):
        gradient(pipe)
    # Another pipeline on the same denoiser is none of our business.
    assert torch.equal(gradient(around(pipe)), plain)
    assert torch.equal(gradient(remove_tgate(pipe)), plain)


def test_checkpoints_that_cannot_be_replayed_are_an_error_of_our_own():
    """Older versions of diffusers hold no function that could be exchanged."""
    from tests.support.custom_loops import built

    case = BY_NAME["sd"]
    pipe = built("sd", Trained)
    pipe.unet.enable_gradient_checkpointing()
    for module in pipe.unet.modules():
        vars(module).pop("_gradient_checkpointing_func", None)
    apply_tgate(pipe, GATE)
    with pytest.raises(ValueError, match="computes checkpointed blocks again where T-GATE cannot reach them"):
        case.run(pipe)
    pipe.unet.disable_gradient_checkpointing()
    assert case.run(pipe).isfinite().all()


def test_a_pipeline_with_deepcache_can_be_dropped():
    from DeepCache import DeepCacheSDHelper

    case = BY_NAME["sd"]
    base = case.build()
    pipe = around(base)
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    case.run(apply_tgate(pipe, GATE, deepcache=helper))
    del pipe, helper
    gc.collect()
    assert traces(base, case) == (0, 0)
