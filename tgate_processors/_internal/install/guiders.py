"""diffusers' guiders: which of them can be gated, and how T-GATE replaces them during a call."""

from __future__ import annotations

import sys
from typing import Any

from ..attention.layers import CustomProcessors, GatedLayers
from ..attention.state import TGateState
from ..caches.detect import detect_caches, reject_caches_on_controlnet
from ..caches.foreign_forwards import ForeignForwards
from ..denoiser.spec import Layout
from ..families import ResolvedPipeline
from ..plan.schedule import TGateSchedule
from ..plan.step_plan import CFGHalf
from ..run.guider_call import GuiderPipelineCall
from ..run.guider_run import GuiderRun
from ..run.messages import warn_ungated_processors
from ..run.ranks import agreement_of
from .cleanup import Cleanup
from .gated_guider import GatedGuider, can_be_forecast, gate_guider, guides_by_halves
from .installation import Installation

_DENOISERS = ("unet", "transformer", "transformer_2")
_NO_GATED_LAYERS = Layout(joint=True, calls_per_step=2)


def is_modular(pipe: Any) -> bool:
    """Whether something is a modular pipeline of diffusers."""
    # Whoever has one has imported this; importing it here would take seconds.
    module = sys.modules.get("diffusers.modular_pipelines.modular_pipeline")
    return module is not None and isinstance(pipe, module.ModularPipeline)


def guiders_of(pipe: Any) -> dict[str, Any]:
    """The guiders of a pipeline, by name."""
    module = sys.modules.get("diffusers.guiders")
    if module is None:
        return {}
    return {name: part for name, part in vars(pipe).items() if isinstance(part, module.BaseGuidance)}


def has_guider(pipe: Any) -> bool:
    """Whether a guider does the guidance of a pipeline."""
    return is_modular(pipe) or bool(guiders_of(pipe))


def validate_guider_settings(
    pipe: Any,
    schedule: TGateSchedule,
    cfg_half: CFGHalf | None,
    cross_attention: bool | None,
    max_memory: int | None,
    deepcache: Any,
    batch_arguments: tuple[str, ...] | None,
) -> None:
    """Refuse settings of attention layers: with a guider, guidance alone is gated."""
    subject = f"the guidance of {type(pipe).__name__} is a guider, and T-GATE gates guidance alone there"
    intervals = (schedule.sp_interval, schedule.fi_interval)
    if max_memory:
        raise ValueError(f"max_memory={max_memory} is for kept cross-attention: {subject}. Leave max_memory out.")
    if cross_attention:
        raise ValueError(f"cross_attention=True is not possible: {subject}. Leave cross_attention out.")
    if max(intervals) > 1:
        raise ValueError(
            f"sp_interval={intervals[0]} and fi_interval={intervals[1]} reuse self-attention: {subject}. Leave them "
            "out."
        )
    if cfg_half == "unconditional":
        raise ValueError(
            f"cfg_half={cfg_half!r} is not possible: {subject}. It asks for the conditional half first, and the other "
            "one is left out. Leave cfg_half out."
        )
    if batch_arguments:
        raise ValueError(
            f"batch_arguments={batch_arguments!r} has no effect: {type(pipe).__name__} guides by calls of their own, "
            "and no batch is halved. Leave it out."
        )
    if deepcache is not None:
        raise ValueError(f"deepcache is not possible: {subject}. Leave deepcache out, and call helper.disable().")


