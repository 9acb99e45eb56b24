"""A guider that asks a run which predictions it needs, in the place of another during a call."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

from ..run.guider_run import GuiderRun

# What makes a guider's two predictions and its output of them. Who changes none of it guides as its base class does.
_CFG_METHODS = ("__call__", "forward", "num_conditions", "prepare_inputs", "prepare_inputs_from_block_state")


class _AskingGuider:
    """What guiders with T-GATE have in common: mixed into a class generated from that of the guider."""

    __slots__ = ("_run",)
    _run: GuiderRun

    def new(self, **changed: Any) -> Any:
        """Make another guider, which is without T-GATE until the next call."""
        guider: Any = self
        return type(self).__mro__[3].from_config(guider.config, **changed)  # type: ignore[attr-defined]

    def prepare_inputs(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare the inputs of the predictions, and note in which they differ."""
        if isinstance(data, Mapping):
            self._run.set_conditions(data)
        if self._run.skips_all(self):
            return []
        return super().prepare_inputs(data, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare the inputs of the predictions from the names of fields in a block's state."""
        pairs = {name: fields for name, fields in input_fields.items() if isinstance(fields, tuple)}
        self._run.set_conditions({name: tuple(getattr(data, each, None) for each in pairs[name]) for name in pairs})
        if self._run.skips_all(self):
            return []
        return super().prepare_inputs_from_block_state(data, input_fields, *args, **kwargs)  # type: ignore[misc]


class GatedGuider(_AskingGuider):
    """A guider of two halves with T-GATE: a step computes both, the conditional one, or none."""

    __slots__ = ()

    @property
    def num_conditions(self) -> int:
        """How many predictions a step takes."""
        if self._run.skips_all(self):
            return 0
        asked: int = super().num_conditions  # type: ignore[misc]
        return 1 if self._run.skips_unconditional(self) else asked

    def set_state(self, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        super().set_state(*args, **kwargs)  # type: ignore[misc]
        guider: Any = self
        guided = super().num_conditions > 1  # type: ignore[misc]
        self._run.begin_step(self, guider._step, guider._num_inference_steps, guided=guided)

    def forward(self, pred_cond: Any = None, pred_uncond: Any = None) -> Any:
        """Compute the guided output from the predictions of the step."""
        guider: Any = self
        guided = super().num_conditions > 1  # type: ignore[misc]
        scale = guider.guidance_scale + (1 if guider.use_original_formulation else 0)
        # Count the skipped predictions as prepared.
        asked = super().num_conditions  # type: ignore[misc]
        guider._count_prepared += asked - self.num_conditions
        pred_cond, pred_uncond = self._run.complete_step(pred_cond, pred_uncond, scale, guided=guided)
        output = super().forward(pred_cond, pred_uncond)  # type: ignore[misc]
        self._run.end_step(guided=guided)
        return output


class ForecastGuider(_AskingGuider):
    """A guider of any other kind with T-GATE: a step computes all of its predictions, or its output is forecast."""

    __slots__ = ()

    @property
    def num_conditions(self) -> int:
        """How many predictions a step takes."""
        asked: int = super().num_conditions  # type: ignore[misc]
        return 0 if self._run.skips_all(self) else asked

    def set_state(self, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        super().set_state(*args, **kwargs)  # type: ignore[misc]
        guider: Any = self
        # Where it begins or ends to combine more of them, its output jumps.
        asked: int = super().num_conditions  # type: ignore[misc]
        self._run.begin_step(self, guider._step, guider._num_inference_steps, guided=False, num_predictions=asked)

    def forward(self, *args: Any, **predictions: Any) -> Any:
        """Compute the guided output from the predictions of the step, or forecast it."""
        kind = sys.modules["diffusers.guiders.guider_utils"].GuiderOutput
        if self._run.skips_all(self):
            output = kind(**dict(zip(("pred", "pred_cond"), self._run.forecast_output(), strict=False)))
        else:
            output = super().forward(*args, **predictions)  # type: ignore[misc]
            if not isinstance(output, kind):
                raise ValueError(
                    f"T-GATE: {type(self).__name__} gave a {type(output).__name__}, where T-GATE expects a "
                    "GuiderOutput, whose `pred` and `pred_cond` it forecasts. Return one, or use it without T-GATE."
                )
            self._run.observe_output(*(part for part in (output.pred, output.pred_cond) if part is not None))
        self._run.end_step(guided=False)
        return output


def guides_by_halves(guider: Any) -> bool:
    """Whether a guider combines two predictions as diffusers' plain guidance does."""
    plain = sys.modules["diffusers.guiders"].ClassifierFreeGuidance
    return all(getattr(type(guider), part, None) is getattr(plain, part, None) for part in _CFG_METHODS)


def can_be_forecast(guider: Any) -> bool:
    """Whether the output of a guider can be forecast: it is called as all are, and no loop asks it for more."""
    base = sys.modules["diffusers.guiders"].BaseGuidance
    return type(guider).__call__ is base.__call__ and not hasattr(guider, "active_predictions")


def gate_guider(guider: Any, run: GuiderRun) -> Any:
    """Make a gated guider, which shares everything with the original and asks a run how many predictions it takes."""
    guider_class: Any = type(guider)
    generated = _gated_guider_class(guider_class, GatedGuider if guides_by_halves(guider) else ForecastGuider)
    gated = generated.__new__(generated)
    gated.__dict__ = guider.__dict__
    gated._run = run
    return gated


@functools.cache
def _gated_guider_class(guider_class: Any, gating: type) -> Any:
    """The class of a gated guider, under the same name."""
    body = {"__module__": guider_class.__module__, "__qualname__": guider_class.__qualname__}
    return type(guider_class.__name__, (gating, guider_class), body)
