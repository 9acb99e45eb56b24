"""What differs between pipelines, as data; and whether a pipeline can be gated, with the reason if not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from .layers import attention_modules
from .schedule import CFGHalf, TGateSchedule


@dataclass(frozen=True)
class Family:
    """A kind of denoiser, by the name of its class (its subclasses count too)."""

    denoiser_class: str
    attribute: str
    kept_half: CFGHalf


# Guidance of two parts is one batch `[unconditional, conditional]` in all of these. `kept_half` is what the published
# implementation feeds after the gate.
FAMILIES = (
    Family("UNet2DConditionModel", "unet", "unconditional"),
    Family("UNetMotionModel", "unet", "unconditional"),
    Family("UNetSpatioTemporalConditionModel", "unet", "conditional"),
    Family("PixArtTransformer2DModel", "transformer", "unconditional"),
)

# These lack `callback_on_step_end`, `num_timesteps` or `do_classifier_free_guidance`, but are known to call the
# denoiser once for each of `scheduler.timesteps` and to guide where `guidance_scale > 1`. The value is the half that
# stays, where it is another one than the denoiser's.
LEGACY_PIPELINES: dict[str, CFGHalf | None] = {
    "PixArtAlphaPipeline": None,
    "PixArtSigmaPipeline": None,
    "PixArtSigmaPAGPipeline": None,
    "StableDiffusionAdapterPipeline": None,
    # Its unconditional half has no boxes.
    "StableDiffusionGLIGENPipeline": "conditional",
    "StableDiffusionImageVariationPipeline": None,
    "StableDiffusionLatentUpscalePipeline": None,
    "StableDiffusionUpscalePipeline": None,
    "StableDiffusionXLAdapterPipeline": None,
    "StableDiffusionXLInstructPix2PixPipeline": None,
}

# Arguments of a pipeline's call that give away guidance of more or other parts than two halves. It stays on after the
# gate, every part keeps a cross-attention of its own, and the batch is not touched.
WHOLE_GUIDANCE_ARGUMENTS = ("image_guidance_scale", "pag_scale")

# Arguments of a pipeline's call that give away a loop, or a batch, of a shape that changes from step to step.
REFUSED_ARGUMENTS = {
    "edit_guidance_scale": "semantic guidance adds a part to the batch for every edit",
    "view_batch_size": "it denoises several views in every step",
}


@dataclass(frozen=True)
class Found:
    """
    How a pipeline is gated.

    `kept_half` is the half of guidance that stays (`None`: all of it), `controlnet` what else runs in a step. `vouched`
    says whether the loop is diffusers' own, so that the tables here hold for it, and `by_forward` whether a pipeline
    without step callbacks calls its denoiser once for each of `scheduler.timesteps`.
    """

    denoiser: torch.nn.Module
    attribute: str
    kept_half: CFGHalf | None
    controlnet: torch.nn.Module | None
    vouched: bool
    by_forward: bool

    def is_of(self, pipe: Any) -> bool:
        """Whether the pipeline still has these parts."""
        controlnet = getattr(pipe, "controlnet", None)
        return getattr(pipe, self.attribute, None) is self.denoiser and controlnet is self.controlnet


def find_family(pipe: Any) -> Found:
    """Find out how a pipeline is gated, or raise a `ValueError` with the reason why it cannot be."""
    subject = type(pipe).__name__
    parameters = _parameters(type(pipe))
    for argument, reason in REFUSED_ARGUMENTS.items():
        if argument in parameters:
            raise ValueError(f"{subject} cannot be gated: {reason}. Use it without T-GATE.")
    family, denoiser = _find_denoiser(pipe, subject)
    check_attention(denoiser, subject)
    check_mode(pipe)
    call = inspect.unwrap(type(pipe).__call__)
    vouched = call.__module__.split(".")[0] == "diffusers"
    legacy = [base.__name__ for base in type(pipe).__mro__ if base.__name__ in LEGACY_PIPELINES]
    ticks = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    if not legacy:
        _check_loop(type(pipe), ticks, subject)
    kept_half: CFGHalf | None = (LEGACY_PIPELINES[legacy[0]] if legacy else None) or family.kept_half
    if any(argument in parameters for argument in WHOLE_GUIDANCE_ARGUMENTS):
        kept_half = None
    controlnet = getattr(pipe, "controlnet", None)
    return Found(denoiser, family.attribute, kept_half, controlnet, vouched, by_forward=not ticks)


def _parameters(pipeline_class: type) -> set[str]:
    """Arguments of a pipeline's call, and of those that it may hand them on to."""
    calls = (vars(base)["__call__"] for base in pipeline_class.__mro__ if "__call__" in vars(base))
    return {name for call in calls for name in inspect.signature(call).parameters}


def check_half(pipe: Any, found: Found, cfg_half: CFGHalf | None) -> None:
    """Refuse the choice of a half where guidance has none."""
    if cfg_half is not None and found.kept_half is None:
        raise ValueError(
            f"cfg_half={cfg_half!r} has no effect: the guidance of {type(pipe).__name__} is not two halves, so all "
            "of it stays on. Leave cfg_half out."
        )


