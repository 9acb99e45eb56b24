"""What a real run takes, counted operation by operation."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.zoo.case import SIZE
from tests.zoo.cross_attention import TOKENS
from tgate_processors import MACs


class Inside:
    """Whether a module runs."""

    def __init__(self, module):
        super().__init__()
        self.macs, self.inside = 0, False
        module.register_forward_pre_hook(lambda module, args: setattr(self, "inside", True))
        module.register_forward_hook(lambda module, args, output: setattr(self, "inside", False))


class Layers(Inside, TorchDispatchMode):
    """Counts in a module what `FlopCounterMode` counts, by its formulas, but not for each part of it: in less time."""

    linear = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if self.inside and (count := flop_registry.get(function._overloadpacket)):
            # Linear attention alone multiplies by itself.
            assert "bmm" not in str(function) or self.linear
            assert "attention" not in str(function)
            self.macs += count(*args, **(kwargs or {}), out_val=output) // 2
        return output


class Products(Inside, TorchFunctionMode):
    """Counts attention's two products in a module, by the shapes of queries, keys and values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.inside and function is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3] if args else (kwargs[name] for name in ("query", "key", "value"))
            self.macs += query[..., 0].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])
        if self.inside and function is torch.nn.functional.multi_head_attention_forward:
            query, key = args[:2]
            self.macs += 2 * query.numel() * key.shape[0]
        return function(*args, **(kwargs or {}))


def taken(pipe, case, prompts, linear=False, **call):
    """MACs of a real run. On the CPU torch counts attention's products as nothing."""
    denoiser = getattr(pipe, case.denoiser)
    with Layers(denoiser) as layers, Products(denoiser) as products:
        layers.linear = linear
        case.run(pipe, prompts, **call)
    return MACs(layers.macs, products.macs)


def sizes(case):
    """The arguments of `estimate_cost` that a case's inputs are as large as."""
    if case.video:
        return dict(case.extra)
    tokens = case.conditioning([0], False)["prompt_embeds"].shape[1]
    return {"height": SIZE, "width": SIZE, "max_sequence_length": tokens}


# What the configuration does not say, as arguments of `estimate_cost`.
COSTS = {
    **{name: {"max_sequence_length": TOKENS} for name in ("sana", "sana_sprint", "ltx", "allegro", "stable_audio")},
    **{name: {"max_sequence_length": TOKENS} for name in ("kandinsky3", "lumina", "picture_video")},
    "sana_video": {"max_sequence_length": TOKENS, "num_frames": 5},
    "audioldm2": {"max_sequence_length": TOKENS, "height": 64, "width": 16},
    "latte": {"max_sequence_length": TOKENS, "num_frames": 2},
    "ltx2": {"max_sequence_length": TOKENS, "extra_forwards": []},
    "any_flow": {"max_sequence_length": TOKENS},
    "text_to_video": {"max_sequence_length": TOKENS},
    "controlnet_xs": {"max_sequence_length": TOKENS, "height": SIZE, "width": SIZE},
    "controlnet_xs_xl": {"max_sequence_length": TOKENS, "height": SIZE, "width": SIZE},
    "stable_audio3": {"max_sequence_length": TOKENS, "num_frames": 8},
    "ace_step": {"max_sequence_length": 150, "num_frames": 8},
    "hunyuan": {},
}
COUNTED = {"max_sequence_length": TOKENS, "batch_size": 2}
