"""How a pipeline is gated, or the reason why it cannot be."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from ..plan.step_plan import CFGHalf
from .catalog import family_of, supported_names
from .family import Family
from .unsupported import (
    ALTERNATIVES,
    check_attention,
    check_denoiser,
    check_module,
    no_denoiser_message,
    reject_class_conditioned,
    reject_free_noise,
    reject_unsupported_loop,
)

# Arguments of a pipeline's call that give away guidance of more or other parts than two halves. It stays on after the
# gate, every part keeps a cross-attention of its own, and the batch is not touched.
MULTI_PART_GUIDANCE_ARGUMENTS = ("image_guidance_scale", "pag_scale")

# By this property pipelines report whether they guide.
_CFG_PROPERTY = "do_classifier_free_guidance"


@dataclass(frozen=True)
class ResolvedPipeline:
    """
    How a pipeline is gated.

    `family` describes its denoiser, `second_denoiser` is another one that takes over in the loop. `default_cfg_half` is
    the active half where guidance is dropped (`None`: all of guidance stays), `controlnet` what else runs in a step.
    `is_diffusers_loop` says whether what is known of the class holds for the loop, `counts_forwards` whether a pipeline
    without step callbacks calls its denoiser once for each of `scheduler.timesteps`, `supports_cfg` whether it can have
    guidance of two halves, and `attribute` which attribute of the pipeline holds the denoiser. `is_distilled` says that
    it has joint attention and no guidance of two halves, so that nothing but whole steps can be left out.
    """

    denoiser: torch.nn.Module
    family: Family
    default_cfg_half: CFGHalf | None
    controlnet: torch.nn.Module | None
    is_diffusers_loop: bool
    counts_forwards: bool
    supports_cfg: bool = True
    second_denoiser: torch.nn.Module | None = None
    attribute: str = ""
    is_distilled: bool = False

    @property
    def denoisers(self) -> tuple[torch.nn.Module, ...]:
        """The denoisers that are called in the loop."""
        return (self.denoiser,) if self.second_denoiser is None else (self.denoiser, self.second_denoiser)

    def is_of(self, pipe: Any) -> bool:
        """Whether the pipeline still has these parts."""
        attribute, second_denoiser = _denoiser_attributes(pipe, self.family)
        same = getattr(pipe, "controlnet", None) is self.controlnet and second_denoiser is self.second_denoiser
        return same and getattr(pipe, attribute, None) is self.denoiser


def resolve_pipeline(pipe: Any, cross_attention: bool | None = None) -> ResolvedPipeline:
    """Find out how a pipeline is gated, or raise a `ValueError` with the reason why it cannot be."""
    subject = type(pipe).__name__
    parameters = _parameters(type(pipe))
    reject_unsupported_loop(subject, parameters)
    family, denoiser = _find_denoiser(pipe, subject, cross_attention)
    legacy = [base.__name__ for base in type(pipe).__mro__ if base.__name__ in family.pipelines_without_callback]
    # Guidance by a negative prompt, whatever other scale is an input of the denoiser. The arguments say if it is on.
    by_negative = "true_cfg_scale" in parameters
    # Such a denoiser has the guidance scale as an input (Sana Sprint), with a batch of one half.
    embedded = guidance_distillation_flag(denoiser) is not None and not by_negative
    call = inspect.unwrap(type(pipe).__call__)
    is_diffusers_loop = call.__module__.split(".")[0] == "diffusers"
    has_step_callback = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    reports_cfg = legacy or by_negative or hasattr(type(pipe), _CFG_PROPERTY)
    # A loop of someone else's may well guide, and not say so.
    is_distilled = family.layout.joint and (embedded or not (reports_cfg or not is_diffusers_loop))
    attribute, second_denoiser = _denoiser_attributes(pipe, family)
    controlnet = getattr(pipe, "controlnet", None)
    for name, part in ((family.second_denoiser, second_denoiser), ("controlnet", controlnet)):
        if part is not None:
            check_module(part, str(name), subject)
    for part in (denoiser, second_denoiser):
        if part is not None:
            check_attention(part, subject, family.layout, cross_attention)
    reject_free_noise(pipe)
    reject_class_conditioned(pipe, cross_attention)
    if not is_diffusers_loop:
        _check_order_of_halves(family, subject)
    if not legacy:
        says_cfg = not (embedded or by_negative or is_distilled)
        _check_loop(type(pipe), has_step_callback, subject, supports_cfg=says_cfg)
    names = {base.__name__ for base in type(pipe).__mro__}
    default_cfg_half: CFGHalf | None = (
        "conditional" if names & {*family.conditional_half_pipelines} else family.default_cfg_half
    )
    if is_distilled or any(argument in parameters for argument in MULTI_PART_GUIDANCE_ARGUMENTS):
        default_cfg_half = None
    return ResolvedPipeline(
        denoiser,
        family,
        default_cfg_half,
        controlnet,
        is_diffusers_loop,
        counts_forwards=not has_step_callback,
        supports_cfg=not (embedded or is_distilled),
        second_denoiser=second_denoiser,
        attribute=attribute,
        is_distilled=is_distilled,
    )


def guidance_distillation_flag(denoiser: Any) -> str | None:
    """The setting of a denoiser that says that guidance is distilled into it, if there is one."""
    config = denoiser.config
    if getattr(config, "model_version", None) == "turbo":
        return "model_version"
    return next((name for name in ("guidance_embeds", "is_turbo") if getattr(config, name, False)), None)


def _denoiser_attributes(pipe: Any, family: Family) -> tuple[str, torch.nn.Module | None]:
    """The attribute that holds the denoiser, and the denoiser that takes over in the loop, if there is one."""
    second_denoiser = getattr(pipe, family.second_denoiser, None) if family.second_denoiser else None
    if (
        family.second_denoiser
        and second_denoiser is not None
        and getattr(pipe, family.pipeline_attribute, None) is None
    ):
        # One of two that are loaded in turn.
        return family.second_denoiser, None
    return family.pipeline_attribute, second_denoiser


def _parameters(pipeline_class: type) -> set[str]:
    """Arguments of a pipeline's call, and of the inherited calls that it may pass them on to."""
    calls = (vars(base)["__call__"] for base in pipeline_class.__mro__ if "__call__" in vars(base))
    return {name for call in calls for name in inspect.signature(call).parameters}


