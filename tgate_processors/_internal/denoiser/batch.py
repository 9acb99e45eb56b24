"""One half of a denoiser's arguments, and its output as both halves: arithmetic, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..plan.step_plan import CFGHalf
from .inputs import DenoiserInputs, iter_tensors
from .spec import BatchArguments, Layout

Parts = Callable[[Any], Sequence[torch.Tensor]]


def halve(value: Any, batch: int, kept: CFGHalf) -> Any:
    """
    Keep one half of every tensor that holds a whole number of rows per sample, however deep it lies.

    `(1,)` timesteps and scalars stay; `2B * frames` rows are halved like `2B`. A value with nothing to halve is
    returned as the same object.
    """
    if not isinstance(value, torch.Tensor):
        return _mapped(value, lambda item: halve(item, batch, kept))
    if value.dim() == 0 or value.shape[0] < batch or value.shape[0] % batch:
        return value
    half = value.shape[0] // 2
    return value[:half] if kept == "unconditional" else value[half:]


def slice_arguments(given: Mapping[str, Any], names: BatchArguments, batch: int, kept: CFGHalf) -> dict[str, Any]:
    """Halve the arguments of these names, and hand the others on as they are."""
    halved = {}
    for name, value in given.items():
        inner = names.get(name, {})
        if inner is None:
            halved[name] = halve(value, batch, kept)
        elif isinstance(inner, str):
            halved[name] = _half_of_entries(value, batch, kept)
        elif isinstance(inner, int):
            halved[name] = value if value is None else halve(value.movedim(inner, 0), batch, kept).movedim(0, inner)
        elif inner and isinstance(value, Mapping):
            halved[name] = _like(value, slice_arguments(value, inner, batch, kept))
        else:
            halved[name] = value
    return halved


def _half_of_entries(value: Any, batch: int, kept: CFGHalf) -> Any:
    """Keep one half of a list, or of a tensor, that has an entry for each sample."""
    if value is None or len(value) != batch:
        return value
    return value[: batch // 2] if kept == "unconditional" else value[batch // 2 :]


def stacked(output: Any) -> Any:
    """An output that gives its samples in a list, with one tensor for all of them."""
    return torch.stack(output) if isinstance(output, list) else _mapped(output, stacked)


def unstacked(output: Any) -> Any:
    """The inverse of `stacked`."""
    return list(output) if isinstance(output, torch.Tensor) else _mapped(output, unstacked)


def double(
    output: Any,
    rows: int,
    difference: Sequence[torch.Tensor] | None = None,
    ran: CFGHalf = "unconditional",
    parts_of: Parts = lambda output: [*iter_tensors(output)],
) -> Any:
    """
    Make the output of the whole batch from that of one half.

    Args:
        output (`torch.Tensor` or container): The output of the half.
        rows (`int`): Its samples.
        difference (`Sequence` of `torch.Tensor`, *optional*): The second half minus the first. Zero by default.
        ran (`str`, *optional*, defaults to `"unconditional"`): Which half it belongs to, by its place.
        parts_of (`Callable`, *optional*): The parts of an output that the difference is about. By default its tensors.

    Returns:
        `torch.Tensor` or container: As `output`, every tensor with both halves.
    """
    doubled = _each(
        output, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() and len(tensor) == rows else tensor
    )
    if difference is not None:
        first = ran == "unconditional"
        other = [part[rows:] if first else part[:rows] for part in parts_of(doubled)]
        _add(other, difference, 1 if first else -1)
    return doubled


def second_of(output: Any, difference: Sequence[torch.Tensor] | None, parts_of: Parts) -> Any:
    """
    Make the output of the second call of guidance from that of the first.

    Args:
        output (`torch.Tensor` or container): The output of the first call.
        difference (`Sequence` of `torch.Tensor`, *optional*): The second minus the first. Zero by default.
        parts_of (`Callable`): The parts of an output that the difference is about.

    Returns:
        `torch.Tensor` or container: As `output`, in tensors of its own.
    """
    other = _each(output, torch.clone)
    if difference is not None:
        _add(parts_of(other), difference)
    return other


def guided_parts(output: Any, seen: DenoiserInputs, layout: Layout) -> list[torch.Tensor]:
    """
    What guidance is about in a denoiser's output.

    Args:
        output (`torch.Tensor` or container): The output.
        seen (`DenoiserInputs`): What the denoiser was given.
        layout (`Layout`): What its family is.

    Returns:
        `list` of `torch.Tensor`: The prediction, or several (of video and sound), as views.
    """
    if layout.entries:
        output = stacked(output)
    if layout.guided is None:
        return [sample_of(output, seen.shape)]
    return layout.guided([*iter_tensors(output)], seen.given)


def sample_of(output: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """
    The prediction in a denoiser's output.

    Args:
        output (`torch.Tensor` or container): The output.
        shape (`tuple`): Shape of one sample of the input, channels first. Twice as many channels in the output hold a
            variance besides, which guidance leaves alone.

    Returns:
        `torch.Tensor`: The prediction, a view.
    """
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output[:, : shape[0]] if output.shape[1] == 2 * shape[0] else output


def _add(parts: Sequence[torch.Tensor], difference: Sequence[torch.Tensor], sign: int = 1) -> None:
    """Add to the parts of an output, in place; what is shorter than its part belongs to the beginning of it."""
    for part, more in zip(parts, difference, strict=True):
        part[:, : more.shape[1]].add_(more, alpha=sign)


def _each(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to every tensor, however deep it lies."""
    return function(value) if isinstance(value, torch.Tensor) else _mapped(value, lambda item: _each(item, function))


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
