"""Which of a denoiser's arguments hold the batch, and which half is which: data, and how it is checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

# Arguments whose tensors have the guidance batch, or so many rows for each sample of it, as their first dimension.
# `None`: all tensors inside; a mapping: only those of these keys, since the rest of the container is not ours; a
# number: the dimension that it is instead; "each": a list (or a tensor) that has an entry for each sample, whatever
# that is.
Names = Mapping[str, "Names | int | Literal['each'] | None"]

_CONDITIONS: Names = dict.fromkeys(("text_embeds", "time_ids", "image_embeds", "hint", "resolution", "aspect_ratio"))
_SHARED: Names = {
    **dict.fromkeys(("timestep", "encoder_hidden_states", "class_labels", "timestep_cond")),
    **dict.fromkeys(("attention_mask", "encoder_attention_mask", "added_time_ids")),
    "added_cond_kwargs": _CONDITIONS,
    "cross_attention_kwargs": {"gligen": None},
    "joint_attention_kwargs": {"ip_adapter_image_embeds": None, "attention_mask": None},
}
DENOISER_ARGUMENTS: Names = {
    **_SHARED,
    **dict.fromkeys(("sample", "hidden_states", "down_intrablock_additional_residuals")),
}
CONTROLNET_ARGUMENTS: Names = {
    **_SHARED,
    **dict.fromkeys(("sample", "hidden_states", "controlnet_cond", "control_type", "conditioning_mask")),
}
# What a ControlNet gives. It is one half already if the ControlNet ran on one half.
RESIDUALS: Names = dict.fromkeys(("down_block_additional_residuals", "mid_block_additional_residual"))
# What cross-attention alone reads, besides the sample and the time, which are the same in both halves.
_NEUTRAL = ("sample", "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
# What denoisers call the noisy latents.
_LATENTS = ("sample", "hidden_states", "x")


@dataclass(frozen=True)
class Layout:
    """
    What the batch of a family of denoisers is, and which of their layers attend to the text.

    Args:
        arguments (`tuple` of `str`): Arguments with the guidance batch that other families do not have.
        entries (`tuple` of `str`): Such arguments that are lists with an entry for each sample, where a family has its
            batch like that. Then the denoiser gives a list too.
        in_second (`tuple` of `str`): Such arguments that have the batch as their second dimension.
        residuals (`Mapping`): The arguments that a ControlNet gives.
        cross (`tuple` of `str`): How the names of layers with cross-attention end. Without any, their own flag says it.
        never (`tuple` of `str`): Parts of the names of layers that are never gated: what they attend to is no text, or
            changes from step to step.
        conditional_first (`bool`): Whether the first half of the batch is the conditional one.
        mean (`bool`): Whether the mean of both halves is kept where guidance is dropped. Else it is the one that stays.
        calls (`int`): Calls of the denoiser that guidance is made of: 1, or 2, the conditional one first.
        apart (`bool`): Whether added keys (of a picture) have a softmax of their own beside that of the text.
        keeps_cross (`bool`): Whether cross-attention is gated by default: what it keeps of a video is large.
        joint (`bool`): Whether text and image share one softmax. Then no layer is gated, but guidance alone.
        beside (`tuple` of `str`): Arguments that tell further calls in a step, which are about the conditional half.
            They run as without T-GATE.
        before (`Callable`, *optional*): Whether a call with these arguments prepares the loop, and runs likewise.
        several (`bool`): Whether the denoiser gives several tensors that are guided (video, sound).
        scales (`tuple` of `str`): Where a pipeline has its guidance scales, if there is one for each of them.
        part_of (`Mapping`): Parts of the names of layers that run only where an argument is given, and its name.
        given_last (`bool`): Whether the tokens of a given picture follow those of the latents. The pipeline does not
            read what the denoiser makes of them.
        tail (`str`, *optional*): The argument that tells that the last frame of the latents is a given picture,
            likewise.
        remembers (`bool`): Whether guidance remembers that of the steps before, so that two equal halves do not end it.
        reads (`Callable`, *optional*): How much of the output's second dimension the pipeline reads, by the arguments
            of the call, where that is not all of it.
        reads_end (`bool`): Whether that is its end, and not its beginning.
        scale_beyond (`float`): What is added to `guidance_scale` before guidance multiplies the difference with it,
            counted from the unconditional half.
    """

    arguments: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    in_second: tuple[str, ...] = ()
    residuals: Names = field(default_factory=lambda: RESIDUALS)
    cross: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    before: Callable[[Mapping[str, Any]], bool] | None = None
    several: bool = False
    scales: tuple[str, ...] = ()
    conditional_first: bool = False
    mean: bool = True
    scale_beyond: float = 0.0
    calls: int = 1
    apart: bool = False
    keeps_cross: bool = True
    joint: bool = False
    given_last: bool = False
    part_of: Mapping[str, str] = field(default_factory=dict)
    tail: str | None = None
    remembers: bool = False
    reads: Callable[[Mapping[str, Any]], int] | None = None
    reads_end: bool = False

    @property
    def of_denoiser(self) -> Names:
        """The denoiser's arguments with the guidance batch, those that a ControlNet gives left out."""
        return {**DENOISER_ARGUMENTS, **self._own}

    @property
    def of_controlnet(self) -> Names:
        """The ControlNet's arguments with the guidance batch."""
        return {**CONTROLNET_ARGUMENTS, **self._own}

    @property
    def _own(self) -> Names:
        """The arguments with the guidance batch that other families do not have."""
        others: Names = {**dict.fromkeys(self.entries, "each"), **dict.fromkeys(self.in_second, 1)}
        return {**dict.fromkeys(self.arguments), **others}

    def is_beside(self, given: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments is a further one, and no part of guidance by the two halves."""
        return any(given.get(name) for name in self.beside) or (self.before is not None and self.before(given))

    def is_absent(self, name: str, given: Mapping[str, Any]) -> bool:
        """Whether the layer of this name does not run in a call with these arguments."""
        return any(part in name and given.get(argument) is None for part, argument in self.part_of.items())

    def is_gated(self, name: str) -> bool:
        """Whether the layer of this name may be gated."""
        return not self.joint and not any(part in name for part in self.never)

    def is_cross(self, name: str, layer: Any) -> bool:
        """Whether the layer of this name attends to the text."""
        if self.cross:
            return self.is_gated(name) and name.removesuffix(".processor").endswith(self.cross)
        return self.is_gated(name) and bool(getattr(layer, "is_cross_attention", False))


class Seen(NamedTuple):
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
        sample = latents_of(self.given)
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


def see(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Seen:
    """Read the arguments of a forward."""
    # `torch.compile(pipe.unet)` wraps the module.
    module_class: Any = type(getattr(module, "_orig_mod", module))
    names = _positions(module_class)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    sample = latents_of(given)
    if sample is None:
        raise ValueError(
            f"T-GATE: {type(module).__name__} was called without its noisy latents (`sample` or `hidden_states`), but "
            f"with {sorted(given)}. Call remove_tgate(pipe) to use this pipeline."
        )
    listed = next(given[name] for name in _LATENTS if name in given)
    if listed is not sample:
        return Seen(len(listed), tuple(sample.shape), given)
    return Seen(sample.shape[0], tuple(sample.shape[1:]), given)


def latents_of(given: Mapping[str, Any]) -> torch.Tensor | None:
    """The noisy latents among the arguments; those of the first sample where the batch is a list."""
    value = next((given[name] for name in _LATENTS if name in given), None)
    if isinstance(value, list) and value:
        # They follow the pictures that are given, if a sample has some.
        value = value[0][-1] if isinstance(value[0], list) else value[0]
    return value if isinstance(value, torch.Tensor) else None


def rows_of(value: Any) -> int | None:
    """First dimension of the first tensor in an argument."""
    return next((int(tensor.shape[0]) for tensor in tensors_in(value) if tensor.dim()), None)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument, however deep they lie."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def conditions(seen: Seen, names: Names) -> list[str]:
    """The arguments besides the text that may tell the halves of the batch apart."""
    found = []
    for name, inner in names.items():
        value = seen.given.get(name)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = {key: value[key] for key in inner if key in value}
        elif inner is not None:
            continue
        if name not in _NEUTRAL and any(t.dim() and t.shape[0] >= seen.batch for t in tensors_in(value)):
            found.append(name)
    return found


def unconditional_first(seen: Seen, names: Names, negative: Any, positive: Any, pipeline: str) -> bool:
    """
    Find out which half of a batch is the unconditional one, for a loop that is not diffusers' own.

    Args:
        seen (`Seen`): What the denoiser was given, with guidance.
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
