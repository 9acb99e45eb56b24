"""Which run the attention layers serve: by thread, and in compiled code by what is set before the forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ..plan.forward_plan import CachedPart
from ..plan.report import TGateReport
from ..plan.schedule import TGateSchedule
from ..plan.step_plan import Action
from .budget import LayerSizes


class LayerActions:
    """
    What the attention layers do in a forward.

    Compiled code reads these and nothing else of a run: none of them changes more often than the phase does.
    """

    __slots__ = ("cross_attention", "on_half_batch", "part", "self_attention")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Have all layers compute, as without T-GATE."""
        self.set(Action.COMPUTE, Action.COMPUTE)

    def set(
        self,
        cross_attention: Action,
        self_attention: Action,
        *,
        part: CachedPart = CachedPart.ALL,
        on_half_batch: bool = False,
    ) -> None:
        """Set what is done, what of it is stored, and whether the forward runs on one half of the batch."""
        self.cross_attention = cross_attention
        self.self_attention = self_attention
        self.part = part
        self.on_half_batch = on_half_batch

    def copy_from(self, other: LayerActions) -> None:
        """Set the actions of `other`."""
        self.set(other.cross_attention, other.self_attention, part=other.part, on_half_batch=other.on_half_batch)


class ActiveRun(Protocol):
    """A run as a thread has it, or something in its place."""

    @property
    def nbytes(self) -> int:
        """Bytes held in stored outputs."""


class Slot:
    """Identifies the gate of one layer, and holds the cached output for its compiled code."""

    __slots__ = ("action", "is_diffusers", "sizes", "tensor")

    def __init__(self, is_diffusers: bool, action: Action | None = None) -> None:
        # Whether the wrapped processor is diffusers' own: others may return one buffer again and again.
        self.is_diffusers = is_diffusers
        self.tensor: torch.Tensor | None = None
        # With a budget, what cross-attention does in this layer, and how large its compiled code has seen it to be.
        self.action = action
        self.sizes: LayerSizes | None = None


class TGateState:
    """
    What the attention processors of one pipeline share: its settings, and the run that a thread is in.

    Without a run every layer computes and nothing is cached, so others can use the same denoiser as if T-GATE were not
    there.

    Args:
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        max_memory (`int`, *optional*): Most bytes of kept cross-attention.
        by_hand (`bool`, *optional*, defaults to `True`):
            Whether the user has put the processors in. Copies of the others are made without T-GATE.

    Attributes:
        report (`TGateReport`): What the last run did.
    """

    def __init__(self, schedule: TGateSchedule, max_memory: int | None = None, *, by_hand: bool = True) -> None:
        self.schedule = schedule
        self.max_memory = max_memory
        self.by_hand = by_hand
        self.report = TGateReport()
        self.compiled_actions = LayerActions()
        # In place of a run, in the first step of a call with hand wiring, where the run begins at the end of that step.
        self.first_step_cache: ActiveRun | None = None
        self.warned: set[str] = set()
        self._runs: dict[int, ActiveRun] = {}
        self._suspended_runs: dict[int, ActiveRun] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.schedule}, {len(self._runs)} runs, {self.nbytes} bytes held)"

    def __getstate__(self) -> dict[str, Any]:
        # Runs stay where they run.
        return {**vars(self), "compiled": LayerActions(), "_runs": {}, "_aside": {}, "unannounced": None}

    @property
    def nbytes(self) -> int:
        """Bytes held in stored outputs."""
        first_step_cache = [] if self.first_step_cache is None else [self.first_step_cache]
        return sum(run.nbytes for run in {*self._runs.values(), *self._suspended_runs.values(), *first_step_cache})

    def current(self) -> Any:
        """The run that this thread is in; not that of a pipeline whose callback calls another one."""
        return self._runs.get(threading.get_ident())

    @contextmanager
    def entered(self, run: Any) -> Iterator[None]:
        """Be in a run for the time of a `with` block."""
        before = self._runs.get(threading.get_ident())
        self.enter(run)
        try:
            yield
        finally:
            self.leave(before)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Be in no run while a callback may call another pipeline on the same denoiser."""
        thread = threading.get_ident()
        run = self._runs.pop(thread, None)
        try:
            yield
        finally:
            if run is not None:
                self._runs[thread] = run

    def suspend(self) -> None:
        """Be in no run until `resume`, for a forward that is no part of it."""
        thread = threading.get_ident()
        if thread in self._runs:
            self._suspended_runs[thread] = self._runs.pop(thread)

    def resume(self) -> None:
        """The inverse of `suspend`."""
        thread = threading.get_ident()
        if thread in self._suspended_runs:
            self._runs[thread] = self._suspended_runs.pop(thread)

    def enter(self, run: Any) -> None:
        """Be in a run until `leave`."""
        self._runs[threading.get_ident()] = run

    def leave(self, back: Any = None) -> None:
        """The inverse of `enter`: back to the run before, if there was one."""
        thread = threading.get_ident()
        for runs in (self._runs, self._suspended_runs):
            runs.pop(thread, None)
        if back is not None:
            self._runs[thread] = back

    def new_slot(self, is_diffusers: bool) -> Slot:
        """Make the slot of one attention layer."""
        return Slot(is_diffusers, None if self.max_memory is None else Action.COMPUTE)

    def warn_once(self, what: str) -> bool:
        """Whether this pipeline has not been warned of something yet; it counts as warned from now on."""
        new = what not in self.warned
        self.warned.add(what)
        return new
