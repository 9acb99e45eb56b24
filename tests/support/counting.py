"""Which layers a denoiser has, and how often they run and on how much."""

from collections import defaultdict

import torch

from tgate_processors._internal.families import attention_modules


def samples_of(output):
    """All predictions in what a denoiser gives."""
    if torch.is_tensor(output):
        return [output]
    return [
        sample for part in (output.values() if hasattr(output, "values") else output) for sample in samples_of(part)
    ]


def keys_of(layer):
    """What makes the keys of a layer."""
    return next(
        getattr(layer, name) for name in ("to_k", "to_key", "to_kv", "to_qkv", "kv_linear") if hasattr(layer, name)
    )


def is_cross(kind, name):
    return kind.never not in name and name.removesuffix(".processor").endswith(kind.cross)


def layers(pipe, case, kind="attn2"):
    modules = attention_modules(getattr(pipe, case.denoiser))
    return {name.removesuffix(".processor"): layer for name, layer in modules.items() if kind in name}


def count(pipe, case):
    """Batch sizes that what makes the keys of every attention layer was given, and the denoiser's first layer."""
    denoiser, seen = getattr(pipe, case.denoiser), defaultdict(list)
    for name, module in denoiser.named_modules():
        if hasattr(module, "get_processor") and case.never not in name:
            keys_of(module).register_forward_pre_hook(lambda module, args, name=name: seen[name].append(len(args[0])))
    first = denoiser.get_submodule(case.first or ("conv_in" if hasattr(denoiser, "conv_in") else "pos_embed.proj"))
    first.register_forward_pre_hook(lambda module, args: seen["denoiser"].append(len(args[0])))
    return seen
