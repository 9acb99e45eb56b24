"""The batch of a family of denoisers, its layers that attend to the text, and its guidance: data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

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
# The outputs of a ControlNet. They are one half already if the ControlNet ran on one half.
RESIDUALS: BatchArguments = dict.fromkeys(("down_block_additional_residuals", "mid_block_additional_residual"))


@dataclass(frozen=True)
class AuxiliaryScale:
    """
    What guidance multiplies the difference of the conditional half from a further call with.

    Args:
        attributes (`tuple` of `str`): The attributes of a pipeline that hold it, for each part of the output.
        offset (`float`, *optional*, defaults to 0): What is added to them.
    """

    attributes: tuple[str, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class BatchLayout:
    """
    What is one batch for guidance, in the arguments of a denoiser and in its output.

    Args:
        batch_arguments (`tuple` of `str`): Arguments with the guidance batch that other families do not have.
        list_arguments (`tuple` of `str`): Arguments with the guidance batch that are lists with an entry for each
            sample. The denoiser of such a family gives a list too.
        second_dim_arguments (`tuple` of `str`): Arguments with the guidance batch as their second dimension.
        controlnet_residuals (`Mapping`): The arguments that hold the outputs of a ControlNet.
        conditional_first (`bool`): Whether the first half of the batch is the conditional one.
        reference_tokens_last (`bool`): Whether the tokens of a reference image follow those of the latents. The
            pipeline does not read what the denoiser makes of them.
        guided_views (`Callable`, *optional*): Gives the parts of the output that are guided, as views of its tensors,
            from these and the arguments of the call. By default its first tensor, without a variance.
        user_batch_arguments (`Mapping`): Further arguments with the guidance batch, given by the user.
    """

    batch_arguments: tuple[str, ...] = ()
    list_arguments: tuple[str, ...] = ()
    second_dim_arguments: tuple[str, ...] = ()
    controlnet_residuals: BatchArguments = field(default_factory=lambda: RESIDUALS)
    conditional_first: bool = False
    reference_tokens_last: bool = False
    guided_views: Callable[[list[torch.Tensor], Mapping[str, Any]], list[torch.Tensor]] | None = None
    user_batch_arguments: BatchArguments = field(default_factory=dict)

    def with_batch_arguments(self, names: Sequence[str]) -> Self:
        """A copy with more arguments that have the guidance batch, those inside others as `argument.key`."""
        user_batch_arguments: dict[str, Any] = {}
        for name in names:
            argument, _, key = name.partition(".")
            if key:
                user_batch_arguments.setdefault(argument, {})
                if user_batch_arguments[argument] is not None:
                    user_batch_arguments[argument] |= {key: None}
            else:
                user_batch_arguments[argument] = None
        return replace(self, user_batch_arguments=user_batch_arguments)

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
        others: BatchArguments = {
            **dict.fromkeys(self.list_arguments, "each"),
            **dict.fromkeys(self.second_dim_arguments, 1),
        }
        more = {**names, **dict.fromkeys(self.batch_arguments), **others}
        for name, inner in self.user_batch_arguments.items():
            known = more.get(name)
            both = isinstance(inner, Mapping) and isinstance(known, Mapping)
            more[name] = {**known, **inner} if both else inner  # type: ignore[dict-item]
        return more


@dataclass(frozen=True)
class LayerLayout:
    """
    Which layers of a denoiser attend to the text, and which of them are gated.

    Args:
        cross_attention_suffixes (`tuple` of `str`): How the names of layers with cross-attention end. Without any, a
            flag of the layers says it.
        ungated_layers (`tuple` of `str`): Parts of the names of layers that are never gated: they attend to no text, or
            to something that changes from step to step.
        optional_layers (`Mapping`): Parts of the names of layers that run only where an argument is given, and the name
            of that argument.
        decoupled_image_attention (`bool`): Whether added keys (of an image) have a softmax apart from that of the text.
        averages_when_dropped (`bool`): Whether the mean of both halves is cached where guidance is dropped. Otherwise
            the active half is.
        gates_cross_by_default (`bool`): Whether cross-attention is gated by default; for videos its outputs are large.
        joint (`bool`): Whether text and image share one softmax. Then no layer is gated, but guidance alone.
    """

    cross_attention_suffixes: tuple[str, ...] = ()
    ungated_layers: tuple[str, ...] = ()
    optional_layers: Mapping[str, str] = field(default_factory=dict)
    decoupled_image_attention: bool = False
    averages_when_dropped: bool = True
    gates_cross_by_default: bool = True
    joint: bool = False

    def is_inactive(self, name: str, given: Mapping[str, Any]) -> bool:
        """Whether the layer of this name does not run in a call with these arguments."""
        return any(part in name and given.get(argument) is None for part, argument in self.optional_layers.items())

    def is_gateable(self, name: str) -> bool:
        """Whether the layer of this name may be gated."""
        return not self.joint and not any(part in name for part in self.ungated_layers)

    def is_cross_attention(self, name: str, layer: Any) -> bool:
        """Whether the layer of this name attends to the text."""
        if self.cross_attention_suffixes:
            return self.is_gateable(name) and name.removesuffix(".processor").endswith(self.cross_attention_suffixes)
        return self.is_gateable(name) and bool(getattr(layer, "is_cross_attention", False))


@dataclass(frozen=True)
class GuidanceLayout:
    """
    Which calls guidance is made of, and with which scale.

    Args:
        calls_per_step (`int`): Calls of the denoiser that guidance is made of: 1, or 2, the conditional one first.
        auxiliary_calls (`Mapping` of `str` to `AuxiliaryScale`): Arguments that mark further calls in a step, and what
            guidance multiplies their difference from the conditional half with. Half steps run them as without T-GATE.
        is_prepare_call (`Callable`, *optional*): Whether a call with these arguments prepares the loop. It runs as
            without T-GATE.
        scale_attributes (`tuple` of `str`): The attributes of a pipeline that hold its guidance scales, if it has
            several.
        scale_offset (`float`): What is added to `guidance_scale` before guidance multiplies the difference with it,
            counted from the unconditional half.
        rereads_scale (`bool`): Whether loops that do not report their guidance read `guidance_scale` anew in every
            step.
        has_momentum (`bool`): Whether guidance remembers that of the steps before, so that two equal halves do not end
            it.
    """

    calls_per_step: int = 1
    auxiliary_calls: Mapping[str, AuxiliaryScale] = field(default_factory=dict)
    is_prepare_call: Callable[[Mapping[str, Any]], bool] | None = None
    scale_attributes: tuple[str, ...] = ()
    scale_offset: float = 0.0
    rereads_scale: bool = False
    has_momentum: bool = False

    def is_auxiliary_call(self, given: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments is a further one, outside the two halves of guidance."""
        prepares = self.is_prepare_call is not None and self.is_prepare_call(given)
        return prepares or self.auxiliary_scale_of(given) is not None

    def auxiliary_scale_of(self, given: Mapping[str, Any]) -> AuxiliaryScale | None:
        """The scale of a further call with these arguments, unless it prepares the loop or is one of the halves."""
        # An empty list of layers to skip makes a further call too.
        marked = (name for name in self.auxiliary_calls if given.get(name) is not None and given[name] is not False)
        return next((self.auxiliary_calls[name] for name in marked), None)


@dataclass(frozen=True)
class Layout(BatchLayout, LayerLayout, GuidanceLayout):
    """The batch, the layers and the guidance of a family of denoisers. It takes what these three take."""
