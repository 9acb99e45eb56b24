"""What a denoiser was given in one forward, and which half of its batch is which."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import diffusers
import torch

from .spec import BatchArguments

# What cross-attention alone reads, besides the sample and the time, which are the same in both halves.
_NEUTRAL = ("sample", "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
# What denoisers call the noisy latents.
_LATENTS = ("sample", "hidden_states", "x")


class DenoiserInputs(NamedTuple):
    """
    What the denoiser is given in one forward.

    Args:
        batch (`int`): Samples, both halves of guidance counted.
        shape (`tuple`): Shape of one sample.
        given (`dict`): All arguments by name.
    """

    batch: int
    shape: tuple[int, ...]
    given: dict[str, Any]

    @property
    def sample(self) -> torch.Tensor:
        """The noisy latents; those of the first sample where the batch is a list."""
        sample = get_latents(self.given)
        assert sample is not None
        return sample

    @property
    def text(self) -> Any:
        """What cross-attention attends to."""
        return self.given.get("encoder_hidden_states")


@functools.cache
def _positions(module_class: Any) -> tuple[str, ...]:
    """Names of the arguments of a forward, in order."""
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


def read_inputs(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> DenoiserInputs:
    """Read the arguments of a forward."""
    # `torch.compile(pipe.unet)` wraps the module.
    module_class: Any = type(getattr(module, "_orig_mod", module))
    names = _positions(module_class)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    sample = get_latents(given)
    if sample is None:
        raise ValueError(
            f"T-GATE: {type(module).__name__} was called without its noisy latents (`sample` or `hidden_states`), but "
            f"with {sorted(given)}. Call remove_tgate(pipe) to use this pipeline."
        )
    listed = next(given[name] for name in _LATENTS if name in given)
    if listed is not sample:
        return DenoiserInputs(len(listed), tuple(sample.shape), given)
    return DenoiserInputs(sample.shape[0], tuple(sample.shape[1:]), given)


@functools.cache
def _known(module_class: Any) -> frozenset[str]:
    """The arguments that the class of diffusers has which a denoiser derives from, or is named after."""
    for base in module_class.__mro__:
        own = base if base.__module__.split(".")[0] == "diffusers" else getattr(diffusers, base.__name__, None)
        if own is not None and "forward" in vars(own):
            return frozenset(_positions(own))
    return frozenset(_positions(module_class))


def unknown_batches(
    module: torch.nn.Module, seen: DenoiserInputs, names: BatchArguments
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The tensors with as many rows as a guided batch, or several times as many, of which nobody knows what they are.

    Args:
        module (`torch.nn.Module`): The denoiser.
        seen (`DenoiserInputs`): What it is given.
        names (`Mapping`): The arguments with the guidance batch.
    """
    module_class: Any = type(getattr(module, "_orig_mod", module))
    for name in seen.given.keys() - _known(module_class) - names.keys():
        for tensor in iter_tensors(seen.given[name]):
            if tensor.dim() and tensor.shape[0] and tensor.shape[0] % seen.batch == 0:
                yield name, tensor


def get_latents(given: Mapping[str, Any]) -> torch.Tensor | None:
    """The noisy latents among the arguments; those of the first sample where the batch is a list."""
    value = next((given[name] for name in _LATENTS if name in given), None)
    if isinstance(value, list) and value:
        # They follow the pictures that are given, if a sample has some.
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


def is_another(before: Any, after: Any) -> bool:
    """Whether a value is another one, compared (which waits for the device) only where it is another object."""
    if after is before:
        return False
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        alike = before.shape == after.shape and before.dtype == after.dtype and before.device == after.device
        return not (alike and torch.equal(before, after))
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        return len(before) != len(after) or any(map(is_another, before, after))
    return not (isinstance(before, (int, float, str)) and before == after)


def is_picture(name: str) -> bool:
    """Whether pipelines call something so that goes by the place in the batch, from step to step."""
    return name.endswith("latents")


def writes_to(value: Any) -> tuple[int | None, ...]:
    """How often the tensors in a value have been written to. Tensors of inference mode do not count that."""
    return tuple(None if tensor.is_inference() else tensor._version for tensor in iter_tensors(value))


def conditions(seen: DenoiserInputs, names: BatchArguments) -> list[str]:
    """The arguments besides the text that may tell the halves of the batch apart."""
    found = []
    for name, inner in names.items():
        value = seen.given.get(name)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = {key: value[key] for key in inner if key in value}
        elif inner is not None:
            continue
        if name not in _NEUTRAL and any(t.dim() and t.shape[0] >= seen.batch for t in iter_tensors(value)):
            found.append(name)
    return found


def unconditional_first(
    seen: DenoiserInputs, names: BatchArguments, negative: Any, positive: Any, pipeline: str
) -> bool:
    """
    Find out which half of a batch is the unconditional one, for a loop that is not diffusers' own.

    Args:
        seen (`DenoiserInputs`): What the denoiser was given, with guidance.
        names (`Mapping`): The arguments with the guidance batch.
        negative (`torch.Tensor`, *optional*): Embeddings of the negative prompt, if the pipeline tells them.
        positive (`torch.Tensor`, *optional*): Embeddings of the prompt, likewise.
        pipeline (`str`): What errors call the pipeline.

    Returns:
        `bool`: Whether it is the first half. `True` also where it cannot matter: if there is nothing besides the text
        by which the halves differ.

    Raises:
        ValueError: If the halves do not hold the same latents, or if it matters and cannot be told which is which.
    """
    half = seen.batch // 2
    if seen.batch % 2 or not torch.equal(seen.sample[:half], seen.sample[half:]):
        raise ValueError(
            f"T-GATE: the guidance of this pipeline is not two halves of one batch: the first and the second half of "
            f"the {seen.batch} latents that {pipeline} gives its denoiser are not the same, where T-GATE expects "
            "[unconditional, conditional]. Order the batch like that, or call remove_tgate(pipe) to use it."
        )
    first, second = (_half(seen.text, 0), _half(seen.text, 1)) if isinstance(seen.text, torch.Tensor) else (None, None)
    if _same(first, negative) or _same(second, positive):
        return True
    if _same(second, negative) or _same(first, positive):
        return False
    telling = conditions(seen, names)
    if telling:
        raise ValueError(
            f"T-GATE: {pipeline} has a loop of its own, and T-GATE cannot tell which half of its batch is the "
            f"unconditional one, which matters for {', '.join(telling)}. Give the call `prompt_embeds` and "
            "`negative_prompt_embeds` (pipe.encode_prompt makes them), or call remove_tgate(pipe) to use it."
        )
    return True


def _half(text: torch.Tensor, index: int) -> torch.Tensor:
    """One half of the embeddings."""
    return text.chunk(2)[index]


def _same(half: torch.Tensor | None, told: Any) -> bool:
    """Whether one half of the embeddings is what the pipeline has told, repeated for every picture."""
    if half is None or not isinstance(told, torch.Tensor) or not told.dim() or half.shape[0] % told.shape[0]:
        return False
    repeated = told.to(half).repeat_interleave(half.shape[0] // told.shape[0], 0)
    return repeated.shape == half.shape and torch.equal(repeated, half)
