"""What a denoiser was given in one forward, and which half of its batch is which."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import diffusers
import torch

from .spec import BatchArguments

# Beside the text, which cross-attention alone reads: the sample and the time, which are the same in both halves.
_SHARED_BY_BOTH_HALVES = ("sample", "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
# What denoisers call the noisy latents.
_LATENTS = ("sample", "hidden_states", "x")


class DenoiserInputs(NamedTuple):
    """
    What the denoiser is given in one forward.

    Args:
        batch_size (`int`): Samples, both halves of guidance counted.
        sample_shape (`tuple`): Shape of one sample.
        arguments (`dict`): All arguments by name.
    """

    batch_size: int
    sample_shape: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def sample(self) -> torch.Tensor:
        """The noisy latents; those of the first sample where the batch is a list."""
        sample = get_latents(self.arguments)
        assert sample is not None
        return sample

    @property
    def encoder_hidden_states(self) -> Any:
        """The text that cross-attention attends to."""
        return self.arguments.get("encoder_hidden_states")


@functools.cache
def _parameter_names(module_class: Any) -> tuple[str, ...]:
    """Names of the arguments of a forward, in order."""
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


def read_arguments(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward, by name."""
    # `torch.compile(pipe.unet)` wraps the module.
    module_class: Any = type(getattr(module, "_orig_mod", module))
    return {**dict(zip(_parameter_names(module_class), args, strict=False)), **kwargs}


