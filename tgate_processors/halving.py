"""One half of a denoiser's arguments, and its output as both halves: arithmetic, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .layout import Names
from .schedule import CFGHalf


def halve(value: Any, batch: int, kept: CFGHalf) -> Any:
    """
    Keep one half of every tensor that holds a whole number of rows per sample, however deep it lies.

    `(1,)` timesteps and scalars stay; `2B * frames` rows are halved like `2B`. What holds nothing to halve is given
    back as the object that it is.
    """
    if not isinstance(value, torch.Tensor):
        return _mapped(value, lambda item: halve(item, batch, kept))
    if value.dim() == 0 or value.shape[0] < batch or value.shape[0] % batch:
        return value
    half = value.shape[0] // 2
    return value[:half] if kept == "unconditional" else value[half:]


def halve_named(given: Mapping[str, Any], names: Names, batch: int, kept: CFGHalf) -> dict[str, Any]:
    """Halve the arguments of these names, and hand the others on as they are."""
    halved = {}
    for name, value in given.items():
        inner = names.get(name, {})
        if inner is None:
            halved[name] = halve(value, batch, kept)
        elif inner and isinstance(value, Mapping):
            halved[name] = _like(value, halve_named(value, inner, batch, kept))
        else:
            halved[name] = value
    return halved


def double(output: Any, half: int) -> Any:
    """Repeat every tensor of the half batch."""
    if isinstance(output, torch.Tensor):
        return torch.cat([output, output]) if output.dim() and output.shape[0] == half else output
    return _mapped(output, lambda item: double(item, half))


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the items of a container, into a new one of the same kind if any of them changes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        changed = {name: function(getattr(value, name)) for name in names}
        same = all(changed[name] is getattr(value, name) for name in names)
        return value if same else dataclasses.replace(value, **changed)
    if isinstance(value, Mapping):
        return _like(value, {key: function(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        items = [function(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _like(value: Mapping[str, Any], items: dict[str, Any]) -> Mapping[str, Any]:
    """A mapping of the same kind with other items, or itself if they are the same."""
    if all(items[key] is value[key] for key in items):
        return value
    return type(value)(items) if isinstance(value, dict) else items
