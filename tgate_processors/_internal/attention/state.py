"""Which run the attention layers serve: by thread, and in compiled code by what is set before the forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ..plan.forward_plan import CachedPart
from ..plan.report import TGateReport
from ..plan.schedule import Action, TGateSchedule
from .budget import LayerSizes


class LayerActions:
    """
    What the attention layers do in a forward.

    Compiled code reads these and nothing else of a run: none of them changes more often than the phase does.
    """

    __slots__ = ("cross_attention", "half", "part", "self_attention")

    def __init__(self) -> None:
        self.rest()

    def rest(self) -> None:
        """Compute, as without T-GATE."""
        self.set(Action.COMPUTE, Action.COMPUTE)

    def set(
        self, cross_attention: Action, self_attention: Action, *, part: CachedPart = CachedPart.ALL, half: bool = False
    ) -> None:
        """Say what is done, what of it is stored, and whether one half of the batch runs."""
        self.cross_attention = cross_attention
        self.self_attention = self_attention
        self.part = part
        self.half = half

    def take(self, other: LayerActions) -> None:
        """Say the same as `other`."""
        self.set(other.cross_attention, other.self_attention, part=other.part, half=other.half)


class ActiveRun(Protocol):
    """What a thread can be in: a run, or something in its place."""

    @property
    def nbytes(self) -> int:
        """Bytes held in stored outputs."""


class Slot:
    """What tells the gate of one layer from another, and where its compiled code puts and finds the kept output."""

    __slots__ = ("action", "own", "sizes", "tensor")

    def __init__(self, own: bool, action: Action | None = None) -> None:
        # Whether the processor behind is diffusers' own: others may hand out one buffer again and again.
        self.own = own
        self.tensor: torch.Tensor | None = None
        # With a budget, what cross-attention does in this layer, and how large its compiled code has seen it to be.
        self.action = action
        self.sizes: LayerSizes | None = None


class TGateState:
    """
    What the attention processors of one pipeline share: its settings, and the run that a thread is in.

    Without a run every layer computes and nothing is held, so whoever else uses the same denoiser finds it as if T-GATE
    were not there.

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
        self.compiled = LayerActions()
        # In the place of a run in the first step of a call that nobody announces (hand wiring).
        self.unannounced: ActiveRun | None = None
        self.warned: set[str] = set()
        self._runs: dict[int, ActiveRun] = {}
        self._aside: dict[int, ActiveRun] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.schedule}, {len(self._runs)} runs, {self.nbytes} bytes held)"

    def __getstate__(self) -> dict[str, Any]:
        # Runs stay where they run.
        return {**vars(self), "compiled": LayerActions(), "_runs": {}, "_aside": {}, "unannounced": None}

    @property
    def nbytes(self) -> int:
        """Bytes held in stored outputs."""
        unannounced = [] if self.unannounced is None else [self.unannounced]
        return sum(run.nbytes for run in {*self._runs.values(), *self._aside.values(), *unannounced})

    def current(self) -> Any:
        """The run that this thread is in; not that of a pipeline whose callback calls another one."""
        return self._runs.get(threading.get_ident())

    @contextmanager
    def entered(self, run: Any) -> Iterator[None]:
        """Be in a run."""
        before = self._runs.get(threading.get_ident())
        self.enter(run)
        try:
            yield
        finally:
            self.leave(before)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Step aside while a callback calls another pipeline on the same denoiser."""
        thread = threading.get_ident()
        run = self._runs.pop(thread, None)
        try:
            yield
        finally:
            if run is not None:
                self._runs[thread] = run

    def stand_aside(self) -> None:
        """Be out of the way until `come_back`, of a forward that is no part of the run."""
        thread = threading.get_ident()
        if thread in self._runs:
            self._aside[thread] = self._runs.pop(thread)

    def come_back(self) -> None:
        """The inverse of `stand_aside`."""
        thread = threading.get_ident()
        if thread in self._aside:
            self._runs[thread] = self._aside.pop(thread)

    def enter(self, run: Any) -> None:
        """Be in a run until `leave`."""
        self._runs[threading.get_ident()] = run

    def leave(self, back: Any = None) -> None:
        """The inverse of `enter`; be back in the run before, if there was one."""
        thread = threading.get_ident()
        for runs in (self._runs, self._aside):
            runs.pop(thread, None)
        if back is not None:
            self._runs[thread] = back

    def new_slot(self, own: bool) -> Slot:
        """Make the place where one attention layer keeps its output."""
        return Slot(own, None if self.max_memory is None else Action.COMPUTE)

    def warn_once(self, what: str) -> bool:
        """Whether something has not been said of this pipeline yet."""
        new = what not in self.warned
        self.warned.add(what)
        return new