def read_inputs(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> DenoiserInputs:
    """Read the arguments of a forward."""
    arguments = read_arguments(module, args, kwargs)
    sample = get_latents(arguments)
    if sample is None:
        raise ValueError(
            f"T-GATE: {type(module).__name__} was called without its noisy latents (`sample` or `hidden_states`), but "
            f"with {sorted(arguments)}. Call remove_tgate(pipe) to use this pipeline."
        )
    samples = next(arguments[name] for name in _LATENTS if name in arguments)
    if samples is not sample:
        return DenoiserInputs(len(samples), tuple(sample.shape), arguments)
    return DenoiserInputs(sample.shape[0], tuple(sample.shape[1:]), arguments)


@functools.cache
def _known_arguments(module_class: Any) -> frozenset[str]:
    """The arguments of the diffusers class that a denoiser derives from, or is named after."""
    for base in module_class.__mro__:
        own = base if base.__module__.split(".")[0] == "diffusers" else getattr(diffusers, base.__name__, None)
        if own is not None and "forward" in vars(own):
            return frozenset(_parameter_names(own))
    return frozenset(_parameter_names(module_class))


def unknown_batch_arguments(
    module: torch.nn.Module, inputs: DenoiserInputs, names: BatchArguments
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Yield the tensors with as many rows as a guided batch, or a multiple, in arguments that diffusers does not have.

    Args:
        module (`torch.nn.Module`): The denoiser.
        inputs (`DenoiserInputs`): Its inputs.
        names (`Mapping`): The arguments with the guidance batch.
    """
    module_class: Any = type(getattr(module, "_orig_mod", module))
    for name in inputs.arguments.keys() - _known_arguments(module_class) - names.keys():
        for tensor in iter_tensors(inputs.arguments[name]):
            if tensor.dim() and tensor.shape[0] and tensor.shape[0] % inputs.batch_size == 0:
                yield name, tensor


def get_latents(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """The noisy latents among the arguments; those of the first sample where the batch is a list."""
    value = next((arguments[name] for name in _LATENTS if name in arguments), None)
    if isinstance(value, list) and value:
        # They follow the reference images, if a sample has some.
        value = value[0][-1] if isinstance(value[0], list) else value[0]
    return value if isinstance(value, torch.Tensor) else None


def batch_size_of(value: Any) -> int | None:
    """First dimension of the first tensor in an argument."""
    return next((int(tensor.shape[0]) for tensor in iter_tensors(value) if tensor.dim()), None)


def iter_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument, however deep they lie."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from iter_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from iter_tensors(item)


def differs(before: Any, after: Any) -> bool:
    """Whether two values differ; they are compared, which waits for the device, only if they are two objects."""
    if after is before:
        return False
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        alike = before.shape == after.shape and before.dtype == after.dtype and before.device == after.device
        return not (alike and torch.equal(before, after))
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        return len(before) != len(after) or any(map(differs, before, after))
    return not (isinstance(before, (int, float, str)) and before == after)


def is_latents(name: str) -> bool:
    """Whether pipelines give latents this name: what is cached goes by their place in the batch."""
    return name.endswith("latents")


def write_counts(value: Any) -> tuple[int | None, ...]:
    """How often each tensor in a value was written to; tensors of inference mode do not count that."""
    return tuple(None if tensor.is_inference() else tensor._version for tensor in iter_tensors(value))


def distinguishing_arguments(inputs: DenoiserInputs, names: BatchArguments) -> list[str]:
    """The arguments other than the text by which the halves of the batch may differ."""
    found = []
    for name, inner in names.items():
        value = inputs.arguments.get(name)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = {key: value[key] for key in inner if key in value}
        elif inner is not None:
            continue
        if name not in _SHARED_BY_BOTH_HALVES and any(
            t.dim() and t.shape[0] >= inputs.batch_size for t in iter_tensors(value)
        ):
            found.append(name)
    return found


def is_unconditional_first(
    inputs: DenoiserInputs, names: BatchArguments, negative: Any, positive: Any, pipeline_name: str
) -> bool:
    """
    Find out which half of a batch is the unconditional one, for a loop that is not diffusers' own.

    Args:
        inputs (`DenoiserInputs`): What the denoiser was given, with guidance.
        names (`Mapping`): The arguments with the guidance batch.
        negative (`torch.Tensor`, *optional*): Embeddings of the negative prompt, if known.
        positive (`torch.Tensor`, *optional*): Embeddings of the prompt, if known.
        pipeline_name (`str`): What errors call the pipeline.

    Returns:
        `bool`: Whether it is the first half. `True` also where it cannot matter: if there is nothing besides the text
        by which the halves differ.

    Raises:
        ValueError: If the halves do not hold the same latents, or if it matters and cannot be told which is which.
    """
    half = inputs.batch_size // 2
    if inputs.batch_size % 2 or not torch.equal(inputs.sample[:half], inputs.sample[half:]):
        raise ValueError(
            f"T-GATE: the guidance of this pipeline is not two halves of one batch: the first and the second half of "
            f"the {inputs.batch_size} latents that {pipeline_name} gives its denoiser are not the same, where T-GATE "
            "expects [unconditional, conditional]. Order the batch like that, or call remove_tgate(pipe) to use it."
        )
    text = inputs.encoder_hidden_states
    first, second = text.chunk(2) if isinstance(text, torch.Tensor) else (None, None)
    if _matches(first, negative) or _matches(second, positive):
        return True
    if _matches(second, negative) or _matches(first, positive):
        return False
    distinguishing = distinguishing_arguments(inputs, names)
    if distinguishing:
        raise ValueError(
            f"T-GATE: {pipeline_name} has a loop of its own, and T-GATE cannot tell which half of its batch is the "
            f"unconditional one, which matters for {', '.join(distinguishing)}. Give the call `prompt_embeds` and "
            "`negative_prompt_embeds` (pipe.encode_prompt makes them), or call remove_tgate(pipe) to use it."
        )
    return True


def _matches(half: torch.Tensor | None, reported: Any) -> bool:
    """Whether one half of the embeddings is what the pipeline has reported, repeated for every sample."""
    if (
        half is None
        or not isinstance(reported, torch.Tensor)
        or not reported.dim()
        or half.shape[0] % reported.shape[0]
    ):
        return False
    repeated = reported.to(half).repeat_interleave(half.shape[0] // reported.shape[0], 0)
    return repeated.shape == half.shape and torch.equal(repeated, half)