def validate_guiders(pipe: Any, schedule: TGateSchedule) -> None:
    """Refuse a pipeline without a guider, or with one whose steps can neither be halved nor forecast."""
    subject, guiders = type(pipe).__name__, guiders_of(pipe)
    if not guiders:
        raise ValueError(
            f"{subject} cannot be gated: it has no guider, so there is no half of guidance that could be left out. "
            "You can still use fewer steps, half precision and torch.compile."
        )
    for name, guider in guiders.items():
        if isinstance(guider, GatedGuider):
            raise ValueError(
                f"{subject} has {name}={type(guider).__name__}, which gates it already: use it without apply_tgate, or "
                "give it a ClassifierFreeGuidance."
            )
        if guides_by_halves(guider) or (can_be_forecast(guider) and schedule.forecast):
            continue
        predictions = guider._input_predictions
        what = f"combines {len(predictions)} predictions ({', '.join(predictions)})"
        if len(predictions) == 2:
            what = "makes something else of its two predictions"
        other = f"{name}=ClassifierFreeGuidance(guidance_scale=...)"
        other = f"pipe.update_components({other})" if is_modular(pipe) else f"pipe.{other}"
        why, remedy = "T-GATE leaves out one half of plain classifier-free guidance", f"Give another one, {other}"
        if can_be_forecast(guider):
            why, remedy = f"{why} with these settings", f"Forecast whole steps, apply_tgate(pipe), or give {other}"
        raise ValueError(
            f"{subject} cannot be gated with {name}={type(guider).__name__}: {why}, and this guider {what}. {remedy}, "
            "or use it without T-GATE."
        )


class GuiderInstallation(Installation):
    """
    T-GATE as installed in a pipeline that has a guider: in nothing but its class.

    Users exchange guiders whenever they want another scale, so T-GATE replaces those that are there when a call begins,
    and restores them when it ends.
    """

    def attach(self, pipe: Any, found: ResolvedPipeline | None = None) -> None:
        """Refuse what cannot be gated; nothing is installed before a call."""
        validate_guiders(pipe, self.state.schedule)
        for denoiser in _denoisers(pipe):
            reject_caches(denoiser, self.state.schedule)
        for controlnet in _controlnets(pipe):
            reject_caches_on_controlnet(controlnet)
        self._forwards(pipe).check()

    def gate_guiders(self, pipe: Any, cleanup: Cleanup) -> GuiderRun:
        """Replace the guiders of a pipeline with gated ones until the call ends."""
        self.attach(pipe)
        state, call = self.state, GuiderPipelineCall(pipe)
        ungated = [
            name for each in _denoisers(pipe) for name in ungated_processors(each, state, self.custom_processors)
        ]
        if ungated:
            warn_ungated_processors(state, call, ungated)
        run = GuiderRun(
            state, call, self._forwards(pipe), can_skip_half=not ungated, agree=agreement_of(_denoisers(pipe))
        )
        gated_guiders = {name: (guider, gate_guider(guider, run)) for name, guider in guiders_of(pipe).items()}

        def end() -> None:
            for name, (guider, gated) in gated_guiders.items():
                if vars(pipe).get(name) is gated:
                    vars(pipe)[name] = guider
            self.end_run(pipe, run, (), completed=cleanup.completed)

        cleanup.add(end)
        for name, (_, gated) in gated_guiders.items():
            # Not by `setattr`, by which some pipelines note in their configuration what they have.
            vars(pipe)[name] = gated
        return run

    def _forwards(self, pipe: Any) -> ForeignForwards:
        """The check of each `forward` in the denoisers."""
        return ForeignForwards(_denoisers(pipe) + _controlnets(pipe), self.custom_forwards)


def reject_caches(denoiser: Any, schedule: TGateSchedule) -> None:
    """Refuse other caches on a denoiser."""
    reason = "guidance is a guider here, and what a cache keeps of a call that T-GATE leaves out is not known"
    detect_caches(denoiser, schedule, reason=reason)


def ungated_processors(denoiser: Any, state: TGateState, custom_processors: CustomProcessors | None) -> list[str]:
    """The layers whose processors may count their calls, so that none may be skipped."""
    layers = GatedLayers(denoiser, state, custom_processors, _NO_GATED_LAYERS)
    layers.discover()
    return layers.regate_replaced()


def _denoisers(pipe: Any) -> list[Any]:
    """The denoisers of a pipeline."""
    return [part for name in _DENOISERS if (part := getattr(pipe, name, None)) is not None]


def _controlnets(pipe: Any) -> list[Any]:
    """The ControlNets of a pipeline."""
    return [part for part in (getattr(pipe, "controlnet", None),) if part is not None]
