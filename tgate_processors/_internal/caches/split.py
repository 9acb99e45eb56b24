"""The halves of cached values: tensors, their shapes, and containers of them."""

from __future__ import annotations

from typing import Any

import torch


def split_halves(value: Any, active_half: int) -> tuple[Any, Any]:
    """
    Split a cached value of a whole batch into its halves, in the first dimension.

    Args:
        value (`Any`): Tensors and shapes, in tuples, lists and dicts. What is none of these belongs to both halves.
        active_half (`int`): The half that runs, 0 or 1.

    Returns:
        `tuple`: The active half and the other one, in new tensors.

    Raises:
        ValueError: If a tensor has no halves.
    """
    if isinstance(value, torch.Tensor) and value.dim():
        _check_rows(len(value))
        # Copies, as a view would hold the memory of both.
        halves = [half.clone() for half in value.chunk(2)]
        return halves[active_half], halves[1 - active_half]
    if isinstance(value, torch.Size):
        _check_rows(value[0])
        half = torch.Size((value[0] // 2, *value[1:]))
        return half, half
    if isinstance(value, dict):
        parts = {key: split_halves(item, active_half) for key, item in value.items()}
        return {key: part[0] for key, part in parts.items()}, {key: part[1] for key, part in parts.items()}
    if isinstance(value, (list, tuple)):
        items = [split_halves(item, active_half) for item in value]
        return type(value)(item[0] for item in items), type(value)(item[1] for item in items)
    return value, value


def join_halves(active: Any, stashed: Any, active_half: int) -> Any:
    """The inverse of `split_halves`."""
    if isinstance(active, torch.Tensor) and active.dim():
        return torch.cat([active, stashed] if active_half == 0 else [stashed, active])
    if isinstance(active, torch.Size):
        return torch.Size((2 * active[0], *active[1:]))
    if isinstance(active, dict):
        return {key: join_halves(item, stashed[key], active_half) for key, item in active.items() if key in stashed}
    if isinstance(active, (list, tuple)):
        return type(active)(join_halves(*items, active_half) for items in zip(active, stashed, strict=True))
    return active


def _check_rows(rows: int) -> None:
    """Refuse an odd number of rows, which has no halves."""
    if rows % 2:
        raise ValueError(
            f"T-GATE: a cache on the denoiser keeps {rows} rows of a batch that T-GATE halves, where an even number is "
            "expected. Take the cache out, or call remove_tgate(pipe) to use this pipeline."
        )
