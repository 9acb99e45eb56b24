"""Where a run stands: its step, what the attention layers do in it, and what they keep."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .schedule import Action, Phase, StepPlan, TGateSchedule

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Slot:
    """The output that one attention layer keeps, and the layer it belongs to."""

    __slots__ = ("__weakref__", "borrowed", "layer", "tensor")

    def __init__(self) -> None:
        self.tensor: torch.Tensor | None = None
        self.layer: Any = None
        # Whether the tensor lies in memory of compiled code, which its next call may write to (CUDA graphs).
        self.borrowed = False

    def clear(self) -> None:
        """Let go of the kept output."""
        self.tensor = None
        self.layer = None
        self.borrowed = False


@dataclass(frozen=True)
class TGateReport:
    r"""
    What T-GATE did in the last call of a pipeline.

    Counts are denoiser forwards: one per step, two per step with Heun or KDPM2.

    Args:
        num_inference_steps (`int`):
            Steps of the run, also of an interrupted one; where a call runs several loops (FreeInit), of all together.
        gate_step (`int`): First step of the fidelity-improving phase.
        cross_attention_computed (`int`): Forwards in which cross-attention was computed.
        cross_attention_reused (`int`): Forwards in which the stored cross-attention was reused.
        self_attention_computed (`int`): Forwards in which self-attention was computed.
        self_attention_reused (`int`): Forwards in which the stored self-attention was reused.
        full_batch_forwards (`int`): Forwards at the batch that the pipeline asked for.
        half_batch_forwards (`int`): Forwards at half that batch, guidance being dropped.
        peak_bytes (`int`): Most bytes held in stored outputs at the end of a step.
    """

    num_inference_steps: int = 0
    gate_step: int = 0
    cross_attention_computed: int = 0
    cross_attention_reused: int = 0
    self_attention_computed: int = 0
    self_attention_reused: int = 0
    full_batch_forwards: int = 0
    half_batch_forwards: int = 0
    peak_bytes: int = 0


_LONG_RUN = 1000
_NOBODY = -1
_IDLE = StepPlan(Phase.SEMANTICS_PLANNING, Action.COMPUTE, Action.COMPUTE)


class TGateState:
    """
    The run of one pipeline, shared by reference by its attention processors.

    Between two runs every action is "compute" and nothing is held, so whoever else uses the same denoiser finds it as
    if T-GATE were not there. Compiled code reads `cross_attention`, `self_attention` and `averaging` only: none of them
    changes more often than the phase does.

    Args:
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
    """

    def __init__(self, schedule: TGateSchedule) -> None:
        self.schedule = schedule
        self.report = TGateReport()
        self._slots: weakref.WeakSet[Slot] = weakref.WeakSet()
        self._warned = False
        self._fresh = True
        self._thread: int | None = None
        self._plan: tuple[StepPlan, ...] = ()
        self._iteration = 0
        self._rest()

    def __repr__(self) -> str:
        where = f"step {self.step_index} of {len(self._plan)}" if self._plan else "no run"
        return f"{type(self).__name__}({self.schedule}, {where}, {self.nbytes} bytes held)"

    def __getstate__(self) -> dict[str, Any]:
        # Processors that are copied with the state make their slots anew.
        return {name: value for name, value in vars(self).items() if name != "_slots"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._slots = weakref.WeakSet()

    @property
    def running(self) -> bool:
        """Whether a run has begun."""
        return bool(self._plan)

    @property
    def halving(self) -> bool:
        """Whether one half of guidance is left out now."""
        return self.guided and self._current.phase is Phase.FIDELITY_IMPROVING

    @property
    def step_index(self) -> int:
        """Inference step that runs now."""
        return min(self._step_of(self._iteration), max(0, len(self._plan) - 1))

    @property
    def nbytes(self) -> int:
        """Bytes held in stored outputs."""
        return sum(slot.tensor.nbytes for slot in self._slots if slot.tensor is not None)

    def is_mine(self) -> bool:
        """Whether the run is the caller's: not that of another thread, or of a call that a callback makes."""
        return self._thread is None or self._thread == threading.get_ident()

    def claim(self) -> None:
        """A call starts in this thread: whoever else uses the denoiser meanwhile finds it as without T-GATE."""
        self._thread = threading.get_ident()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Be out of the way, of a pipeline on the same denoiser that a callback calls."""
        thread, self._thread = self._thread, _NOBODY
        try:
            yield
        finally:
            self._thread = thread

    def secure(self) -> None:
        """A forward has ended: copy what compiled code has stored, one tensor after the other."""
        if Action.STORE not in (self.cross_attention, self.self_attention):
            return
        for slot in self._slots:
            if slot.borrowed and slot.tensor is not None:
                slot.tensor = slot.tensor.clone()
                slot.borrowed = False

    def new_slot(self) -> Slot:
        """Make the place where one attention layer keeps its output."""
        slot = Slot()
        self._slots.add(slot)
        return slot

    def prime(self) -> None:
        """
        Wait for a run whose first step nobody opens: only a callback counts its steps.

        The first step then has to be ready beforehand. Which of its outputs are reused is not known before the number
        of steps is, so it is taken from a long run.
        """
        self._current = self.schedule.plan(_LONG_RUN)[0]
        self.cross_attention = self._current.cross_attention
        self.self_attention = self._current.self_attention

    def begin(self, iterations: int, order: int, repeats: int) -> None:
        """
        The denoising loop starts.

        Args:
            iterations (`int`): Passes of the pipeline's loop.
            order (`int`): Passes per step.
            repeats (`int`): First passes that belong to step 0 beyond its own (PNDM).
        """
        self._order, self._repeats, self._iterations = order, repeats, iterations
        num_inference_steps = self._step_of(iterations - 1) + 1
        self._plan = self.schedule.plan(num_inference_steps)
        gate_step = self.schedule.resolve_gate_step(num_inference_steps)
        if self._fresh:
            self._fresh = False
            self.report = TGateReport()
        total = self.report.num_inference_steps + num_inference_steps
        self.report = replace(self.report, num_inference_steps=total, gate_step=gate_step)
        if gate_step >= num_inference_steps and not self._warned:
            self._warned = True
            logger.warning(
                "gate_step=%s is not before the last of the %s steps that run: cross-attention is always computed and "
                "guidance stays on. Give a smaller gate_step, or a share of the steps such as gate_step=0.4.",
                gate_step,
                num_inference_steps,
            )

    def enter(self, guided: bool) -> StepPlan:
        """
        A pass of the loop is about to start: set what the attention layers do in it.

        Args:
            guided (`bool`): Whether the batch holds both halves of classifier-free guidance.
        """
        plan = self._plan[self.step_index]
        self._current, self.guided = plan, guided
        self.cross_attention = plan.cross_attention
        self.self_attention = plan.self_attention
        self.averaging = guided and plan.phase is Phase.GATE
        return plan

    def advance(self) -> None:
        """The clock ticks: one pass of the pipeline's loop has ended."""
        report, plan = self.report, self._current
        halved = self.halving
        cross, own = plan.cross_attention is Action.REUSE, plan.self_attention is Action.REUSE
        self.report = replace(
            report,
            full_batch_forwards=report.full_batch_forwards + (not halved),
            half_batch_forwards=report.half_batch_forwards + halved,
            cross_attention_computed=report.cross_attention_computed + (not cross),
            cross_attention_reused=report.cross_attention_reused + cross,
            self_attention_computed=report.self_attention_computed + (not own),
            self_attention_reused=report.self_attention_reused + own,
            peak_bytes=max(report.peak_bytes, self.nbytes),
        )
        self._iteration += 1
        if self._iteration >= self._iterations:
            # Pipelines that run their loop several times in one call start the next one here.
            self._rest()

    def reset(self) -> None:
        """The call has ended, however it ended: hold nothing, do nothing."""
        self._rest()
        self._fresh = True
        self._thread = None

    def _rest(self) -> None:
        """Back to the state between two runs; the report stays."""
        self._plan = ()
        self._current = _IDLE
        self._iteration = 0
        self._iterations = 0
        self._order, self._repeats = 1, 0
        self.guided = False
        self.cross_attention = Action.COMPUTE
        self.self_attention = Action.COMPUTE
        self.averaging = False
        for slot in self._slots:
            slot.clear()

    def _step_of(self, iteration: int) -> int:
        """Inference step of a pass of the loop: the ticks that its progress bar shows by then."""
        return max(0, iteration - self._repeats) // self._order
