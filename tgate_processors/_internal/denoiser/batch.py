"""One half of a denoiser's arguments, and its output as both halves: arithmetic, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..plan.step_plan import CFGHalf
from .inputs import DenoiserInputs, iter_tensors
from .spec import BatchArguments, BatchLayout

Parts = Callable[[Any], Sequence[torch.Tensor]]


def slice_half(value: Any, batch_size: int, active_half: CFGHalf) -> Any:
    """
    Slice one half out of every tensor that holds a whole number of rows per sample, however deep it lies.

    `(1,)` timesteps and scalars stay; `2B * frames` rows are halved like `2B`. A value with nothing to halve is
    returned as the same object.
    """
    if not isinstance(value, torch.Tensor):
        return _map_structure(value, lambda item: slice_half(item, batch_size, active_half))
    if value.dim() == 0 or value.shape[0] < batch_size or value.shape[0] % batch_size:
        return value
    half = value.shape[0] // 2
    return value[:half] if active_half == "unconditional" else value[half:]


def slice_arguments(
    arguments: Mapping[str, Any], names: BatchArguments, batch_size: int, active_half: CFGHalf
) -> dict[str, Any]:
    """Slice one half out of the arguments of these names, and pass the others on as they are."""
    halved = {}
    for name, value in arguments.items():
        inner = names.get(name, {})
        if inner is None:
            halved[name] = slice_half(value, batch_size, active_half)
        elif isinstance(inner, str):
            halved[name] = _slice_list(value, batch_size, active_half)
        elif isinstance(inner, int):
            halved[name] = (
                value
                if value is None
                else slice_half(value.movedim(inner, 0), batch_size, active_half).movedim(0, inner)
            )
        elif inner and isinstance(value, Mapping):
            halved[name] = _rebuild_mapping(value, slice_arguments(value, inner, batch_size, active_half))
        else:
            halved[name] = value
    return halved


def _slice_list(value: Any, batch_size: int, active_half: CFGHalf) -> Any:
    """One half of a list, or of a tensor, that has an entry for each sample."""
    if value is None or len(value) != batch_size:
        return value
    return value[: batch_size // 2] if active_half == "unconditional" else value[batch_size // 2 :]


def stack_samples(output: Any) -> Any:
    """An output that gives its samples in a list, with one tensor for all of them."""
    return torch.stack(output) if isinstance(output, list) else _map_structure(output, stack_samples)


def unstack_samples(output: Any) -> Any:
    """The inverse of `stack_samples`."""
    return list(output) if isinstance(output, torch.Tensor) else _map_structure(output, unstack_samples)


def complete_batch(
    output: Any,
    rows: int,
    difference: Sequence[torch.Tensor] | None = None,
    active_half: CFGHalf = "unconditional",
    parts_of: Parts = lambda output: [*iter_tensors(output)],
) -> Any:
    """
    Make the output of the whole batch from that of one half.

    Args:
        output (`torch.Tensor` or container): The output of the active half.
        rows (`int`): Its samples.
        difference (`Sequence` of `torch.Tensor`, *optional*): The second half minus the first. Zero by default.
        active_half (`str`, *optional*, defaults to `"unconditional"`): The half that ran, by its place.
        parts_of (`Callable`, *optional*): Gives the parts of an output that guidance combines. By default its tensors.

    Returns:
        `torch.Tensor` or container: As `output`, every tensor with both halves.
    """
    doubled = map_tensors(
        output, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() and len(tensor) == rows else tensor
    )
    if difference is not None:
        first = active_half == "unconditional"
        other = [part[rows:] if first else part[:rows] for part in parts_of(doubled)]
        _add_to_parts(other, difference, 1 if first else -1)
    return doubled


def complete_second_call(output: Any, difference: Sequence[torch.Tensor] | None, parts_of: Parts) -> Any:
    """
    Make the output of the second call of guidance from that of the first.

    Args:
        output (`torch.Tensor` or container): The output of the first call.
        difference (`Sequence` of `torch.Tensor`, *optional*): The second minus the first. Zero by default.
        parts_of (`Callable`): Gives the parts of an output that guidance combines.

    Returns:
        `torch.Tensor` or container: As `output`, in tensors of its own.
    """
    other = map_tensors(output, torch.clone)
    if difference is not None:
        _add_to_parts(parts_of(other), difference)
    return other


def guided_parts(output: Any, inputs: DenoiserInputs, layout: BatchLayout) -> list[torch.Tensor]:
    """
    The parts of a denoiser's output that guidance combines.

    Args:
        output (`torch.Tensor` or container): The output.
        inputs (`DenoiserInputs`): What the denoiser was given.
        layout (`BatchLayout`): The batch of its family.

    Returns:
        `list` of `torch.Tensor`: The prediction, or one each for video and sound, as views.
    """
    if layout.list_arguments:
        output = stack_samples(output)
    if layout.guided_views is None:
        return [noise_prediction_of(output, inputs.sample_shape)]
    return layout.guided_views([*iter_tensors(output)], inputs.arguments)


def noise_prediction_of(output: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """
    The prediction in a denoiser's output.

    Args:
        output (`torch.Tensor` or container): The output.
        shape (`tuple`): Shape of one sample of the input, channels first. Twice as many channels in the output hold a
            variance too, which guidance does not touch.

    Returns:
        `torch.Tensor`: The prediction, a view.
    """
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output[:, : shape[0]] if output.shape[1] == 2 * shape[0] else output


def _add_to_parts(parts: Sequence[torch.Tensor], difference: Sequence[torch.Tensor], sign: int = 1) -> None:
    """Add a difference to the parts of an output, in place; a shorter one belongs to the first tokens of its part."""
    for part, more in zip(parts, difference, strict=True):
        part[:, : more.shape[1]].add_(more, alpha=sign)


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to every tensor, however deep it lies."""
    return (
        function(value)
        if isinstance(value, torch.Tensor)
        else _map_structure(value, lambda item: map_tensors(item, function))
    )


def _map_structure(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the items of a container, into a new one of the same kind if any of them changes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        changed = {name: function(getattr(value, name)) for name in names}
        same = all(changed[name] is getattr(value, name) for name in names)
        return value if same else dataclasses.replace(value, **changed)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, {key: function(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        items = [function(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _rebuild_mapping(value: Mapping[str, Any], items: dict[str, Any]) -> Mapping[str, Any]:
    """A mapping of the same kind with other items, or itself if they are the same."""
    if all(items[key] is value[key] for key in items):
        return value
    return type(value)(items) if isinstance(value, dict) else items
