"""IP-Adapters: loaded, scaled and unloaded before and after T-GATE is applied."""

import pytest
import torch

from tests.zoo.addons import IMAGE_EMBEDDING, image_embeds, ip_adapter_weights, load_ip_adapter
from tests.zoo.case import slow, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report, remove_tgate
from tgate_processors._internal.families import attention_modules

GATE = 2
KINDS = {
    "plain": ("plain", (1, IMAGE_EMBEDDING)),
    "plus": ("plus", (1, 5, IMAGE_EMBEDDING)),
    "face_id": ("face_id", (1, IMAGE_EMBEDDING)),
}


def call(case, pipe, shape, prompts=(0,), **overrides):
    embeds = image_embeds(shape)(list(prompts), case.guidance > 1)
    return case.run(pipe, list(prompts), ip_adapter_image_embeds=embeds, **overrides)


def types(pipe):
    return [type(module.processor).__name__ for module in attention_modules(pipe.unet).values()]


@pytest.mark.parametrize("name", ["sd", slow("sdxl")])
@pytest.mark.parametrize(("kind", "shape"), KINDS.values(), ids=KINDS)
def test_loading_before_and_after_are_the_same(name, kind, shape):
    case = BY_NAME[name]
    before, after = load_ip_adapter(case.build(), kind), apply_tgate(case.build(), GATE)
    baseline = call(case, before, shape)
    plain = case.run(after)
    keys, loaded = list(before.unet.state_dict()), types(before)
    expected = call(case, apply_tgate(before, GATE), shape)
    load_ip_adapter(after, kind)
    assert list(after.unet.state_dict()) == keys
    assert torch.equal(call(case, after, shape), expected)
    assert list(after.unet.state_dict()) == keys
    for pipe in (before, after):
        remove_tgate(pipe)
        assert types(pipe) == loaded
        assert torch.equal(call(case, pipe, shape), baseline)
    before.unload_ip_adapter()
    assert torch.equal(case.run(apply_tgate(before, GATE)), plain)


@pytest.mark.parametrize("name", ["sd", thorough("sdxl")])
def test_unloading_with_tgate_on(name):
    case = BY_NAME[name]
    pipe = case.build()
    baseline, untouched = case.plain(), types(pipe)
    expected = case.gated(GATE)
    apply_tgate(pipe, GATE)
    load_ip_adapter(pipe, "plus")
    call(case, pipe, KINDS["plus"][1])
    pipe.unload_ip_adapter()
    assert torch.equal(case.run(pipe), expected)
    assert torch.equal(case.run(remove_tgate(pipe)), baseline)
    assert types(pipe) == untouched


SCALES = {
    "number": 0.3,
    "blocks": {"down": {"block_0": [0.0, 1.0]}, "up": {"block_1": [0.2, 0.9, 0.0]}},
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_scales_set_before_and_after_are_the_same(scale):
    case, shape = BY_NAME["sd"], KINDS["plain"][1]
    before, after = load_ip_adapter(case.build(), "plain"), load_ip_adapter(case.build(), "plain")
    other = call(case, apply_tgate(after, GATE), shape)
    after.set_ip_adapter_scale(scale)
    before.set_ip_adapter_scale(scale)
    baseline = call(case, before, shape)
    expected = call(case, apply_tgate(before, GATE), shape)
    assert not torch.equal(expected, other)
    assert torch.equal(call(case, after, shape), expected)
    assert torch.equal(call(case, remove_tgate(after), shape), baseline)


@pytest.mark.parametrize("half", ["unconditional", "conditional"])
def test_after_the_gate_the_image_of_one_half_goes_in_and_its_keys_are_not_computed(half):
    host = BY_NAME["two_ip_adapters"]
    pipe = apply_tgate(host.build(), GATE, cfg_half=half)
    images, keys = [], []
    pipe.unet.encoder_hid_proj.register_forward_pre_hook(lambda module, args: images.append(args[0]))
    for layer in attention_modules(pipe.unet).values():
        for to_k in getattr(layer.processor, "to_k_ip", []):
            to_k.register_forward_hook(lambda module, args, output: keys.append(len(output)))
    host.run(pipe)
    assert get_tgate_report(pipe).half_batch_forwards == 4
    assert [[len(image) for image in step] for step in images] == [[2, 2]] * 2 + [[1, 1]] * 4
    # The unconditional image is black.
    assert all(bool(image.any()) is (half == "conditional") for step in images[2:] for image in step)
    layers = sum("IPAdapter" in name for name in types(pipe))
    assert keys == [2] * 2 * 2 * layers
    assert layers > 2


def test_a_scale_that_changes_after_the_gate_has_no_effect():
    host = BY_NAME["ip_adapter"]
    pipe = apply_tgate(host.build(), GATE)
    expected = host.run(pipe)

    def change(at):
        def on_step_end(pipe, step, timestep, kwargs):
            pipe.set_ip_adapter_scale(0.1 if step == at else 0.7)
            return kwargs

        return on_step_end

    assert torch.equal(host.run(pipe, callback_on_step_end=change(GATE)), expected)
    assert not torch.equal(host.run(pipe, callback_on_step_end=change(0)), expected)


def test_an_adapter_loaded_between_two_steps_is_an_error_and_the_next_call_is_right():
    case, shape = BY_NAME["sd"], KINDS["plain"][1]
    expected = call(case, apply_tgate(load_ip_adapter(case.build(), "plain"), GATE), shape)
    pipe = apply_tgate(case.build(), GATE)

    def load(pipe, step, timestep, kwargs):
        if step == 2:
            load_ip_adapter(pipe, "plain")
        return kwargs

    with pytest.raises(RuntimeError, match="attention processors were replaced while the pipeline runs, down_"):
        case.run(pipe, callback_on_step_end=load)
    assert vars(pipe)["_tgate"].state.nbytes == 0
    assert torch.equal(call(case, pipe, shape), expected)


def test_the_weights_of_the_tests_are_those_that_diffusers_reads():
    weights = ip_adapter_weights(BY_NAME["sd"].build().unet, kind="plus")
    assert weights["image_proj"]["latents"].shape == (1, 4, 32)
    assert len(weights["ip_adapter"]) == 2 * sum("attn2" in key for key in BY_NAME["sd"].build().unet.attn_processors)
