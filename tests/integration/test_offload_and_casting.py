"""Offload, casting and device maps, in every order with T-GATE: the same pictures, and the hooks of others stay."""

import diffusers
import pytest
import torch
from diffusers.pipelines.pipeline_utils import SUPPORTED_DEVICE_MAP

from tests.support.offload import (
    device_map,
    group_offload_by_blocks,
    group_offload_by_leaves,
    group_offload_to_disk,
    layerwise_casting,
    model_offload,
    sequential_offload,
    skip_if_missing,
)
from tests.zoo.case import TIERS, slow
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, remove_tgate

WAYS = [
    model_offload,
    sequential_offload,
    group_offload_by_blocks,
    group_offload_by_leaves,
    group_offload_to_disk,
    layerwise_casting,
    device_map,
]


# The transformer runs in a fifth of the time.
QUICK = {"sd": (layerwise_casting,), "sdxl_controlnet": (), "pixart_alpha": WAYS}
EVERYWHERE = pytest.mark.parametrize(
    ("case", "place"),
    [
        pytest.param(
            name,
            way,
            id=f"{name}-{way.__name__}",
            marks=TIERS["default" if way in quick else "thorough" if quick == () else "slow"],
        )
        for name, quick in QUICK.items()
        for way in WAYS
    ],
    indirect=True,
)


@pytest.fixture
def place(request):
    skip_if_missing(request.param)
    return request.param


@pytest.fixture
def case(request):
    return BY_NAME[request.param]


def hooks_of_others(pipe):
    """What offload and casting have put into the modules."""
    return {
        (part, name, attribute): value
        for part, component in pipe.components.items()
        if isinstance(component, torch.nn.Module)
        for name, module in component.named_modules()
        for attribute in ("_hf_hook", "_diffusers_hook", "_old_forward")
        if (value := module.__dict__.get(attribute)) is not None
    }


def same(one, other):
    return one.keys() == other.keys() and all(value is other[key] for key, value in one.items())


def close(a, b):
    # Weights that were moved lie elsewhere, and some kernels add up in another order there.
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@EVERYWHERE
def test_placed_first(case, place, tmp_path):
    pipe = case.build()
    place(pipe, case, tmp_path)
    plain = case.run(pipe)
    apply_tgate(pipe, 3)
    gated = case.run(pipe)
    assert not torch.equal(gated, plain)
    close(case.run(pipe), gated)
    apply_tgate(pipe, 99)
    close(case.run(pipe), plain)
    hooks = hooks_of_others(pipe)
    assert hooks
    remove_tgate(pipe)
    assert same(hooks_of_others(pipe), hooks)
    close(case.run(pipe), plain)


@EVERYWHERE
def test_placed_between_two_calls_and_after_removal(case, place, tmp_path):
    pipe = case.build()
    place(pipe, case, tmp_path / "first")
    expected = case.run(apply_tgate(pipe, 3))
    plain = case.run(remove_tgate(pipe))
    pipe = apply_tgate(case.build(), 3)
    case.run(pipe)
    place(pipe, case, tmp_path / "second")
    for _ in range(2):
        close(case.run(pipe), expected)
    hooks = hooks_of_others(pipe)
    remove_tgate(pipe)
    assert same(hooks_of_others(pipe), hooks)
    close(case.run(pipe), plain)
    close(case.run(apply_tgate(pipe, 3)), expected)


@pytest.mark.parametrize("place", [model_offload, sequential_offload], ids=lambda way: way.__name__, indirect=True)
@pytest.mark.parametrize("case", ["sd", slow("sdxl_controlnet"), "pixart_alpha"], indirect=True)
def test_undone_while_applied(case, place, tmp_path):
    pipe = case.build()
    expected = case.gated(3)
    apply_tgate(pipe, 3)
    place(pipe, case, tmp_path)
    close(case.run(pipe), expected)
    pipe.remove_all_hooks()
    assert not hooks_of_others(pipe)
    close(case.run(pipe), expected)


def test_skipped_layers_are_not_moved(tmp_path):
    case = BY_NAME["sd"]
    pipe = case.build()
    sequential_offload(pipe, case, tmp_path)
    moved = []
    for name, module in pipe.unet.named_modules():
        if ".attn2." in name and hasattr(module, "_hf_hook"):
            hook = module._hf_hook
            hook.pre_forward = lambda *args, before=hook.pre_forward, **kwargs: (
                moved.append(1) or before(*args, **kwargs)
            )
    case.run(pipe)
    plain = len(moved)
    case.run(apply_tgate(pipe, 3))
    assert 0 < len(moved) - plain == plain // 2


@pytest.mark.skipif("cpu" not in SUPPORTED_DEVICE_MAP, reason="this diffusers maps to accelerators only")
def test_a_pipeline_loaded_with_a_device_map(tmp_path):
    case = BY_NAME["sd"]
    folder = tmp_path / "pipe"
    case.build().save_pretrained(folder)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, device_map="cpu", **absent)
    pipe.set_progress_bar_config(disable=True)
    expected = case.gated(3)
    close(case.run(apply_tgate(pipe, 3)), expected)
    plain = case.run(remove_tgate(pipe))
    pipe.reset_device_map()
    close(case.run(apply_tgate(pipe, 3)), expected)
    close(case.run(remove_tgate(pipe)), plain)


def test_two_pipelines_share_a_placed_denoiser(tmp_path):
    case = BY_NAME["sd"]
    pipe = case.build()
    model_offload(pipe, case, tmp_path)
    plain = case.run(pipe)
    sibling = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)
    apply_tgate(sibling, 3)
    assert not torch.equal(case.run(sibling), plain)
    close(case.run(pipe), plain)
