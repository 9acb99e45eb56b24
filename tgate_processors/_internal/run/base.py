"""One call of a pipeline, whatever its form of guidance."""

from __future__ import annotations

from dataclasses import replace
from typing import Generic, TypeVar

from ..attention.state import TGateState
from ..caches.foreign_forwards import ForeignForwards
from ..guidance.cfg_form import CFGForm
from ..plan.adaptive import StepErrors
from ..plan.report import TGateReport
from ..plan.report_builder import ReportBuilder
from ..plan.steps import StepCounter, Timeline
from .ranks import Agreement

Form = TypeVar("Form", bound=CFGForm)


class Run(Generic[Form]):
    """
    One call of a pipeline. It is made anew for every call, and nothing of it outlives the call but the report.

    Args:
        state (`TGateState`): The settings, and where the report goes.
        cfg (`CFGForm`): The form of guidance.
        forwards (`ForeignForwards`): What its denoisers do when they are called.
        can_skip_half (`bool`): Whether guidance is two halves, of which one can be skipped.
        can_forecast (`bool`, *optional*, defaults to `False`): Whether calls of the denoiser can be left out.
        agree (`Agreement`, *optional*): How processes that share a denoiser agree.
    """

    def __init__(
        self,
        state: TGateState,
        cfg: Form,
        forwards: ForeignForwards,
        *,
        can_skip_half: bool,
        can_forecast: bool = False,
        agree: Agreement | None = None,
    ) -> None:
        self._state = state
        self._cfg = cfg
        self._cfg.agree = self._agree = agree
        self._forwards = forwards
        self._can_skip_half = can_skip_half
        self._can_forecast = can_forecast and bool(state.schedule.forecast)
        self._report_builder = ReportBuilder(tolerance=state.schedule.tolerance)
        self._loop: StepCounter | None = None

    @property
    def report(self) -> TGateReport:
        """The report so far."""
        report = self._report_builder.report
        return report if self._agree is None else replace(report, ranks=self._agree.ranks)

    @property
    def nbytes(self) -> int:
        """Bytes held in differences of the halves of guidance."""
        return self._cfg.nbytes

    def _begin_counting(self, timeline: Timeline) -> StepCounter:
        """A loop begins: count its steps, without history of its guidance."""
        self._forwards.begin_loop()
        self._loop = loop = StepCounter(
            self._state.schedule, timeline, self._cfg.calls_per_step, can_forecast=self._can_forecast
        )
        self._cfg.begin(can_forecast=self._can_forecast)
        return loop

    def _restart_guidance(self, loop: StepCounter) -> None:
        """The history of guidance no longer holds: begin with full steps."""
        loop.restart_controller()
        self._cfg.begin(can_forecast=self._can_forecast)

    def _read_errors(self, loop: StepCounter) -> StepErrors:
        """The errors of the predictions for the step that runs, which go into the report."""
        errors = self._cfg.read_errors()
        self._report_builder.add_errors(loop.step_index, errors)
        return errors

    def _release(self) -> TGateReport:
        """The call has ended, however it ended: release cached tensors, store the report."""
        self._state.report = self.report
        self._cfg.release()
        self._loop = None
        return self.report