def _find_denoiser(pipe: Any, subject: str, cross_attention: bool | None) -> tuple[Family, torch.nn.Module]:
    """The part of a pipeline that is called in every step."""
    unsupported = []
    for attribute in ("unet", "transformer", "transformer_2"):
        denoiser = getattr(pipe, attribute, None)
        if denoiser is None:
            continue
        check_module(denoiser, attribute, subject)
        family = family_of(denoiser)
        if family is not None and attribute in (family.pipeline_attribute, family.second_denoiser):
            return family, denoiser
        inner = getattr(denoiser, "_orig_mod", denoiser)
        check_denoiser(inner, subject)
        if cross_attention is not False:
            check_attention(inner, subject)
        unsupported.append(f"{attribute}={type(inner).__name__}")
    if not unsupported:
        raise ValueError(f"{subject} cannot be gated: {no_denoiser_message(pipe)}")
    raise ValueError(
        f"{subject} cannot be gated: T-GATE does not know how {' and '.join(unsupported)} does guidance. It knows "
        f"{supported_names(joint=not cross_attention)}. {ALTERNATIVES}"
    )


def _check_order_of_halves(family: Family, subject: str) -> None:
    """Refuse a loop that is not diffusers' own where its denoiser does not show which half is the unconditional one."""
    if family.layout.calls_per_step > 1 or family.layout.list_arguments:
        what = "half of its batch" if family.layout.list_arguments else "of its calls of the denoiser"
        raise ValueError(
            f"{subject} cannot be gated: its loop is not diffusers' own, and which {what} is the unconditional one "
            f"cannot be told. Use the pipeline of diffusers that it derives from. {ALTERNATIVES}"
        )


def _check_loop(pipeline_class: type, has_step_callback: bool, subject: str, *, supports_cfg: bool) -> None:
    """Refuse a pipeline that does not report its steps or its guidance."""
    missing = [
        name
        for name, there in (
            ("callback_on_step_end", has_step_callback),
            ("num_timesteps", hasattr(pipeline_class, "num_timesteps")),
            (_CFG_PROPERTY, not supports_cfg or hasattr(pipeline_class, _CFG_PROPERTY)),
        )
        if not there
    ]
    if missing:
        raise ValueError(
            f"{subject} cannot be gated: it has no {', no '.join(missing)}, so its steps and its guidance are not "
            f"known. {ALTERNATIVES}"
        )
