"""The halves of what somebody keeps: tensors, their shapes, and containers of them."""

from __future__ import annotations

from typing import Any

import torch


def split(value: Any, kept: int) -> tuple[Any, Any]:
    """
    Take apart what is kept of a whole batch, in the first dimension.

    Args:
        value (`Any`): Tensors and shapes, in tuples, lists and dicts. What is none of these belongs to both halves.
        kept (`int`): The half that stays, 0 or 1.

    Returns:
        `tuple`: The half that stays and the other one, in tensors of their own.

    Raises:
        ValueError: If a tensor has no halves.
    """
    if isinstance(value, torch.Tensor) and value.dim():
        _check_rows(len(value))
        # Copies, as a view would hold the memory of both.
        halves = [half.clone() for half in value.chunk(2)]
        return halves[kept], halves[1 - kept]
    if isinstance(value, torch.Size):
        _check_rows(value[0])
        half = torch.Size((value[0] // 2, *value[1:]))
        return half, half
    if isinstance(value, dict):
        parts = {key: split(item, kept) for key, item in value.items()}
        return {key: part[0] for key, part in parts.items()}, {key: part[1] for key, part in parts.items()}
    if isinstance(value, (list, tuple)):
        items = [split(item, kept) for item in value]
        return type(value)(item[0] for item in items), type(value)(item[1] for item in items)
    return value, value


def join(stayed: Any, other: Any, kept: int) -> Any:
    """The inverse of `split`."""
    if isinstance(stayed, torch.Tensor) and stayed.dim():
        return torch.cat([stayed, other] if kept == 0 else [other, stayed])
    if isinstance(stayed, torch.Size):
        return torch.Size((2 * stayed[0], *stayed[1:]))
    if isinstance(stayed, dict):
        return {key: join(item, other[key], kept) for key, item in stayed.items() if key in other}
    if isinstance(stayed, (list, tuple)):
        return type(stayed)(join(*items, kept) for items in zip(stayed, other, strict=True))
    return stayed


def _check_rows(rows: int) -> None:
    """Refuse what has no halves."""
    if rows % 2:
        raise ValueError(
            f"T-GATE: a cache on the denoiser keeps {rows} rows of a batch that T-GATE halves, where an even number is "
            "expected. Take the cache out, or call remove_tgate(pipe) to use this pipeline."
        )
