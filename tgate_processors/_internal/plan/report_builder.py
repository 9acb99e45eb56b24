"""What a run has done so far: its report in the making."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from .report import TGateReport
from .steps import StepCounter


class ReportBuilder:
    """
    Adds up the forwards of a run, whose loops may be several.

    Args:
        is_auto (`bool`): Whether the run decides which steps are full, and so where its gate is.

    Attributes:
        report (`TGateReport`): What has been done so far.
        steps_before (`int`): Steps of the loops that have ended.
    """

    def __init__(self, *, is_auto: bool) -> None:
        self.report = TGateReport()
        self.steps_before = 0
        self._is_auto = is_auto
        self._errors: dict[int, float] = {}

    def measured(self, step: int, error: float) -> None:
        """A prediction was compared with what was computed, in a step of this loop."""
        self._errors[self.steps_before + step] = error

    def passed(self, nbytes: int) -> None:
        """A step has ended in which cross-attention of so many bytes was not kept, because it is not gated."""
        self.report = replace(self.report, cross_attention_bytes=max(self.report.cross_attention_bytes, nbytes))

    def add(
        self,
        loop: StepCounter,
        step: int,
        *,
        half: bool,
        did: tuple[tuple[bool, bool], tuple[bool, bool]],
        held: int,
        layers: tuple[int, int] = (0, 0),
    ) -> None:
        """
        A pass has ended.

        Args:
            loop (`StepCounter`): Its loop.
            step (`int`): Its step.
            half (`bool`): Whether it ran on half of the batch.
            did (`tuple`): Whether cross-attention was computed and reused in it, and whether self-attention was.
            held (`int`): Bytes held after it.
            layers (`tuple` of `int`): Layers that keep their cross-attention after it, and those that could.
        """
        report, (cross, own) = self.report, did
        step += self.steps_before
        full = report.full_steps if half or step in report.full_steps else (*report.full_steps, step)
        self.report = replace(
            report,
            num_inference_steps=self.steps_before + loop.timeline.steps,
            # Where the run decides, the gate is the first step that was not full.
            gate_step=next(step for step in count() if step not in full) if self._is_auto else loop.gate_step,
            full_batch_forwards=report.full_batch_forwards + (not half),
            half_batch_forwards=report.half_batch_forwards + half,
            cross_attention_computed=report.cross_attention_computed + cross[0],
            cross_attention_reused=report.cross_attention_reused + cross[1],
            self_attention_computed=report.self_attention_computed + own[0],
            self_attention_reused=report.self_attention_reused + own[1],
            full_steps=full,
            prediction_errors=tuple(self._errors.items()),
            peak_bytes=max(report.peak_bytes, held),
            kept_layers=max(report.kept_layers, layers[0]),
            cross_attention_layers=max(report.cross_attention_layers, layers[1]),
        )

    def end_loop(self, loop: StepCounter) -> None:
        """A loop has ended, and another one may begin."""
        self.steps_before += loop.timeline.steps
