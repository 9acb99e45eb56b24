"""Measurements of probed calls: changes from step to step, and the steps that each tolerance leads to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..guidance.forecast import OutputForecaster
from ..guidance.prediction import CFGDifference, apply_cfg, predict, relative_error
from ..guidance.predictor import GuidancePredictor, GuidedPart
from ..plan.adaptive import LevelController, StepErrors
from ..plan.schedule import TGateSchedule
from ..plan.step_plan import Level
from ..run.run import PipelineRun


class ConvergenceProbe:
    """
    Measures changes by step in all calls, and the differences of guidance in one call.

    Attributes:
        steps (`int`): Steps of a call.
        layers (`list` of `str`): Names of the cross-attention layers.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.layers: list[str] = []
        # Step and pass of the forward that runs: PixArt's has ended when its hooks come.
        self._position = (0, 0)
        self._changes: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._before: dict[str, torch.Tensor] = {}
        # The passes of every loop of a call.
        self._loops: list[list[GuidedForward]] = [[]]
        # The levels of all steps of each call, by the tolerance.
        self._levels: dict[float | None, list[str]] = defaultdict(list)

    def mean(self, name: str) -> dict[int, float]:
        """Mean change by step, of a layer or of one of `cross_attention`, `difference` and `error`."""
        return {step: sum(values) / len(values) for step, values in sorted(self._changes[name].items())}

    def on_layer_output(self, name: str, run: PipelineRun, output: torch.Tensor) -> None:
        """A layer with cross-attention has returned its output."""
        step = run.step_index
        if run.pass_index < self._position[1]:
            # Another loop of the call begins (FreeInit).
            self._before.clear()
            self._loops.append([])
        self._position = (step, run.pass_index)
        self.steps = max(self.steps, step + 1)
        before = self._before.get(name)
        if before is not None and before.shape == output.shape:
            changed = relative_change(before, output)
            self._changes[name][step].append(changed)
            self._changes["cross_attention"][step].append(changed)
        self._before[name] = output.detach().clone()

    def on_guided_output(self, prediction: torch.Tensor, run: PipelineRun) -> None:
        """The denoiser has returned both halves of guidance."""
        (step, number), halves = self._position, prediction.chunk(2)
        unconditional = 0 if run.batch.unconditional_first else 1
        difference, scale = CFGDifference(number, halves[1] - halves[0]), run.call.guidance_scale()
        now = GuidedForward(step, difference, apply_cfg(halves, unconditional, scale), scale, halves[1 - unconditional])
        passes = self._loops[-1]
        if passes and passes[-1].difference.position == number:
            # Calls before the loop count as part of its first pass.
            passes.pop()
        if passes and passes[-1].difference.value.shape != difference.value.shape:
            # Like another loop: the run starts again there.
            self._loops.append(passes := [])
        if passes:
            self._changes["difference"][step].append(relative_change(passes[-1].difference.value, difference.value))
        if len(passes) > 1:
            self._changes["error"][step].append(now.error([each.difference for each in passes[-2:]]))
        passes.append(now)

    def on_call_end(self, schedules: Sequence[TGateSchedule]) -> None:
        """A call has ended: find the steps that each tolerance leads to, and release cached tensors."""
        for schedule in schedules:
            levels = "".join(self._levels_of(schedule, passes, self.steps) for passes in self._loops)
            # Steps without guidance are full.
            self._levels[schedule.tolerance].append(levels.ljust(self.steps, Level.FULL.value))
        self._loops = [[]]
        self._before.clear()
        self._position = (0, 0)

    def expect(self, schedule: TGateSchedule, half: float) -> tuple[float, float, float, float]:
        """Full steps, forecast steps, the first step that is not full and the speed-up, as means of all calls."""
        calls = self._levels[schedule.tolerance]
        full, halves, forecast = (
            sum(levels.count(level.value) for levels in calls) / len(calls)
            for level in (Level.FULL, Level.HALF, Level.FORECAST)
        )
        gate = sum(len(levels) - len(levels.lstrip(Level.FULL.value)) for levels in calls) / len(calls)
        return full, forecast, gate, self.steps / (full + halves * half)

    @staticmethod
    def _levels_of(schedule: TGateSchedule, passes: Sequence[GuidedForward], num_inference_steps: int) -> str:
        """The levels of the steps of a loop, if it went on as without T-GATE."""
        assert schedule.tolerance is not None
        controller, differences = LevelController(schedule.tolerance), GuidancePredictor(measures_errors=True)
        outputs, levels = OutputForecaster(), ""
        steps = sorted({each.step for each in passes})
        for step in steps:
            level = controller.next_level(num_inference_steps, is_last=step == steps[-1])
            levels += level.value
            measured: dict[str, list[float]] = {"difference": [], "forecast": []}
            for each in (each for each in passes if each.step == step and level is not Level.FORECAST):
                position = each.difference.position
                if level is Level.FULL:
                    errors = differences.record_parts(position, [each.part])
                    measured["difference"] += [] if errors is None else [float(errors.max())]
                if outputs.has_history:
                    (forecast,) = outputs.forecast_parts(position)
                    error = relative_error(forecast, each.conditional, each.guided, 1.0)
                    measured["forecast"].append(float(error.max()))
                outputs.record(position, [each.conditional])
            controller.end_step(level, StepErrors(*(max(errors, default=None) for errors in measured.values())))
        return levels


@dataclass(frozen=True)
class GuidedForward:
    """A forward with both halves of guidance."""

    step: int
    difference: CFGDifference
    guided: torch.Tensor
    scale: Any
    conditional: torch.Tensor

    @property
    def part(self) -> GuidedPart:
        """This forward as a part that a predictor records."""
        return GuidedPart(self.difference.value, self.guided, self.scale)

    def error(self, known: Sequence[CFGDifference]) -> float:
        """How far off a prediction would have been, for the worst sample of the batch."""
        predicted = predict(known, self.difference.position)
        return float(relative_error(predicted, self.difference.value, self.guided, self.scale).max())


def relative_change(before: torch.Tensor, now: torch.Tensor) -> float:
    """How far two tensors are apart, relative to the later one; the mean of the samples."""
    apart = (now.float() - before.float()).flatten(1).norm(dim=1)
    return float((apart / now.float().flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)).mean())
