"""MACs of one real call."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@contextlib.contextmanager
def counted_layers(denoiser: torch.nn.Module) -> Iterator[list[int]]:
    """
    Count the MACs of the denoiser's Linear and Conv layers, `layers` in `estimate_cost`; the sum is in `[0]`.

    It goes by the shape of each layer's output: `FlopCounterMode`, which `estimate_cost` counts with, makes a real run
    many times slower. The tests compare the two.
    """
    total = [0]

    def after(part: Any, args: Any, output: torch.Tensor) -> None:
        each = part.in_features if isinstance(part, torch.nn.Linear) else part.weight[0].numel()
        total[0] += output.numel() * each

    layers = [part for part in denoiser.modules() if isinstance(part, (torch.nn.Linear, *CONVOLUTIONS))]
    handles = [part.register_forward_hook(after) for part in layers]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()
