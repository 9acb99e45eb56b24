"""What the batch of a denoiser is, and which of its layers attend to the text: data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

# Arguments whose tensors have the guidance batch, or so many rows for each sample of it, as their first dimension.
# `None`: all tensors inside; a mapping: only those of these keys, since the rest of the container is not ours; a
# number: the dimension that it is instead; "each": a list (or a tensor) that has an entry for each sample, whatever
# that is.
BatchArguments = Mapping[str, "BatchArguments | int | Literal['each'] | None"]

_CONDITIONS: BatchArguments = dict.fromkeys(
    ("text_embeds", "time_ids", "image_embeds", "hint", "resolution", "aspect_ratio")
)
_SHARED: BatchArguments = {
    **dict.fromkeys(("timestep", "encoder_hidden_states", "class_labels", "timestep_cond")),
    **dict.fromkeys(("attention_mask", "encoder_attention_mask", "added_time_ids")),
    "added_cond_kwargs": _CONDITIONS,
    "cross_attention_kwargs": {"gligen": None},
    "joint_attention_kwargs": {"ip_adapter_image_embeds": None, "attention_mask": None},
}
DENOISER_ARGUMENTS: BatchArguments = {
    **_SHARED,
    **dict.fromkeys(("sample", "hidden_states", "down_intrablock_additional_residuals")),
}
CONTROLNET_ARGUMENTS: BatchArguments = {
    **_SHARED,
    **dict.fromkeys(("sample", "hidden_states", "controlnet_cond", "control_type", "conditioning_mask")),
}
# What a ControlNet gives. It is one half already if the ControlNet ran on one half.
RESIDUALS: BatchArguments = dict.fromkeys(("down_block_additional_residuals", "mid_block_additional_residual"))


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
        scales (`tuple` of `str`): Where a pipeline has its guidance scales, if there is one for each of them.
        part_of (`Mapping`): Parts of the names of layers that run only where an argument is given, and its name.
        given_last (`bool`): Whether the tokens of a given picture follow those of the latents. The pipeline does not
            read what the denoiser makes of them.
        remembers (`bool`): Whether guidance remembers that of the steps before, so that two equal halves do not end it.
        guided (`Callable`, *optional*): The parts of the output that are guided, as views of its tensors, by these and
            the arguments of the call. By default its first tensor, without a variance.
        scale_beyond (`float`): What is added to `guidance_scale` before guidance multiplies the difference with it,
            counted from the unconditional half.
        asks_scale (`bool`): Whether loops that do not tell their guidance ask `guidance_scale` anew in every step.
        own (`Mapping`): Arguments with the guidance batch that a denoiser alone has, as its user says.
    """

    arguments: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    in_second: tuple[str, ...] = ()
    residuals: BatchArguments = field(default_factory=lambda: RESIDUALS)
    cross: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    before: Callable[[Mapping[str, Any]], bool] | None = None
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
    remembers: bool = False
    guided: Callable[[list[torch.Tensor], Mapping[str, Any]], list[torch.Tensor]] | None = None
    asks_scale: bool = False
    own: BatchArguments = field(default_factory=dict)

    def with_own(self, names: Sequence[str]) -> Layout:
        """A copy with more arguments that have the guidance batch, those inside others as `argument.key`."""
        own: dict[str, Any] = {}
        for name in names:
            argument, _, key = name.partition(".")
            if key:
                own.setdefault(argument, {})
                if own[argument] is not None:
                    own[argument] |= {key: None}
            else:
                own[argument] = None
        return replace(self, own=own)

    @property
    def denoiser_arguments(self) -> BatchArguments:
        """The denoiser's arguments with the guidance batch, those that a ControlNet gives left out."""
        return self._with_family_arguments(DENOISER_ARGUMENTS)

    @property
    def controlnet_arguments(self) -> BatchArguments:
        """The ControlNet's arguments with the guidance batch."""
        return self._with_family_arguments(CONTROLNET_ARGUMENTS)

    def _with_family_arguments(self, names: BatchArguments) -> BatchArguments:
        """Add the arguments with the guidance batch that other families do not have."""
        others: BatchArguments = {**dict.fromkeys(self.entries, "each"), **dict.fromkeys(self.in_second, 1)}
        more = {**names, **dict.fromkeys(self.arguments), **others}
        for name, inner in self.own.items():
            known = more.get(name)
            both = isinstance(inner, Mapping) and isinstance(known, Mapping)
            more[name] = {**known, **inner} if both else inner  # type: ignore[dict-item]
        return more

    def is_auxiliary_call(self, given: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments is a further one, and no part of guidance by the two halves."""
        # An empty list of layers to skip makes a further call too.
        values = [given.get(name) for name in self.beside]
        told = any(value is not None and value is not False for value in values)
        return told or (self.before is not None and self.before(given))

    def is_inactive(self, name: str, given: Mapping[str, Any]) -> bool:
        """Whether the layer of this name does not run in a call with these arguments."""
        return any(part in name and given.get(argument) is None for part, argument in self.part_of.items())

    def is_gateable(self, name: str) -> bool:
        """Whether the layer of this name may be gated."""
        return not self.joint and not any(part in name for part in self.never)

    def is_cross_attention(self, name: str, layer: Any) -> bool:
        """Whether the layer of this name attends to the text."""
        if self.cross:
            return self.is_gateable(name) and name.removesuffix(".processor").endswith(self.cross)
        return self.is_gateable(name) and bool(getattr(layer, "is_cross_attention", False))
