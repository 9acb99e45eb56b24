"""diffusers' guiders: which of them can be gated, and how T-GATE stands in for them during a call."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

from ..attention.layers import GatedLayers
from ..caches.detect import detect_caches, reject_caches_on_controlnet
from ..caches.foreign_forwards import ForeignForwards
from ..denoiser.spec import Layout
from ..families import ResolvedPipeline
from ..plan.schedule import TGateSchedule
from ..plan.step_plan import CFGHalf
from ..run.guider_run import GuiderPipelineCall, GuiderRun
from ..run.messages import warn_ungated_processors
from .cleanup import Cleanup
from .installation import Installation

# What makes a guider's two predictions and its output of them. Who changes none of it guides as its base class does.
_ARITHMETIC = ("__call__", "forward", "num_conditions", "prepare_inputs", "prepare_inputs_from_block_state")
_DENOISERS = ("unet", "transformer", "transformer_2")
_NO_LAYER_IS_GATED = Layout(joint=True, calls=2)


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


def check_settings(
    pipe: Any,
    schedule: TGateSchedule,
    cfg_half: CFGHalf | None,
    cross_attention: bool | None,
    max_memory: int | None,
    deepcache: Any,
    own: tuple[str, ...] | None,
) -> None:
    """Refuse what is about attention layers: a guider is guidance alone."""
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
    if own:
        raise ValueError(
            f"batch_arguments={own!r} has no effect: {type(pipe).__name__} guides by calls of their own, and no batch "
            "is halved. Leave it out."
        )
    if deepcache is not None:
        raise ValueError(f"deepcache is not possible: {subject}. Leave deepcache out, and call helper.disable().")


def check_guiders(pipe: Any) -> None:
    """Refuse a pipeline without a guider, or with one that does not guide by the difference of two predictions."""
    subject, guiders = type(pipe).__name__, guiders_of(pipe)
    if not guiders:
        raise ValueError(
            f"{subject} cannot be gated: it has no guider, so there is no half of guidance that could be left out. "
            "What helps there are fewer steps, half precision and torch.compile."
        )
    plain = sys.modules["diffusers.guiders"].ClassifierFreeGuidance
    for name, guider in guiders.items():
        if all(getattr(type(guider), part, None) is getattr(plain, part, None) for part in _ARITHMETIC):
            continue
        predictions = guider._input_predictions
        what = f"combines {len(predictions)} predictions ({', '.join(predictions)})"
        if len(predictions) == 2:
            what = "makes something else of its two predictions"
        other = f"{name}=ClassifierFreeGuidance(guidance_scale=...)"
        raise ValueError(
            f"{subject} cannot be gated with {name}={type(guider).__name__}: T-GATE leaves out one half of plain "
            f"classifier-free guidance, and this guider {what}. Give another one, "
            f"{f'pipe.update_components({other})' if is_modular(pipe) else f'pipe.{other}'}, or use it without T-GATE."
        )


class GuiderInstallation(Installation):
    """
    What is installed in a pipeline that has a guider: nothing but its class.

    Guiders are exchanged by the user whenever another scale is wanted, so T-GATE stands in for those that are there
    when a call begins, and puts them back when it ends.
    """

    def enter(self, pipe: Any, found: ResolvedPipeline | None = None) -> None:
        """Refuse what cannot be gated; there is nothing to put in before a call."""
        check_guiders(pipe)
        for denoiser in _denoisers(pipe):
            reason = "guidance is a guider here, and what a cache keeps of a call that T-GATE leaves out is not known"
            detect_caches(denoiser, self.state.schedule, reason=reason)
        for controlnet in _controlnets(pipe):
            reject_caches_on_controlnet(controlnet)
        self._forwards(pipe).check()

    def guide(self, pipe: Any, ending: Cleanup) -> GuiderRun:
        """Stand in for the guiders of a pipeline until the call ends."""
        self.enter(pipe)
        state, call = self.state, GuiderPipelineCall(pipe)
        left_alone = [name for denoiser in _denoisers(pipe) for name in self._left_alone(denoiser)]
        if left_alone:
            warn_ungated_processors(state, call, left_alone)
        run = GuiderRun(state, call, self._forwards(pipe), can_skip_half=not left_alone)
        stand_ins = {name: (guider, _stand_in(guider, run)) for name, guider in guiders_of(pipe).items()}

        def end() -> None:
            for name, (guider, ours) in stand_ins.items():
                if vars(pipe).get(name) is ours:
                    vars(pipe)[name] = guider
            self.end_run(pipe, run, (), completed=ending.completed)

        ending.undo(end)
        for name, (_, ours) in stand_ins.items():
            # Not by `setattr`, by which some pipelines note in their configuration what they have.
            vars(pipe)[name] = ours
        return run

    def _forwards(self, pipe: Any) -> ForeignForwards:
        """What the denoisers do when they are called."""
        return ForeignForwards(_denoisers(pipe) + _controlnets(pipe), self.custom_forwards)

    def _left_alone(self, denoiser: Any) -> list[str]:
        """The layers whose processors may count their calls."""
        layers = GatedLayers(denoiser, self.state, self.custom, _NO_LAYER_IS_GATED)
        layers.discover()
        return layers.regate_replaced()


class _GatedGuider:
    """What a guider does with T-GATE, for a class generated with that of the guider."""

    __slots__ = ("_run",)
    _run: GuiderRun

    @property
    def num_conditions(self) -> int:
        """How many predictions a step takes."""
        asked: int = super().num_conditions  # type: ignore[misc]
        return 1 if self._run.skips_unconditional(self) else asked

    def new(self, **changed: Any) -> Any:
        """Another guider is one without T-GATE, until the next call."""
        guider: Any = self
        return type(self).__mro__[2].from_config(guider.config, **changed)  # type: ignore[attr-defined]

    def set_state(self, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        super().set_state(*args, **kwargs)  # type: ignore[misc]
        guider: Any = self
        guided = super().num_conditions > 1  # type: ignore[misc]
        self._run.begin_step(self, guider._step, guider._num_inference_steps, guided=guided)

    def prepare_inputs(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """The halves get their inputs."""
        if isinstance(data, Mapping):
            self._run.set_conditions(data)
        return super().prepare_inputs(data, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any, *args: Any, **kwargs: Any) -> Any:
        """The same, by the names of what is in a block's state."""
        own = {name: fields for name, fields in input_fields.items() if isinstance(fields, tuple)}
        self._run.set_conditions(
            {name: tuple(getattr(data, each, None) for each in fields) for name, fields in own.items()}
        )
        return super().prepare_inputs_from_block_state(data, input_fields, *args, **kwargs)  # type: ignore[misc]

    def forward(self, pred_cond: Any, pred_uncond: Any = None) -> Any:
        """The predictions of the step are there: give the guided output."""
        guider: Any = self
        guided = super().num_conditions > 1  # type: ignore[misc]
        if self._run.skips_unconditional(self):
            pred_uncond = self._run.make_unconditional(pred_cond)
            # The prediction that was left out, as if it had been prepared.
            guider._count_prepared += 1
        elif guided:
            scale = guider.guidance_scale + (1 if guider.use_original_formulation else 0)
            self._run.record((pred_cond, pred_uncond), scale)
        output = super().forward(pred_cond, pred_uncond)  # type: ignore[misc]
        self._run.end_step(guided=guided)
        return output


def _stand_in(guider: Any, run: GuiderRun) -> Any:
    """A guider that shares everything with another one, and asks a run how many predictions it takes."""
    guider_class: Any = type(guider)
    generated = _stand_in_class(guider_class)
    ours = generated.__new__(generated)
    ours.__dict__ = guider.__dict__
    ours._run = run
    return ours


@functools.cache
def _stand_in_class(guider_class: Any) -> Any:
    """The class of such a guider, under the same name."""
    body = {"__module__": guider_class.__module__, "__qualname__": guider_class.__qualname__}
    return type(guider_class.__name__, (_GatedGuider, guider_class), body)


def _denoisers(pipe: Any) -> list[Any]:
    """The denoisers of a pipeline."""
    return [part for name in _DENOISERS if (part := getattr(pipe, name, None)) is not None]


def _controlnets(pipe: Any) -> list[Any]:
    """What it calls before them."""
    return [part for part in (getattr(pipe, "controlnet", None),) if part is not None]