def check_guidance(pipe: Any, found: Found, schedule: TGateSchedule) -> None:
    """Refuse to predict guidance that has no two halves."""
    if schedule.predicts and found.kept_half is None:
        what = 'gate_step="auto"' if schedule.is_auto else 'guidance="predict"'
        raise ValueError(
            f"{what} predicts guidance, and that of {type(pipe).__name__} is not two halves, so all of it stays on. "
            "Give gate_step as a number of steps to reuse cross-attention alone, apply_tgate(pipe, 10)."
        )


def check_mode(pipe: Any) -> None:
    """Refuse a mode that a pipeline can be switched to at any time."""
    if getattr(pipe, "free_noise_enabled", False):
        raise ValueError(
            f"{type(pipe).__name__} cannot be gated with FreeNoise: its attention layers run once for every window of "
            "frames, so there is no one output to keep. Call pipe.disable_free_noise() or remove_tgate(pipe)."
        )


def family_of(denoiser: torch.nn.Module) -> Family | None:
    """The family of a denoiser, if it is known."""
    # `torch.compile(pipe.unet)` wraps the module.
    names = [base.__name__ for base in type(getattr(denoiser, "_orig_mod", denoiser)).__mro__]
    return next((family for family in FAMILIES if family.denoiser_class in names), None)


def _find_denoiser(pipe: Any, subject: str) -> tuple[Family, torch.nn.Module]:
    """The part of a pipeline that is called in every step."""
    seen = []
    for attribute in ("unet", "transformer"):
        denoiser = getattr(pipe, attribute, None)
        if denoiser is None:
            continue
        family = family_of(denoiser)
        if family is not None and family.attribute == attribute:
            return family, denoiser
        inner = getattr(denoiser, "_orig_mod", denoiser)
        check_attention(inner, subject)
        seen.append(f"{attribute}={type(inner).__name__}")
    if not seen:
        raise ValueError(f"{subject} cannot be gated: {_why_no_denoiser(pipe)}")
    known = ", ".join(family.denoiser_class for family in FAMILIES)
    raise ValueError(
        f"{subject} cannot be gated: T-GATE does not know how {' and '.join(seen)} does guidance. It knows {known}."
    )


def _why_no_denoiser(pipe: Any) -> str:
    """Why a pipeline has neither a UNet nor a transformer."""
    # `T2IAdapter` and the like have no attention; text encoders are not diffusers' own.
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    others = [f"{name}={type(part).__name__}" for name, part in parts.items() if attention_modules(part)]
    if "unet" in pipe.components or "transformer" in pipe.components:
        return "it has no `unet` or `transformer` at present. Load one first."
    if others:
        return (
            f"it denoises with {' and '.join(others)}, whose attention joins the text with other keys, so there is no "
            "cross-attention output to keep. Use it without T-GATE."
        )
    return "it has no denoiser that T-GATE knows, `unet` or `transformer`. Use it without T-GATE."


def check_attention(denoiser: torch.nn.Module, subject: str) -> None:
    """Refuse a denoiser that has no cross-attention of its own to keep."""
    modules = list(attention_modules(denoiser).values())
    inner = getattr(denoiser, "_orig_mod", denoiser)
    name = type(inner).__name__
    if any(_is_joint(module) for module in (*modules, *inner.modules())):
        raise ValueError(
            f"{subject} cannot be gated: {name} has joint attention (text and image share one softmax), so there is no "
            "cross-attention output to keep. What helps there are diffusers' own caches, where the model has them "
            "(pipe.transformer.enable_cache(FirstBlockCacheConfig())), fewer steps, and torch.compile."
        )
    if not modules:
        raise ValueError(f"{subject} cannot be gated: {name} has no attention layers.")
    if not any(getattr(module, "is_cross_attention", True) for module in modules):
        raise ValueError(f"{subject} cannot be gated: {name} has no cross-attention layers.")


def _is_joint(module: Any) -> bool:
    """Whether a layer mixes keys of text and image, or its output with the residual."""
    if getattr(module, "added_kv_proj_dim", None) is not None or getattr(module, "add_k_proj", None) is not None:
        return True
    return "Joint" in type(getattr(module, "processor", None)).__name__


def _check_loop(pipeline_class: type, ticks: bool, subject: str) -> None:
    """Refuse a pipeline that does not tell its steps or its guidance."""
    missing = [
        name
        for name, there in (
            ("callback_on_step_end", ticks),
            ("num_timesteps", hasattr(pipeline_class, "num_timesteps")),
            ("do_classifier_free_guidance", hasattr(pipeline_class, "do_classifier_free_guidance")),
        )
        if not there
    ]
    if missing:
        raise ValueError(
            f"{subject} cannot be gated: it has no {', no '.join(missing)}, so its steps and its guidance are not "
            "known. Use it without T-GATE."
        )
