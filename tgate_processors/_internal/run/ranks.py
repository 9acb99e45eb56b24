"""Processes that share one denoiser decide alike: the largest error of all of them counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Agree = Callable[[torch.Tensor], torch.Tensor]


def agreement_of(denoisers: Sequence[torch.nn.Module]) -> Agree | None:
    """
    How processes agree on an error, where a call of these denoisers is one that all of them have to make.

    Args:
        denoisers (`Sequence` of `torch.nn.Module`): The denoisers of a pipeline.

    Returns:
        `Callable`, *optional*: Makes the largest error of all processes from that of each. `None` where each process
        has a denoiser of its own.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    groups = {group for denoiser in denoisers for mesh in _meshes_of(denoiser) for group in mesh.get_all_groups()}
    if not groups:
        return None
    # In one order on all of them.
    ordered = sorted(groups, key=torch.distributed.get_process_group_ranks)

    def agree(errors: torch.Tensor) -> torch.Tensor:
        # What is no number is above every tolerance.
        errors = errors.nan_to_num(nan=torch.inf)
        for group in ordered:
            torch.distributed.all_reduce(errors, torch.distributed.ReduceOp.MAX, group=group)
        return errors

    return agree


def _meshes_of(denoiser: torch.nn.Module) -> list[Any]:
    """The meshes of devices that share the weights of a denoiser, or its tokens."""
    config = getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None)
    found = [getattr(config, "_mesh", None), *(getattr(each, "device_mesh", None) for each in denoiser.parameters())]
    return [mesh for mesh in {id(mesh): mesh for mesh in found}.values() if mesh is not None]
