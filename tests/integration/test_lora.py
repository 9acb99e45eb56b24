"""LoRAs through PEFT: whatever is done to them, before or after T-GATE is applied, gives the same pictures."""

import inspect

import diffusers
import pytest
import torch

from tests.support.comparing import distance
from tests.zoo.addons import load_lora, lora, text_encoder
from tests.zoo.case import thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, remove_tgate

GATE = 2


def load(pipe):
    load_lora(pipe, first=0)


def load_with_text_encoder(pipe):
    # Without one, diffusers cannot scale.
    pipe.register_modules(text_encoder=text_encoder())
    load(pipe)


def load_two(pipe):
    load_lora(pipe, first=0, second=1)
    pipe.set_adapters(["first", "second"], [0.8, 0.4])


def fuse(pipe):
    load(pipe)
    pipe.fuse_lora(lora_scale=0.7)


def unfuse(pipe):
    fuse(pipe)
    pipe.unfuse_lora()


def disable(pipe):
    load(pipe)
    pipe.disable_lora()


def delete(pipe):
    load_two(pipe)
    pipe.delete_adapters("second")


def unload(pipe):
    load(pipe)
    pipe.unload_lora_weights()


def swap(pipe):
    load(pipe)
    pipe.load_lora_weights(lora(pipe.unet, 5), adapter_name="first", hotswap=True)


HOTSWAP = "hotswap" in inspect.signature(diffusers.StableDiffusionPipeline.load_lora_into_unet).parameters
DEEDS = {
    "load": (load, {}),
    "scale": (load_with_text_encoder, {"cross_attention_kwargs": {"scale": 0.5}}),
    "two": (load_two, {}),
    "fuse": (fuse, {}),
    "unfuse": (unfuse, {}),
    "disable": (disable, {}),
    "delete": (delete, {}),
    "unload": (unload, {}),
}
if HOTSWAP:
    DEEDS["hotswap"] = (swap, {})


# What is undone, deleted or exchanged was loaded.
PARTS = ("load", "two", "unfuse", "disable", "delete", "hotswap")
ROWS = [pytest.param(*row, id=deed, marks=[pytest.mark.slow] if deed in PARTS else []) for deed, row in DEEDS.items()]


@pytest.mark.parametrize("name", ["sd", thorough("sdxl")])
@pytest.mark.parametrize(("deed", "arguments"), ROWS)
def test_before_and_after_are_the_same(name, deed, arguments):
    case = BY_NAME[name]
    before, after = case.build(), case.build()
    untouched = case.run(apply_tgate(after, GATE))
    deed(before)
    baseline = case.run(before, **arguments)
    expected = case.run(apply_tgate(before, GATE), **arguments)
    deed(after)
    assert torch.equal(case.run(after, **arguments), expected)
    # Bits differ by themselves once PEFT has been there.
    assert (distance(expected, untouched) < 1e-5) is (deed in (disable, unload))
    for pipe in (before, after):
        assert torch.equal(case.run(remove_tgate(pipe), **arguments), baseline)
        assert not any("TGate" in type(processor).__name__ for processor in pipe.unet.attn_processors.values())


@pytest.mark.parametrize("deed", [load, fuse, swap] if HOTSWAP else [load, fuse])
def test_removal_before_the_lora_leaves(deed):
    case = BY_NAME["sd"]
    pipe = case.build()
    baseline = case.plain()
    apply_tgate(pipe, GATE)
    deed(pipe)
    case.run(pipe)
    remove_tgate(pipe)
    if deed is fuse:
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert distance(case.run(pipe), baseline) < 1e-4
    assert list(pipe.unet.state_dict()) == list(case.build().unet.state_dict())
