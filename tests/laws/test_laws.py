"""What holds for every supported pipeline."""

import copy
import gc
import weakref

import pytest
import torch

from tests.support.comparing import Stop, assert_same_but_for_rounding, distance
from tests.support.counting import is_cross, keys_of
from tests.support.settings import EVERY, FIXED, PATIENT, apply_settings
from tests.support.states import assert_same, check_restored, snapshot
from tests.zoo.addons import HOSTS
from tests.zoo.case import STEPS, Case, rows
from tests.zoo.catalogue import ALL, BY_NAME, MOST
from tests.zoo.core import CASES
from tgate_processors import apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate
from tgate_processors._internal.families import attention_modules

GATE = 3
DROP = {"gate_step": GATE}
# One of each kind.
FEW = {"sd", "pixart_alpha", "svd", "sd_controlnet", "lcm", "sd3", "wan"}
# What is built around another denoiser has batches of its own, and most others have not.
BATCHES = {case.name for case in [*CASES, *HOSTS] if case.tier == "default"} | {"sana", "wan"}
# What depends on the way of installing more than on the pipeline.
installed = pytest.mark.parametrize("case", rows(CASES, default={"sd", "pixart_alpha", "svd", "sd_controlnet"}))
V2 = {"gate_step": 4, "sp_interval": 2, "fi_interval": 2, "warm_up": 1}


@pytest.mark.parametrize("case", rows(ALL, default=MOST))
def test_apply_and_remove_change_nothing_else_and_two_calls_agree(case: Case):
    pipe = case.build()
    baseline, before = case.run(pipe), snapshot(pipe, case)
    keys = [list(part.state_dict()) for part in case.denoisers(pipe).values()]
    assert case.gate(pipe, GATE) is pipe
    assert is_tgate_applied(pipe)
    assert [list(part.state_dict()) for part in case.denoisers(pipe).values()] == keys
    assert remove_tgate(pipe) is pipe
    assert_same(before, snapshot(pipe, case))
    case.gate(pipe, GATE)
    gated = case.run(pipe)
    assert not torch.equal(gated, baseline)
    assert torch.equal(case.run(pipe), gated)
    remove_tgate(pipe)
    assert not is_tgate_applied(pipe)
    check_restored(before, snapshot(pipe, case), case)
    assert torch.equal(case.run(pipe), baseline)


@pytest.mark.parametrize("case", rows(ALL, default=FEW, others="slow"))
def test_full_steps_alone_change_no_bit(case: Case):
    pipe, baseline = case.build(), case.plain()
    # Where guidance is two calls, cross-attention is left out by default.
    ways = [{}, {"cross_attention": None}] if case.calls == 2 and case.way["cross_attention"] else [{}]
    for settings in ({"gate_step": STEPS}, *(EVERY if case.is_guided else ())):
        for way in ways:
            assert torch.equal(case.run(case.gate(pipe, **settings, **way)), baseline)
            report = get_tgate_report(pipe)
            assert report.half_batch_forwards == report.cross_attention_reused == 0
            assert report.full_steps == tuple(range(report.num_inference_steps))


@pytest.mark.parametrize("case", rows([case for case in ALL if case.batches], default=BATCHES))
def test_a_batch_of_two_prompts_equals_two_singles(case: Case):
    rounding = distance(case.plain([0, 1]), torch.cat([case.plain([0]), case.plain([1])]))
    assert rounding < 1e-4
    pipe = case.build()
    for settings in (V2 if case.reuses else DROP, *([FIXED] if case.is_guided else ())):
        case.gate(pipe, **settings)
        singles = torch.cat([case.run(pipe, [0]), case.run(pipe, [1])])
        # Guidance passes a difference on five times as large. Prompts that mix are off by a tenth.
        assert distance(case.run(pipe, [0, 1]), singles) < 5e-5 + 5 * rounding


def breaks(case, settings, error, place):
    """A run that breaks where a layer runs for the n-th time leaves nothing to the next one, nor to a plain one."""
    pipe, baseline = case.build(), case.plain()
    expected = case.run(case.gate(pipe, **settings))
    calls, runs = [], []

    def fail(module, args):
        calls.append(1)
        runs.append(vars(pipe)["_tgate"].state.current())
        if len(calls) == place:
            raise error("broken")

    for last in (False, True):
        calls.clear()
        handles = [inner_layer(case, part).register_forward_pre_hook(fail) for part in case.denoisers(pipe).values()]
        with pytest.raises(error, match="broken"):
            case.run(pipe)
        for handle in handles:
            handle.remove()
        assert runs[-1].nbytes == vars(pipe)["_tgate"].state.nbytes == 0
        assert not any("_compiled_call_impl" in vars(part) for part in case.denoisers(pipe).values())
        assert torch.equal(case.run(remove_tgate(pipe) if last else pipe), baseline if last else expected)


def inner_layer(case, denoiser):
    """A layer that runs in every step: inside self-attention, if there is some that is looked at."""
    own = [layer for name, layer in attention_modules(denoiser).items() if not is_cross(case, name)]
    # The last one may be that of a sound which is not made, where guidance is two calls.
    return keys_of(own[0 if case.calls == 2 else -1]) if own and case.reuses else denoiser.get_submodule(case.first)


# The places are those of a full step and of a half step, or of a call in each.
@pytest.mark.parametrize("case", rows([case for case in ALL if case not in HOSTS], default=FEW))
def test_a_run_that_breaks_leaves_nothing(case: Case):
    for place in (2, 7) if case.calls == 2 else (GATE, GATE + 1):
        breaks(case, FIXED if case.is_guided else DROP, torch.OutOfMemoryError, place)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize(("settings", "place"), [(DROP, 1), (DROP, GATE), (DROP, GATE + 1), (PATIENT, 2), (PATIENT, 5)])
def test_a_run_that_breaks_by_any_error_in_any_forward_leaves_nothing(error, settings, place):
    breaks(BY_NAME["pixart_alpha"], settings, error, place)


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


def test_no_output_of_an_attention_layer_outlives_the_call(case: Case):
    pipe = apply_settings(case.build(), **V2)
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
        lambda module, args, output: kept.update(
            each.tensor.dtype for each in state.current().attention_cache.cached.values()
        )
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
