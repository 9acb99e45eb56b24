"""How a pipeline is gated, or the reason why it cannot be."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from ..plan.schedule import TGateSchedule
from ..plan.step_plan import CFGHalf
from .catalog import family_of, known
from .family import Family
from .unsupported import (
    INSTEAD,
    check_attention,
    check_denoiser,
    check_dropped,
    check_loop,
    check_mode,
    check_module,
    check_self_attention,
    check_text,
    why_distilled,
    why_no_denoiser,
)

# Arguments of a pipeline's call that give away guidance of more or other parts than two halves. It stays on after the
# gate, every part keeps a cross-attention of its own, and the batch is not touched.
WHOLE_GUIDANCE_ARGUMENTS = ("image_guidance_scale", "pag_scale")

# By this property pipelines say whether they guide.
_GUIDES = "do_classifier_free_guidance"


@dataclass(frozen=True)
class ResolvedPipeline:
    """
    How a pipeline is gated.

    `family` says what is known of its denoiser, `second` is another one that takes over in the loop. `kept_half` is
    the half of guidance that stays (`None`: all of it), `controlnet` what else runs in a step. `is_diffusers_loop` says
    whether the tables here hold for the loop, `counts_forwards` whether a pipeline without step callbacks calls its
    denoiser once for each of `scheduler.timesteps`, `supports_cfg` whether it can have guidance of two halves, and
    `attribute` where the pipeline has the denoiser.
    """

    denoiser: torch.nn.Module
    family: Family
    kept_half: CFGHalf | None
    controlnet: torch.nn.Module | None
    is_diffusers_loop: bool
    counts_forwards: bool
    supports_cfg: bool = True
    second: torch.nn.Module | None = None
    attribute: str = ""

    @property
    def denoisers(self) -> tuple[torch.nn.Module, ...]:
        """What is called in the steps of the loop."""
        return (self.denoiser,) if self.second is None else (self.denoiser, self.second)

    def is_of(self, pipe: Any) -> bool:
        """Whether the pipeline still has these parts."""
        attribute, second = _places(pipe, self.family)
        same = getattr(pipe, "controlnet", None) is self.controlnet and second is self.second
        return same and getattr(pipe, attribute, None) is self.denoiser


def resolve_pipeline(pipe: Any, cross_attention: bool | None = None) -> ResolvedPipeline:
    """Find out how a pipeline is gated, or raise a `ValueError` with the reason why it cannot be."""
    subject = type(pipe).__name__
    parameters = _parameters(type(pipe))
    check_loop(subject, parameters)
    family, denoiser = _find_denoiser(pipe, subject, cross_attention)
    legacy = [base.__name__ for base in type(pipe).__mro__ if base.__name__ in family.pipelines_without_callback]
    # By a negative prompt, whatever the denoiser is told besides; the call says whether it does.
    by_negative = "true_cfg_scale" in parameters
    # Such a denoiser is guided by what it is told (Sana Sprint), in a batch of one half.
    embedded = distilled_by(denoiser) is not None and not by_negative
    call = inspect.unwrap(type(pipe).__call__)
    is_diffusers_loop = call.__module__.split(".")[0] == "diffusers"
    ticks = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    tells = legacy or by_negative or hasattr(type(pipe), _GUIDES)
    if family.layout.joint and (embedded or not tells):
        if not (embedded or is_diffusers_loop):
            # A loop of someone else's may well guide, and not say so.
            _check_loop(type(pipe), ticks, subject, supports_cfg=True)
        raise ValueError(why_distilled(denoiser, subject))
    attribute, second = _places(pipe, family)
    controlnet = getattr(pipe, "controlnet", None)
    for name, part in ((family.second, second), ("controlnet", controlnet)):
        if part is not None:
            check_module(part, str(name), subject)
    for part in (denoiser, second):
        if part is not None:
            check_attention(part, subject, family.layout, cross_attention)
    check_mode(pipe)
    check_text(pipe, cross_attention)
    if (family.layout.calls > 1 or family.layout.entries) and not is_diffusers_loop:
        what = "half of its batch" if family.layout.entries else "of its calls of the denoiser"
        raise ValueError(
            f"{subject} cannot be gated: its loop is not diffusers' own, and which {what} is the unconditional one "
            f"cannot be told. Use the pipeline of diffusers that it derives from. {INSTEAD}"
        )
    if not legacy:
        _check_loop(type(pipe), ticks, subject, supports_cfg=not embedded and not by_negative)
    names = {base.__name__ for base in type(pipe).__mro__}
    kept_half: CFGHalf | None = "conditional" if names & {*family.conditional_in} else family.kept_half
    if any(argument in parameters for argument in WHOLE_GUIDANCE_ARGUMENTS):
        kept_half = None
    return ResolvedPipeline(
        denoiser,
        family,
        kept_half,
        controlnet,
        is_diffusers_loop,
        counts_forwards=not ticks,
        supports_cfg=not embedded,
        second=second,
        attribute=attribute,
    )


def distilled_by(denoiser: Any) -> str | None:
    """The setting that says that a denoiser has its guidance in itself, so that pipelines give it no other half."""
    config = denoiser.config
    if getattr(config, "model_version", None) == "turbo":
        return "model_version"
    return next((name for name in ("guidance_embeds", "is_turbo") if getattr(config, name, False)), None)


def _places(pipe: Any, family: Family) -> tuple[str, torch.nn.Module | None]:
    """Where the pipeline has its denoiser, and the one that takes over in the loop, if there is one."""
    second = getattr(pipe, family.second, None) if family.second else None
    if family.second and second is not None and getattr(pipe, family.attribute, None) is None:
        # One of two that are loaded in turn.
        return family.second, None
    return family.attribute, second


def _parameters(pipeline_class: type) -> set[str]:
    """Arguments of a pipeline's call, and of those that it may hand them on to."""
    calls = (vars(base)["__call__"] for base in pipeline_class.__mro__ if "__call__" in vars(base))
    return {name for call in calls for name in inspect.signature(call).parameters}


