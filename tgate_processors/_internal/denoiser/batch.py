"""One half of a denoiser's arguments, and its output as both halves: arithmetic, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..plan.schedule import CFGHalf
from .inputs import DenoiserInputs, iter_tensors
from .spec import BatchArguments, Layout


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
    half: int,
    difference: torch.Tensor | None = None,
    ran: CFGHalf = "unconditional",
    *,
    several: bool = False,
) -> Any:
    """
    Make the output of the whole batch from that of one half.

    Args:
        output (`torch.Tensor` or container): The output of the half.
        half (`int`): Its samples.
        difference (`torch.Tensor`, *optional*): The second half minus the first. Zero by default.
        ran (`str`, *optional*, defaults to `"unconditional"`): Which half it belongs to, by its place.
        several (`bool`, *optional*, defaults to `False`): Whether the difference is one of what `joined` makes.

    Returns:
        `torch.Tensor` or container: As `output`, every tensor with both halves.
    """
    if several and difference is not None:
        return _each_with(output, half, difference, lambda item, own: double(item, half, own, ran))
    if not isinstance(output, torch.Tensor):
        return _mapped(output, lambda item: double(item, half, difference, ran))
    if not output.dim() or output.shape[0] != half:
        return output
    if difference is None:
        return torch.cat([output, output])
    other = output.clone()
    # Channels beyond those of the difference do not predict noise (a learned variance).
    predicted = other[:, : difference.shape[1]]
    predicted.add_(difference if ran == "unconditional" else -difference)
    return torch.cat([output, other] if ran == "unconditional" else [other, output])


def prediction_of(output: Any, seen: DenoiserInputs, layout: Layout) -> torch.Tensor:
    """
    What guidance is about in a denoiser's output.

    Args:
        output (`torch.Tensor` or container): The output.
        seen (`DenoiserInputs`): What the denoiser was given.
        layout (`Layout`): What its family is.

    Returns:
        `torch.Tensor`: The prediction, or several of them as `joined` makes them.
    """
    if layout.entries:
        output = stacked(output)
    if layout.reads is not None:
        length = layout.reads(seen.given)
        whole = next(iter_tensors(output))
        return whole[:, -length:] if layout.reads_end else whole[:, :length]
    if not layout.several:
        return sample_of(output, seen.shape)
    return joined(output, tail=layout.tail is not None and seen.given.get(layout.tail) is not None)


def joined(output: Any, *, tail: bool = False) -> torch.Tensor:
    """
    Several predictions of a denoiser (video and audio) in one tensor.

    Args:
        output (container): The output.
        tail (`bool`, *optional*, defaults to `False`): Whether the last frame of the first one is left out.

    Returns:
        `torch.Tensor`: A row for every sample and prediction, those of a sample together, filled up with zeros.
    """
    each = [tensor[:, :-1] if tail and not place else tensor for place, tensor in enumerate(iter_tensors(output))]
    each = [tensor.flatten(1) for tensor in each]
    width = max(tensor.shape[1] for tensor in each)
    filled = [torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in each]
    return torch.stack(filled, 1).flatten(0, 1)


def second_of(
    output: Any,
    rows: int,
    difference: torch.Tensor | None,
    *,
    several: bool = False,
    at_end: bool = False,
) -> Any:
    """
    Make the output of the second call of guidance from that of the first.

    Args:
        output (`torch.Tensor` or container): The output of the first call.
        rows (`int`): Its samples.
        difference (`torch.Tensor`, *optional*): The second minus the first. Zero by default.
        several (`bool`, *optional*, defaults to `False`): Whether the difference is one of what `joined` makes.
        at_end (`bool`, *optional*, defaults to `False`): Whether a difference that is shorter than the output is about
            its end.

    Returns:
        `torch.Tensor` or container: As `output`, in tensors of its own.
    """
    if several and difference is not None:
        return _each_with(output, rows, difference, lambda item, own: second_of(item, rows, own))
    if not isinstance(output, torch.Tensor):
        return _mapped(output, lambda item: second_of(item, rows, difference, at_end=at_end))
    other = output.clone()
    if difference is not None and other.dim() and other.shape[0] == rows:
        length = difference.shape[1]
        (other[:, -length:] if at_end else other[:, :length]).add_(difference)
    return other


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


def _each_with(
    output: Any, rows: int, difference: torch.Tensor, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Any:
    """Apply a function to every tensor of an output, its samples in a row each, and its part of a joined difference."""
    parts = iter(difference.view(rows, -1, difference.shape[1]).unbind(1))

    def each(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        flat = item.flatten(1)
        # A last frame that was left out lies at the end, so that its part is shorter.
        return function(flat, next(parts)[:, : flat.shape[1]]).reshape(-1, *item.shape[1:])

    return _mapped(output, each)


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
