"""What a run has done so far: its report in the making."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from .adaptive import StepErrors
from .report import TGateReport
from .step_plan import Level
from .steps import StepCounter

# What `add_pass` gets where no attention layer has computed or reused anything, or none is gated.
NO_LAYER_COUNTS = ((False, False), (False, False))


class ReportBuilder:
    """
    Adds up the forwards of a run, whose loops may be several.

    Args:
        tolerance (`float`, *optional*): The error that is accepted, if the run decides what is computed.

    Attributes:
        report (`TGateReport`): What has been done so far.
        step_offset (`int`): Steps of the loops that have ended.
    """

    def __init__(self, *, tolerance: float | None) -> None:
        self.report = TGateReport(tolerance=tolerance)
        self.step_offset = 0
        self._errors: dict[int, float] = {}
        self._forecast_errors: dict[int, float] = {}
        self._levels: dict[int, Level] = {}

    def add_errors(self, step: int, errors: StepErrors) -> None:
        """Predictions were compared with what was computed, in a step of this loop."""
        if errors.difference is not None:
            self._errors[self.step_offset + step] = errors.difference
        if errors.forecast is not None:
            self._forecast_errors[self.step_offset + step] = errors.forecast

    def add_uncached_bytes(self, nbytes: int) -> None:
        """A step has ended in which cross-attention of so many bytes was not kept, because it is not gated."""
        self.report = replace(self.report, cross_attention_bytes=max(self.report.cross_attention_bytes, nbytes))

    def add_pass(
        self,
        loop: StepCounter,
        step: int,
        *,
        level: Level,
        counts: tuple[tuple[bool, bool], tuple[bool, bool]],
        cached_bytes: int,
        cached_layers: tuple[int, int] = (0, 0),
    ) -> None:
        """
        A pass has ended.

        Args:
            loop (`StepCounter`): Its loop.
            step (`int`): Its step.
            level (`Level`): How much of it was computed.
            counts (`tuple`): Whether cross-attention was computed and reused in it, and whether self-attention was.
            cached_bytes (`int`): Bytes held after the pass.
            cached_layers (`tuple` of `int`): Layers that keep their cross-attention after it, and those that could.
        """
        report, (cross, own) = self.report, counts
        step += self.step_offset
        # Of a step of two passes, the level is that of the first.
        self._levels.setdefault(step, level)
        is_full = level is Level.FULL
        full = report.full_steps if not is_full or step in report.full_steps else (*report.full_steps, step)
        self.report = replace(
            report,
            num_inference_steps=self.step_offset + loop.timeline.steps,
            # Where the run decides, the gate is the first step that was not full.
            gate_step=next(step for step in count() if step not in full)
            if report.tolerance is not None
            else loop.gate_step,
            levels="".join(each.value for each in self._levels.values()),
            full_batch_forwards=report.full_batch_forwards + is_full,
            half_batch_forwards=report.half_batch_forwards + (level is Level.HALF),
            forecast_forwards=report.forecast_forwards + (level is Level.FORECAST),
            cross_attention_computed=report.cross_attention_computed + cross[0],
            cross_attention_reused=report.cross_attention_reused + cross[1],
            self_attention_computed=report.self_attention_computed + own[0],
            self_attention_reused=report.self_attention_reused + own[1],
            full_steps=full,
            prediction_errors=tuple(self._errors.items()),
            forecast_errors=tuple(self._forecast_errors.items()),
            peak_bytes=max(report.peak_bytes, cached_bytes),
            kept_layers=max(report.kept_layers, cached_layers[0]),
            cross_attention_layers=max(report.cross_attention_layers, cached_layers[1]),
        )

    def end_loop(self, loop: StepCounter) -> None:
        """A loop has ended, and another one may begin."""
        self.step_offset += loop.timeline.steps