def check_half(pipe: Any, found: ResolvedPipeline, cfg_half: CFGHalf | None) -> None:
    """Refuse the choice of a half where guidance has none."""
    if cfg_half is not None and found.kept_half is None:
        raise ValueError(
            f"cfg_half={cfg_half!r} has no effect: the guidance of {type(pipe).__name__} is not two halves, so all "
            "of it stays on. Leave cfg_half out."
        )
    if cfg_half == "unconditional" and found.family.layout.beside:
        raise ValueError(
            f"cfg_half={cfg_half!r} is not possible: {type(pipe).__name__} guides by further calls too, and compares "
            "them with the conditional half. Leave cfg_half out."
        )
    if cfg_half == "unconditional" and found.family.layout.calls > 1:
        raise ValueError(
            f"cfg_half={cfg_half!r} is not possible: the guidance of {type(pipe).__name__} is two calls of its "
            "denoiser, the conditional one first, and it is the second one that is left out. Leave cfg_half out."
        )


def check_own(pipe: Any, found: ResolvedPipeline, names: tuple[str, ...] | None) -> None:
    """Refuse arguments that no denoiser of a pipeline takes, or where no batch is halved."""
    if names and (found.kept_half is None or found.family.layout.calls > 1):
        raise ValueError(
            f"batch_arguments={names!r} has no effect: the guidance of {type(pipe).__name__} is not two halves of one "
            "batch. Leave it out."
        )
    module = getattr(found.denoiser, "_orig_mod", found.denoiser)
    parameters = inspect.signature(type(module).forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in names or ():
        if name.partition(".")[0] not in parameters:
            raise ValueError(
                f"batch_arguments={names!r}: {type(module).__name__} has no argument {name.partition('.')[0]!r}. It "
                f"has {', '.join(list(parameters)[1:])}."
            )


def check_guidance(
    pipe: Any, found: ResolvedPipeline, schedule: TGateSchedule, cross_attention: bool | None = None
) -> None:
    """Refuse to predict guidance that has no two halves, or to gate it alone, and to reuse what is joint."""
    joint = found.family.layout.joint
    if (joint or cross_attention is False) and found.kept_half is None:
        alone = (
            "where attention is joint, guidance alone is gated"
            if joint
            else "cross_attention=False gates guidance alone"
        )
        raise ValueError(
            f"{alone}, and that of {type(pipe).__name__} is not two halves, so all of it stays on. "
            f"{INSTEAD if joint else 'Leave cross_attention out.'}"
        )
    if found.supports_cfg:
        check_dropped(type(pipe).__name__, found.family.layout, schedule)
    check_self_attention(found.denoiser, type(pipe).__name__, found.family.layout, schedule)
    if schedule.predicts and found.kept_half is None:
        what = 'gate_step="auto"' if schedule.is_auto else 'guidance="predict"'
        raise ValueError(
            f"{what} predicts guidance, and that of {type(pipe).__name__} is not two halves, so all of it stays on. "
            "Give gate_step as a number of steps to reuse cross-attention alone, apply_tgate(pipe, 10)."
        )


def _find_denoiser(pipe: Any, subject: str, cross_attention: bool | None) -> tuple[Family, torch.nn.Module]:
    """The part of a pipeline that is called in every step."""
    seen = []
    for attribute in ("unet", "transformer", "transformer_2"):
        denoiser = getattr(pipe, attribute, None)
        if denoiser is None:
            continue
        check_module(denoiser, attribute, subject)
        family = family_of(denoiser)
        if family is not None and attribute in (family.attribute, family.second):
            return family, denoiser
        inner = getattr(denoiser, "_orig_mod", denoiser)
        check_denoiser(inner, subject)
        if cross_attention is not False:
            check_attention(inner, subject)
        seen.append(f"{attribute}={type(inner).__name__}")
    if not seen:
        raise ValueError(f"{subject} cannot be gated: {why_no_denoiser(pipe)}")
    raise ValueError(
        f"{subject} cannot be gated: T-GATE does not know how {' and '.join(seen)} does guidance. It knows "
        f"{known(joint=cross_attention is False)}. {INSTEAD}"
    )


def _check_loop(pipeline_class: type, ticks: bool, subject: str, *, supports_cfg: bool) -> None:
    """Refuse a pipeline that does not tell its steps or its guidance."""
    missing = [
        name
        for name, there in (
            ("callback_on_step_end", ticks),
            ("num_timesteps", hasattr(pipeline_class, "num_timesteps")),
            (_GUIDES, not supports_cfg or hasattr(pipeline_class, _GUIDES)),
        )
        if not there
    ]
    if missing:
        raise ValueError(
            f"{subject} cannot be gated: it has no {', no '.join(missing)}, so its steps and its guidance are not "
            f"known. {INSTEAD}"
        )
