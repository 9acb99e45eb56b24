"""Which settings mean something for a pipeline that was resolved."""

from __future__ import annotations

import inspect
from typing import Any

from ..plan.schedule import TGateSchedule
from ..plan.step_plan import CFGHalf
from .resolve import ResolvedPipeline, resolve_pipeline
from .unsupported import ALTERNATIVES, check_self_attention, distilled_message, reject_dropping_momentum


def resolve_and_check(
    pipe: Any,
    schedule: TGateSchedule,
    cfg_half: CFGHalf | None,
    cross_attention: bool | None,
    batch_arguments: tuple[str, ...] | None = None,
) -> ResolvedPipeline:
    """Resolve a pipeline, and refuse it if it cannot be gated with these settings."""
    found = resolve_pipeline(pipe, cross_attention)
    check_cfg_half(pipe, found, cfg_half)
    check_guidance_mode(pipe, found, schedule, cross_attention)
    check_batch_arguments(pipe, found, batch_arguments)
    return found


def check_cfg_half(pipe: Any, found: ResolvedPipeline, cfg_half: CFGHalf | None) -> None:
    """Refuse `cfg_half` where guidance has no such half to choose."""
    if cfg_half is not None and found.default_cfg_half is None:
        raise ValueError(
            f"cfg_half={cfg_half!r} has no effect: the guidance of {type(pipe).__name__} is not two halves, so all "
            "of it stays on. Leave cfg_half out."
        )
    if cfg_half == "unconditional" and found.family.layout.auxiliary_calls:
        raise ValueError(
            f"cfg_half={cfg_half!r} is not possible: {type(pipe).__name__} guides by further calls too, and compares "
            "them with the conditional half. Leave cfg_half out."
        )
    if cfg_half == "unconditional" and found.family.layout.calls_per_step > 1:
        raise ValueError(
            f"cfg_half={cfg_half!r} is not possible: the guidance of {type(pipe).__name__} is two calls of its "
            "denoiser, the conditional one first, and it is the second one that is left out. Leave cfg_half out."
        )


def check_batch_arguments(pipe: Any, found: ResolvedPipeline, names: tuple[str, ...] | None) -> None:
    """Refuse arguments that no denoiser of a pipeline takes, or where no batch is halved."""
    if names and (found.default_cfg_half is None or found.family.layout.calls_per_step > 1):
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


def check_guidance_mode(
    pipe: Any, found: ResolvedPipeline, schedule: TGateSchedule, cross_attention: bool | None = None
) -> None:
    """Refuse to predict guidance that has no two halves, or to gate it alone, and to reuse what is joint."""
    joint = found.family.layout.joint
    if found.is_distilled and not schedule.forecast:
        raise ValueError(distilled_message(found.denoiser, type(pipe).__name__))
    if (joint or cross_attention is False) and found.default_cfg_half is None and not schedule.forecast:
        alone = (
            "where attention is joint, guidance alone is gated"
            if joint
            else "cross_attention=False gates guidance alone"
        )
        raise ValueError(
            f"{alone}, and that of {type(pipe).__name__} is not two halves, so all of it stays on. "
            f"{ALTERNATIVES if joint else 'Leave cross_attention out.'}"
        )
    if found.supports_cfg:
        reject_dropping_momentum(type(pipe).__name__, found.family.layout, schedule)
    check_self_attention(found.denoiser, type(pipe).__name__, found.family.layout, schedule)
    if schedule.predicts and found.default_cfg_half is None and not schedule.forecast:
        what = "forecast=False" if schedule.is_auto else f"levels={schedule.levels!r}"
        what = 'guidance="predict"' if schedule.gate_step != "auto" else what
        raise ValueError(
            f"{what} leaves nothing but predicted guidance, and that of {type(pipe).__name__} is not two halves, so "
            "all of it stays on. apply_tgate(pipe) forecasts whole steps, apply_tgate(pipe, 10) reuses cross-attention."
        )
