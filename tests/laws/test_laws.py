"""What holds for every supported pipeline."""

import copy
import gc
import weakref

import pytest
import torch

from tests.support.comparing import Stop, assert_same_but_for_rounding, distance
from tests.support.states import assert_same, snapshot
from tests.zoo.core import BY_NAME, CASES, STEPS, Case, rows
from tgate_processors import apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate
from tgate_processors._internal.families import attention_modules

GATE = 3
# What depends on the way of installing more than on the pipeline.
installed = pytest.mark.parametrize("case", rows(CASES, default={"sd", "pixart_alpha", "svd", "sd_controlnet"}))
V2 = {"gate_step": 4, "sp_interval": 2, "fi_interval": 2, "warm_up": 1}


def test_remove_restores_every_object_and_the_picture(case: Case):
    pipe = case.build()
    baseline = case.run(pipe)
    before = snapshot(pipe, case)
    assert apply_tgate(pipe, GATE) is pipe
    assert is_tgate_applied(pipe)
    gated = case.run(pipe)
    assert not torch.equal(gated, baseline)
    assert remove_tgate(pipe) is pipe
    assert not is_tgate_applied(pipe)
    after = snapshot(pipe, case)
    if case.video:
        # The pipeline's own: a tensor made anew in every call.
        assert before["pipe"].pop("_guidance_scale") is not after["pipe"].pop("_guidance_scale")
    assert_same(before, after)
    assert torch.equal(case.run(pipe), baseline)


def test_a_gate_beyond_the_last_step_changes_no_bit_and_warns_once(case: Case, caplog):
    pipe = case.build()
    baseline = case.plain()
    gate_step = 99 if case.name == "sdxl" else STEPS
    apply_tgate(pipe, gate_step)
    assert torch.equal(case.run(pipe), baseline)
    assert torch.equal(case.run(pipe), baseline)
    steps = get_tgate_report(pipe).num_inference_steps
    (message,) = [record.message for record in caplog.records if "tgate" in record.name]
    assert message.startswith(f"T-GATE: gate_step={gate_step} is not before the last of the {steps} steps that run: ")


def test_two_calls_agree(case: Case):
    pipe = apply_tgate(case.build(), **V2)
    assert torch.equal(case.run(pipe), case.run(pipe))


def test_a_batch_of_two_prompts_equals_two_singles(case: Case):
    # SDXL's inpainting is off by 1.7e-5 by itself.
    rounding = distance(case.plain([0, 1]), torch.cat([case.plain([0]), case.plain([1])]))
    pipe = case.build()
    for settings in (V2, {"gate_step": GATE}) if case.name in ("sd", "sdxl", "pixart_alpha", "svd") else (V2,):
        apply_tgate(pipe, **settings)
        singles = torch.cat([case.run(pipe, [0]), case.run(pipe, [1])])
        assert distance(case.run(pipe, [0, 1]), singles) < 1e-5 + 2 * rounding


def test_two_images_per_prompt_equal_one_prompt_given_twice(case: Case):
    pipe = case.build()

    def deviations():
        def run(prompts, **overrides):
            return case.run(pipe, prompts, generator=[torch.Generator().manual_seed(s) for s in (1, 2)], **overrides)

        return [distance(*pair) for pair in zip(run([0], **{case.num_images: 2}), run([0, 0]), strict=True)]

    # Inpainting and SVD draw the noise of a given image from the first generator only, so the second image differs.
    comparable = [index for index, value in enumerate(deviations()) if value < 1e-4]
    assert 0 in comparable
    apply_tgate(pipe, GATE)
    assert all(deviations()[index] < 3e-5 for index in comparable)
    assert get_tgate_report(pipe).cross_attention_reused > 0


@pytest.mark.parametrize("prompts", [[0], [0, 1]], ids=["one", "two"])
def test_without_guidance_nothing_is_averaged_or_halved(case: Case, prompts):
    pipe = apply_tgate(case.build(), GATE)
    off = 1.0 if case.name != "lcm" else case.guidance
    denoiser = getattr(pipe, case.denoiser)
    batches, runs = [], []
    denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    layers = [module for name, module in denoiser.named_modules() if name.endswith("attn2")]
    for layer in layers:
        layer.to_k.register_forward_hook(lambda module, args, output: runs.append(1))
    latents = case.run(pipe, prompts, guidance_scale=off)
    assert set(batches) == {len(prompts)}
    assert len(runs) == GATE * len(layers)
    assert get_tgate_report(pipe).half_batch_forwards == 0
    singles = torch.cat([case.gated(GATE, [prompt], {"guidance_scale": off}) for prompt in prompts])
    assert distance(latents, singles) < 3e-5


