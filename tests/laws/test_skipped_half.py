"""After the gate nothing of the half that is dropped is computed, and no key or value of the text for the other."""

import pytest
import torch

from tests.zoo.case import slow
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report

GATE, STEPS = 3, 6
# By what is conditioned on: text, sizes and pooled text, masks, pictures, control, boxes, adapters.
NAMES = [
    "sd",
    "sdxl",
    "pixart_alpha",
    "svd",
    "sd_controlnet",
    slow("sd_multi_controlnet_img2img"),
    slow("sdxl_controlnet"),
    "union",
    "adapter",
    "ip_adapter",
    "sdxl_ip_adapter_plus",
    "gligen",
    "kolors",
    "animatediff",
]


@pytest.fixture(params=NAMES)
def case(request):
    return BY_NAME[request.param]


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


class Rows:
    """How many rows every module works on, forward by forward of the denoiser."""

    def __init__(self, pipe, case):
        self.forwards = [{}]
        self.denoiser = getattr(pipe, case.denoiser)
        controlnet = getattr(pipe, "controlnet", None)
        for part, prefix in ((self.denoiser, "denoiser"), (controlnet, "controlnet")):
            if isinstance(part, torch.nn.Module):
                for name, module in part.named_modules():
                    if not list(module.children()) and list(module.parameters(recurse=False)):
                        self.watch(module, f"{prefix}.{name}")
        # A forward ends with the last layer; the control of the next one comes after it.
        self.denoiser.register_forward_hook(lambda module, args, output: self.forwards.append({}))

    def watch(self, module, name):
        def hook(module, args, kwargs, output):
            rows = sum(tensor.numel() // max(1, tensor.shape[-1]) for tensor in tensors_in((args, kwargs)))
            self.forwards[-1][name] = self.forwards[-1].get(name, 0) + rows

        module.register_forward_hook(hook, with_kwargs=True)

    def take(self):
        taken, self.forwards = self.forwards[:-1], [{}]
        return taken


def is_of_cross_attention(name):
    """Not that of a ControlNet, which goes on at half batch, and not the second self-attention of a motion module."""
    return name.startswith("denoiser") and ".attn2." in name and "motion_modules" not in name


def test_every_layer_works_on_half_the_rows_and_none_on_the_keys_and_values_of_the_text(case):
    pipe = case.build()
    rows = Rows(pipe, case)
    case.run(pipe)
    plain = rows.take()
    apply_tgate(pipe, GATE)
    case.run(pipe)
    gated = rows.take()
    assert len(plain) == len(gated) == STEPS
    assert get_tgate_report(pipe).half_batch_forwards == STEPS - GATE
    assert gated[:GATE] == plain[:GATE]
    for before, after in zip(plain[GATE:], gated[GATE:], strict=True):
        # An IP-Adapter's resampler attends to the picture, and nobody reads what it gives any more.
        skipped = {name for name in before.keys() - after.keys() if "image_projection_layers" not in name}
        assert skipped
        assert skipped == {name for name in before if is_of_cross_attention(name)}
        assert after.keys() <= before.keys()
        assert {name for name in after if 2 * after[name] != before[name]} == set()
