"""One call of a pipeline: the steps that were seen, and what the layers do in the next forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .batch import Batch
from .call import Call
from .companions.deepcache import DeepCacheOrder
from .control import Control
from .halving import sample_of
from .layers import Layers
from .layout import Seen
from .outputs import Kept, Outputs
from .report import TGateReport
from .saying import Text, say_left_alone, say_nothing_was_gated, say_unguided, say_what_is_late
from .schedule import Action, CFGHalf, Phase, StepPlan
from .state import Part, Slot, TGateState
from .steps import Loop
from .tally import Tally


class Stored(NamedTuple):
    """The forward that kept cross-attention: rows of what is kept, shape of a sample, and what part of it is kept."""

    rows: int
    shape: tuple[int, ...]
    part: Part


# Kept by a forward that no hook has seen. Whether it fits is for the layers to see.
_UNSEEN = Stored(-1, (), Part.ALL)


class Run:
    """
    One call of a pipeline. It is made anew for every call, and nothing of it outlives the call but the report.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        call (`Call`): What the pipeline tells.
        layers (`Layers`): The attention layers of its denoiser.
        droppable (`bool`): Whether guidance is two halves of one batch, of which one can be left out.
        by_forward (`bool`, *optional*, defaults to `False`):
            Whether the end of a forward is the tick, for pipelines without step callbacks.
        deepcache (`DeepCacheOrder`, *optional*): What has to start afresh where the batch changes.

    Attributes:
        half (`bool`): Whether the forward that runs now runs on one half of the batch.
        waiting (`bool`): Whether no call has been announced yet (hand wiring).
    """

    def __init__(
        self,
        state: TGateState,
        call: Call,
        layers: Layers,
        *,
        droppable: bool,
        by_forward: bool = False,
        deepcache: DeepCacheOrder | None = None,
    ) -> None:
        self.call = call
        self.batch = Batch(call, layers.layout)
        self.outputs = Outputs(state, layers)
        self.control = Control()
        self._tally = Tally(is_auto=state.schedule.is_auto)
        self.whole: Any = None
        self.waiting = False
        self.half = False
        self._state = state
        self._droppable = droppable
        self._by_forward = by_forward
        self._deepcache = deepcache
        self._text = Text(state)
        self._loop: Loop | None = None
        self._last_index: int | None = None
        self._ticks = 0
        self._due = False
        self._part = Part.ALL
        self._seen: Seen | None = None
        self._guided = False
        self._stored: Stored | None = None
        self._phase = Phase.SEMANTICS_PLANNING

    @property
    def report(self) -> TGateReport:
        """What has been done so far."""
        return self._tally.report

    @property
    def kept(self) -> dict[Slot, Kept]:
        """What the layers keep."""
        return self.outputs.kept

    @property
    def nbytes(self) -> int:
        """Bytes held in stored outputs, and in differences of the halves of guidance."""
        loop = self._loop
        return self.outputs.nbytes + (loop.guidance.nbytes if loop is not None and loop.guidance is not None else 0)

    @property
    def guided(self) -> bool:
        """Whether the last forward was given both halves of guidance, in one batch."""
        return self._guided and self._droppable

    @property
    def step_index(self) -> int:
        """The step that runs now."""
        return self._tally.steps_before + (self._loop.step_index if self._loop is not None else 0)

    @property
    def passes(self) -> int:
        """Passes of the loop that have ended."""
        return self._loop.passes if self._loop is not None else 0

    @property
    def between_loops(self) -> bool:
        """Whether no loop is under way."""
        return self._loop is None

    @property
    def gates_first_step(self) -> bool:
        """Whether the gate lies in the first step."""
        return self._loop is not None and self._loop.gate_step == 1

    def halves_next(self, shape: tuple[int, ...]) -> bool:
        """Whether the step that runs now will run on half the batch, if its latents are of this shape."""
        if self._loop is None or self._loop.over or self._stored is None:
            return False
        improving = self._loop.now.phase is Phase.FIDELITY_IMPROVING
        fits = self._stored.part is not Part.ALL and self._stored.shape[-2:] == shape[-2:]
        return self._droppable and improving and fits and self.call.guided()

    def before_forward(self, seen: Seen, kept: CFGHalf = "unconditional", *, may_halve: bool = True) -> None:
        """
        The denoiser is called: decide what its layers do.

        Args:
            seen (`Seen`): What it is given.
            kept (`str`, *optional*, defaults to `"unconditional"`): The half that a half step runs on, by its place.
            may_halve (`bool`, *optional*, defaults to `True`): Whether nobody else reads the batch after us.

        Raises:
            ValueError: If the batch is not what guidance makes it, or what layers keep is not what it takes.
        """
        loop = self._loop or self._begin()
        loop.forward()
        self.outputs.layers.check()
        guided = self.call.guided()
        if self._droppable and (loop.passes or self._by_forward):
            self.batch.check(seen, guided)
        if self._by_forward and not self.call.vouched:
            self.call.check_timestep(seen.given.get("timestep"), loop.passes)
        if self._state.schedule.is_auto and not loop.passes and not (guided and self._droppable):
            say_unguided(self._state, self.call)
        self._text.watch(seen.text, loop)
        self._part = self._part_kept(kept) if guided and self._droppable else Part.ALL
        self._decide(loop, seen, guided, may_halve)
        self._seen, self._guided = seen, guided
        self.outputs.before_forward()

    def after_forward(self, output: Any = None) -> torch.Tensor | None:
        """
        The denoiser has given its output.

        Args:
            output (`torch.Tensor` or container, *optional*): What it gave.

        Returns:
            `torch.Tensor`, *optional*: After a half step, what the second half is to have more than the first.
        """
        self.outputs.after_forward()
        if self.half and self._deepcache is None:
            self._refuse(self.outputs.silent(), "did not give out what they keep, but ran on half of the batch")
        signals = self.outputs.signals
        if signals.cross_attention is Action.STORE and self._seen is not None:
            rows = self._seen.batch // (1 if signals.part is Part.ALL else 2)
            self._stored = Stored(rows, self._seen.shape, signals.part)
        difference = self._difference(output)
        if self._by_forward:
            self.tick()
        return difference

    def tick(self, index: int | None = None, latents: Any = None, tensors: dict[str, Any] | None = None) -> None:
        """
        A pass of the loop has ended.

        Args:
            index (`int`, *optional*): The pipeline's number of the pass.
            latents (`torch.Tensor`, *optional*): The latents of the next one, if the user's callback gave others.
            tensors (`dict`, *optional*): What the pipeline has told its callback.

        Raises:
            ValueError: If the steps or the batch are not what the pipeline said.
        """
        loop = self._loop or self._begin()
        if self._last_index is not None and index == self._last_index + 1:
            raise ValueError(
                f"T-GATE: the loop goes on with step {index} after the {index} steps that the pipeline says it has "
                "(`num_timesteps`). Call remove_tgate(pipe) to use this pipeline."
            )
        self._last_index = None
        step = loop.step_index
        loop.tick(index, full=not self.half)
        self._ticks += 1
        if self._droppable:
            # With `self._guided` as it was in the forward: the user's callback may have switched guidance off.
            self.batch.settle(self._seen, self._guided, tensors or {}, latents)
        self._tally.add(loop, step, half=self.half, did=self.outputs.counts(), held=self.nbytes)
        if not self._by_forward:
            loop.follow(self.call.timeline())
        if self._ticks == 1:
            say_what_is_late(self._state, self.call, loop)
        if loop.over:
            self._end(loop)

    def prime(self, plan: StepPlan) -> None:
        """Wait for a forward that no hook announces."""
        self.waiting = True
        self.outputs.signals.set(plan.cross_attention, plan.self_attention)
        self._state.compiled.take(self.outputs.signals)

    def adopt(self, call: Call, layers: Layers, *, droppable: bool) -> None:
        """The first pass of a loop has run unannounced, and a callback tells whose it was."""
        self.call, self.batch, self._droppable = call, Batch(call, layers.layout), droppable
        self.outputs.layers = layers
        self.waiting = False
        self._begin().forward()
        self.outputs.after_forward()
        if self.outputs.signals.cross_attention is Action.STORE:
            self._stored = _UNSEEN

    def close(self, *, completed: bool = True) -> None:
        """The call has ended, however it ended: hold nothing, leave the report."""
        self._state.report = report = self._tally.report
        self.outputs.kept.clear()
        self._loop = None
        self._text.forget()
        self._seen = None
        reused = report.cross_attention_reused + report.self_attention_reused
        if completed and not reused and (self._due or not self._ticks):
            say_nothing_was_gated(self.call, steps_seen=self._ticks > 0)

    def _begin(self) -> Loop:
        """A loop begins: its steps are told by now, or in its first step."""
        self._loop = loop = Loop(self._state.schedule, self.call.timeline())
        left_alone = self.outputs.layers.settle()
        if left_alone and self._droppable:
            self._droppable = False
            say_left_alone(self._state, self.call, left_alone)
        if self._by_forward:
            self.batch.expect(self.call.pictures())
        self._phase = Phase.SEMANTICS_PLANNING
        return loop

    def _end(self, loop: Loop) -> None:
        """All passes have ended. Pipelines that run their loop several times in one call start the next one here."""
        self._tally.end_loop(loop)
        self._last_index = loop.last_index
        self._loop = self._stored = None
        self.batch.forget()
        self.half = False
        self.outputs.signals.rest()
        self.outputs.kept.clear()

    def _decide(self, loop: Loop, seen: Seen, guided: bool, may_halve: bool) -> None:
        """Set what the layers do, by the plan and by what they hold."""
        plan = loop.now
        half = guided and self._droppable and plan.phase is Phase.FIDELITY_IMPROVING
        cross, own, phase = plan.cross_attention, plan.self_attention, plan.phase
        self._due = self._due or Action.REUSE in (cross, own)
        if cross is Action.REUSE and not (self._fits(seen, half, guided) and (may_halve or not half)):
            # As at the gate: the whole batch, everything computed and kept anew.
            half = False
            cross, phase = Action.STORE, Phase.GATE
            own = Action.STORE if own is Action.REUSE else own
        part = self._part if phase is Phase.GATE and seen.batch % 2 == 0 else Part.ALL
        if half:
            self._refuse(self.outputs.missing(), "keep no output, so no half of the batch can be left out")
        batch_changes = half and self._phase is not Phase.FIDELITY_IMPROVING
        if self._deepcache is not None and (phase is Phase.GATE or batch_changes):
            self._deepcache.restart()
        self._phase, self.half = phase, half
        self.outputs.signals.set(cross, own, part=part, half=half)

    def _part_kept(self, kept: CFGHalf) -> Part:
        """What a full step keeps of an output for the half steps after it."""
        if not self._state.schedule.predicts and self.outputs.layers.layout.mean:
            return Part.MEAN
        return Part.FIRST if kept == "unconditional" else Part.SECOND

    def _fits(self, seen: Seen, half: bool, guided: bool) -> bool:
        """Whether what is kept was made for such a forward."""
        stored = self._stored
        if stored is None or stored is _UNSEEN:
            return stored is _UNSEEN and not half
        rows = seen.batch // 2 if half else seen.batch
        return (stored.rows, stored.shape) == (rows, seen.shape) and (stored.part is self._part or not guided)

    def _difference(self, output: Any) -> torch.Tensor | None:
        """What the halves of guidance differ by: noted if both were computed, else predicted."""
        loop, seen = self._loop, self._seen
        if loop is None or loop.guidance is None or seen is None or not (self._guided and self._droppable):
            return None
        if self.half:
            return loop.guidance.predicted(loop.passes)
        if loop.may_halve:
            first, second = sample_of(output, seen.shape).chunk(2)
            unconditional = 0 if self.batch.unconditional_first else 1
            scale = self.call.scale() if self._state.schedule.is_auto else None
            loop.guidance.note(loop.passes, (first, second), unconditional, scale)
            if loop.guidance.error is not None:
                self._tally.measured(loop.step_index, loop.guidance.error)
        return None

    def _refuse(self, layers: list[str], what: str) -> None:
        """Refuse cross-attention layers that go their own way while a half is left out."""
        if layers:
            raise ValueError(
                f"T-GATE: {len(layers)} cross-attention layers, {layers[0].removesuffix('.processor')} among them, "
                f"{what}. Their processors are not called: was `Attention.forward` replaced (Prompt-to-Prompt, "
                "MasaCtrl), or are they skipped by another cache? Undo that, or call remove_tgate(pipe) to use this "
                "pipeline."
            )