@installed
def test_two_pipelines_of_a_class_are_independent(case: Case):
    plain, gated = case.build(), case.build()
    baseline = case.plain()
    apply_tgate(gated, GATE)
    first = case.run(gated)
    assert torch.equal(case.run(plain), baseline)
    assert not is_tgate_applied(plain)
    other = apply_tgate(case.build(), 1)
    case.run(other)
    assert torch.equal(case.run(gated), first)
    remove_tgate(other)
    assert torch.equal(case.run(gated), first)


@installed
def test_apply_twice_replaces_and_one_removal_is_enough(case: Case):
    pipe = apply_tgate(case.build(), GATE)
    baseline, expected = case.plain(), case.gated(GATE)
    processors = {name: module.processor for name, module in attention_modules(getattr(pipe, case.denoiser)).items()}
    apply_tgate(pipe, 1)
    assert not torch.equal(case.run(pipe), expected)
    apply_tgate(pipe, GATE)
    assert torch.equal(case.run(pipe), expected)
    for name, module in attention_modules(getattr(pipe, case.denoiser)).items():
        assert module.processor.original is processors[name].original
    remove_tgate(pipe)
    assert torch.equal(case.run(pipe), baseline)
    assert remove_tgate(pipe) is pipe


def check_break(case, error, forward):
    pipe = apply_tgate(case.build(), GATE)
    baseline, expected = case.plain(), case.gated(GATE)
    # Inside an attention layer that runs in every step.
    modules = attention_modules(getattr(pipe, case.denoiser))
    layer = [module for name, module in modules.items() if "attn1" in name][-1].to_q
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == forward:
            raise error("broken")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(error, match="broken"):
        case.run(pipe)
    handle.remove()
    assert vars(pipe)["_tgate"].state.nbytes == 0
    assert torch.equal(case.run(pipe), expected)
    handle = layer.register_forward_pre_hook(lambda module, args: fail(module, args))
    calls.clear()
    with pytest.raises(error, match="broken"):
        case.run(pipe)
    handle.remove()
    assert torch.equal(case.run(remove_tgate(pipe)), baseline)


def test_a_run_that_breaks_leaves_nothing(case: Case):
    check_break(case, torch.OutOfMemoryError, GATE + 1)


