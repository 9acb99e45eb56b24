"""MACs of one real call."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@contextlib.contextmanager
def counted_layers(denoiser: torch.nn.Module) -> Iterator[list[int]]:
    """Count the MACs of the denoiser's Linear and Conv layers, `layers` in `estimate_cost`; the sum is in `[0]`."""
    counter = FlopCounterMode(display=False)
    total = [0]

    def before(part: Any, args: Any) -> None:
        total[0] -= counter.get_total_flops() // 2

    def after(part: Any, args: Any, output: Any) -> None:
        total[0] += counter.get_total_flops() // 2

    layers = [part for part in denoiser.modules() if isinstance(part, LAYERS)]
    handles = [part.register_forward_pre_hook(before) for part in layers]
    handles += [part.register_forward_hook(after) for part in layers]
    try:
        with counter:
            yield total
    finally:
        for handle in handles:
            handle.remove()
