"""A guider that asks a run which predictions it needs, in the place of another during a call."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ..run.guider_run import GuiderRun


class GatedGuider:
    """A guider with T-GATE: mixed into a class generated from that of the guider."""

    __slots__ = ("_run",)
    _run: GuiderRun

    @property
    def num_conditions(self) -> int:
        """How many predictions a step takes."""
        if self._run.skips_all(self):
            return 0
        asked: int = super().num_conditions  # type: ignore[misc]
        return 1 if self._run.skips_unconditional(self) else asked

    def new(self, **changed: Any) -> Any:
        """Make another guider, which is without T-GATE until the next call."""
        guider: Any = self
        return type(self).__mro__[2].from_config(guider.config, **changed)  # type: ignore[attr-defined]

    def set_state(self, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        super().set_state(*args, **kwargs)  # type: ignore[misc]
        guider: Any = self
        guided = super().num_conditions > 1  # type: ignore[misc]
        self._run.begin_step(self, guider._step, guider._num_inference_steps, guided=guided)

    def prepare_inputs(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare the inputs of the halves, and note in which they differ."""
        if isinstance(data, Mapping):
            self._run.set_conditions(data)
        if self._run.skips_all(self):
            return []
        return super().prepare_inputs(data, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare the inputs of the halves from the names of fields in a block's state."""
        pairs = {name: fields for name, fields in input_fields.items() if isinstance(fields, tuple)}
        self._run.set_conditions({name: tuple(getattr(data, each, None) for each in pairs[name]) for name in pairs})
        if self._run.skips_all(self):
            return []
        return super().prepare_inputs_from_block_state(data, input_fields, *args, **kwargs)  # type: ignore[misc]

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


def gate_guider(guider: Any, run: GuiderRun) -> Any:
    """Make a gated guider, which shares everything with the original and asks a run how many predictions it takes."""
    guider_class: Any = type(guider)
    generated = _gated_guider_class(guider_class)
    gated = generated.__new__(generated)
    gated.__dict__ = guider.__dict__
    gated._run = run
    return gated


@functools.cache
def _gated_guider_class(guider_class: Any) -> Any:
    """The class of a gated guider, under the same name."""
    body = {"__module__": guider_class.__module__, "__qualname__": guider_class.__qualname__}
    return type(guider_class.__name__, (GatedGuider, guider_class), body)