@pytest.mark.parametrize("name", ["sd", "pixart_alpha"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("forward", [1, GATE, GATE + 1])
def test_a_run_that_breaks_by_any_error_in_any_forward_leaves_nothing(name, error, forward):
    check_break(BY_NAME[name], error, forward)


def test_no_output_of_an_attention_layer_outlives_the_call(case: Case):
    pipe = apply_tgate(case.build(), **V2)
    outputs = []
    for module in attention_modules(getattr(pipe, case.denoiser)).values():
        module.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    latents = case.run(pipe)
    gc.collect()
    assert latents.isfinite().all()
    assert len(outputs) > 0
    assert not any(output() is not None for output in outputs)
    assert get_tgate_report(pipe).peak_bytes > 0


def test_nothing_is_held_before_the_gate_and_one_half_afterwards(case: Case):
    pipe = apply_tgate(case.build(), GATE)
    state = vars(pipe)["_tgate"].state
    held = []
    sizes = {}
    denoiser = getattr(pipe, case.denoiser)
    denoiser.register_forward_hook(lambda module, args, output: held.append(state.nbytes))
    for name, module in attention_modules(denoiser).items():
        if "attn2" in name:
            module.register_forward_hook(lambda module, args, output, name=name: sizes.setdefault(name, output.nbytes))
    case.run(pipe)
    guided = get_tgate_report(pipe).half_batch_forwards > 0
    expected = sum(sizes.values()) // (2 if guided else 1)
    # The last step ends with the loop, which lets go of everything; the hook of a legacy pipeline's clock runs first.
    assert held[: GATE - 1] == [0] * (GATE - 1)
    assert set(held[GATE - 1 : -1]) == {expected}
    assert get_tgate_report(pipe).peak_bytes == expected


DTYPES = [pytest.param(*row.values, torch.float16, marks=row.marks, id=row.id) for row in rows(CASES)]
DTYPES += [pytest.param(BY_NAME[name], torch.bfloat16, id=f"{name}-bfloat16") for name in ("sd", "svd")]


@pytest.mark.parametrize(("case", "dtype"), DTYPES)
def test_half_precision_stays(case, dtype):
    pipe = case.build().to(dtype)
    inputs = case.inputs([0])
    inputs = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    if (case.name, dtype) == ("svd", torch.bfloat16):
        try:
            pipe(**inputs)
        except RuntimeError:
            # diffusers 0.32 runs SVD in float16 only.
            return
    # SDXL with ControlNet and inpainting ends in float32 by itself.
    expected = pipe(**inputs)[0].dtype if case.name == "sdxl_controlnet_inpaint" else dtype
    inputs["generator"] = case.inputs([0])["generator"]
    apply_tgate(pipe, GATE)
    kept = set()
    state = vars(pipe)["_tgate"].state
    getattr(pipe, case.denoiser).register_forward_hook(
        lambda module, args, output: kept.update(each.tensor.dtype for each in state.current().cached_outputs.values())
    )
    output = pipe(**inputs)
    latents = output.frames if case.video else output.images
    assert latents.dtype is expected
    assert kept == {dtype}
    assert latents.isfinite().all()


@installed
def test_saving_and_loading_with_tgate_on(case: Case, tmp_path):
    pipe = case.build()
    baseline = case.plain()
    apply_tgate(pipe, GATE)
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, component in pipe.components.items() if component is None}
    loaded = type(pipe).__mro__[1].from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert not is_tgate_applied(loaded)
    assert_same_but_for_rounding(case.run(loaded), baseline)


@installed
def test_a_deep_copy_is_gated_on_its_own(case: Case):
    pipe = case.build()
    baseline = case.plain()
    expected = case.run(apply_tgate(pipe, GATE))
    copied = copy.deepcopy(pipe)
    assert is_tgate_applied(copied)
    assert_same_but_for_rounding(case.run(copied), expected)
    remove_tgate(copied)
    assert_same_but_for_rounding(case.run(copied), baseline)
    assert torch.equal(case.run(pipe), expected)
    assert torch.equal(case.run(remove_tgate(pipe)), baseline)


@installed
def test_a_sibling_from_the_same_components_runs_as_without_tgate(case: Case):
    pipe = apply_tgate(case.build(), GATE)
    baseline, expected = case.plain(), case.gated(GATE)
    sibling = type(pipe).__mro__[1].from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    assert getattr(sibling, case.denoiser) is getattr(pipe, case.denoiser)
    assert not is_tgate_applied(sibling)
    for _ in range(2):
        assert torch.equal(case.run(sibling), baseline)
        assert torch.equal(case.run(pipe), expected)
    remove_tgate(sibling)
    assert torch.equal(case.run(pipe), expected)


def test_siblings_gated_differently_are_removed_in_any_order():
    case = BY_NAME["sd"]
    first = case.build()
    baseline = case.run(first)
    second = type(first).from_pipe(first)
    second.set_progress_bar_config(disable=True)
    at_three = case.run(apply_tgate(first, GATE))
    at_one = case.run(apply_tgate(second, 1))
    assert torch.equal(case.run(first), at_three)
    remove_tgate(first)
    assert torch.equal(case.run(second), at_one)
    assert torch.equal(case.run(first), baseline)
    remove_tgate(second)
    assert torch.equal(case.run(second), baseline)
    assert not any("TGate" in type(p).__name__ for p in first.unet.attn_processors.values())


def test_the_class_of_a_gated_pipeline_passes_for_the_original():
    import inspect

    pipe = BY_NAME["sd"].build()
    original = type(pipe)
    signature = inspect.signature(pipe.__call__)
    apply_tgate(pipe)
    assert isinstance(pipe, original)
    gated = type(pipe)
    assert (gated.__name__, gated.__qualname__, gated.__module__) == (
        original.__name__,
        original.__qualname__,
        original.__module__,
    )
    assert inspect.signature(pipe.__call__) == signature
    assert pipe.__call__.__doc__ == original.__call__.__doc__
    assert "tensor(" not in repr(vars(pipe)["_tgate"].state)
