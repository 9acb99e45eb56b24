"""The published implementation's latents, where it is right."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from tests.support.settings import apply_settings
from tests.zoo.core import GOLDEN, load_golden

GOLDEN_CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
LATENTS = load_file(GOLDEN / "latents.safetensors")
INPUTS = load_file(GOLDEN / "inputs.safetensors")


def build(case):
    """The pipeline of a golden case, with its DeepCache helper if it has one."""
    pipe = load_golden(case["pipe"], case["pipeline_class"])
    if case["scheduler"]:
        scheduler = getattr(diffusers, case["scheduler"]["class"])
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **case["scheduler"]["config"])
    if not case["deepcache"]:
        return pipe, None
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe)
    helper.set_params(**case["deepcache"])
    return pipe, helper


def call(pipe, case):
    """Latents of the call of a golden case."""
    group = case["inputs"] + "/"
    tensors = {name.removeprefix(group): value for name, value in INPUTS.items() if name.startswith(group)}
    copies = case["call"].get("num_images_per_prompt", 1)
    tensors["latents"] = torch.cat(
        [torch.stack([x.roll(shift, -1) for shift in range(copies)]) for x in tensors["latents"]]
    )
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in case["call"].items()}
    seed = case["generator_seed"]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return pipe(**settings, **tensors, generator=generator, output_type="latent").images


def trace(pipe):
    """`[batch, cross-attentions, self-attentions]` computed in every denoiser call to come, seen from outside."""
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    calls = []

    def counted(index):
        def hook(module, args, output):
            calls[-1][index] += 1

        return hook

    denoiser.register_forward_pre_hook(lambda module, args: calls.append([None, 0, 0]))
    for name, module in denoiser.named_modules():
        if name.endswith(("attn1", "attn2")):
            module.to_q.register_forward_hook(counted(1 if name.endswith("attn2") else 2))
    # The first layer sees the batch that is really computed.
    next(denoiser.children()).register_forward_pre_hook(lambda module, args: calls[-1].__setitem__(0, len(args[0])))
    return calls


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case["id"])
def test_latents_and_where_attention_runs_are_those_of_the_published_implementation(case):
    pipe, helper = build(case)
    calls = trace(apply_settings(pipe, **case["tgate"], deepcache=helper))
    ours, golden = call(pipe, case), LATENTS[case["id"]]
    assert (ours - golden).abs().max() / golden.abs().max() < 1e-4
    assert calls == case["trace"]
