"""Processes that share one denoiser decide alike: the largest number of all of them counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


class Agreement:
    """
    Makes the largest numbers of all processes that share a denoiser from those of each.

    Args:
        groups (`Sequence` of `torch.distributed.ProcessGroup`):
            The groups of this process, one for each dimension of a mesh, in the same order in every process.

    Attributes:
        ranks (`int`): The processes that have agreed, 1 before they do.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        self._groups = groups
        self.ranks = 1

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the largest of each of these numbers, and wait for the other processes to give theirs."""
        # What is no number is above every tolerance.
        numbers = numbers.nan_to_num(nan=torch.inf)
        for group in self._groups:
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=group)
        sizes = math.prod(group.size() for group in self._groups)
        self.ranks = min(sizes, torch.distributed.get_world_size())
        return numbers


def agreement_of(denoisers: Sequence[torch.nn.Module]) -> Agreement | None:
    """
    How processes agree, where a call of these denoisers is one that all of them have to make.

    Args:
        denoisers (`Sequence` of `torch.nn.Module`): The denoisers of a pipeline.

    Returns:
        [`Agreement`], *optional*: `None` where each process has a denoiser of its own.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    # By dimension of the mesh, as only that order is the same in every process and reaches all of them.
    groups = [group for denoiser in denoisers for mesh in _meshes_of(denoiser) for group in mesh.get_all_groups()]
    distinct = {tuple(torch.distributed.get_process_group_ranks(group)): group for group in groups}
    shared = [group for ranks, group in distinct.items() if len(ranks) > 1]
    return Agreement(shared) if shared else None


def _meshes_of(denoiser: torch.nn.Module) -> list[Any]:
    """The meshes of devices that share the weights of a denoiser, or its tokens."""
    config = getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None)
    found = [getattr(config, "_mesh", None), *(getattr(each, "device_mesh", None) for each in denoiser.parameters())]
    return [mesh for mesh in {id(mesh): mesh for mesh in found}.values() if mesh is not None]
