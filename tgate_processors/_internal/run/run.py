"""One call of a pipeline: the steps that were seen, and what the layers do in the next forward."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..attention.cache import AttentionCache, CachedOutput
from ..attention.layers import GatedLayers
from ..attention.state import CachedPart, Slot, TGateState
from ..caches.adapter import CacheAdapters
from ..caches.foreign_forwards import ForeignForwards
from ..denoiser.inputs import DenoiserInputs, is_picture
from ..guidance.batch_check import CFGBatchCheck
from ..guidance.differences import Differences
from ..guidance.predictor import GuidedStepCounter
from ..plan.report import TGateReport
from ..plan.report_builder import ReportBuilder
from ..plan.schedule import Action, CFGHalf, StepPlan
from .call import PipelineCall
from .controlnet import ControlNetBatch
from .denoisers import CacheKey, DenoiserCaches
from .forward_plan import UNSEEN, Decision, refuse
from .messages import (
    PromptEmbedsWatcher,
    warn_budget_too_small,
    warn_cache_owns_cfg,
    warn_exchanged_in_every_step,
    warn_gate_too_late,
    warn_no_cfg,
    warn_nothing_gated,
    warn_ungated_processors,
)


class PipelineRun:
    """
    One call of a pipeline. It is made anew for every call, and nothing of it outlives the call but the report.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        call (`PipelineCall`): What the pipeline tells.
        layers (`GatedLayers` or a sequence of them): The attention layers of its denoiser, or of its denoisers.
        droppable (`bool`): Whether guidance is two halves of one batch, of which one can be left out.
        counts_forwards (`bool`, *optional*, defaults to `False`):
            Whether the end of a forward is the tick, for pipelines without step callbacks.
        adapters (`CacheAdapters`, *optional*): The caches of others on the denoiser.
        cross_attention (`bool`, *optional*): Whether cross-attention is gated. Defaults to what the family says.
        forwards (`ForeignForwards`, *optional*): What its denoisers do when they are called.

    Attributes:
        waiting (`bool`): Whether no call has been announced yet (hand wiring).
    """

    def __init__(
        self,
        state: TGateState,
        call: PipelineCall,
        layers: GatedLayers | Sequence[GatedLayers],
        *,
        droppable: bool,
        counts_forwards: bool = False,
        adapters: CacheAdapters | None = None,
        cross_attention: bool | None = None,
        forwards: ForeignForwards | None = None,
    ) -> None:
        self.call = call
        self.experts = DenoiserCaches(state, [layers] if isinstance(layers, GatedLayers) else layers)
        self._layout = layout = self.experts.now.layers.layout
        self.batch = CFGBatchCheck(call, layout)
        self.gates_cross = layout.keeps_cross if cross_attention is None else cross_attention
        self.control = ControlNetBatch()
        self._report_builder = ReportBuilder(is_auto=state.schedule.is_auto)
        self.whole: Any = None
        self.waiting = False
        self._state = state
        self._droppable = droppable
        self._counts_forwards = counts_forwards
        self._forwards = forwards or ForeignForwards(())
        self._adapters = adapters or CacheAdapters()
        self.experts.halved_inside(self._adapters.keep_guidance)
        self._decision = Decision(state, self.experts, self._adapters, cross_attention=self.gates_cross)
        self._text = PromptEmbedsWatcher(state)
        self._loop: GuidedStepCounter | None = None
        self._last_index: int | None = None
        self._ticks = 0
        self._seen: DenoiserInputs | None = None
        self._guided = self._left_alone = False
        self._late: Collection[str] = ()
        self._differences = self._compare()

    @property
    def report(self) -> TGateReport:
        """What has been done so far."""
        return self._report_builder.report

    @property
    def outputs(self) -> AttentionCache:
        """What the layers that run now keep."""
        return self.experts.outputs

    @property
    def kept(self) -> dict[Slot, CachedOutput]:
        """What the layers keep."""
        return self.outputs.kept

    @property
    def nbytes(self) -> int:
        """Bytes held in stored outputs, and in differences of the halves of guidance."""
        loop = self._loop
        return self.experts.nbytes + (loop.guidance.nbytes if loop is not None and loop.guidance is not None else 0)

    @property
    def guided(self) -> bool:
        """Whether the last forward was given both halves of guidance, in one batch."""
        return self._guided and self._droppable

    @property
    def computes_cross(self) -> bool:
        """Whether any cross-attention is computed in half steps."""
        return not self.gates_cross or bool(self.experts.now.by_call[0].declined)

    @property
    def half(self) -> bool:
        """Whether one half of guidance is left out in the step that runs now."""
        return self._decision.half

    @property
    def halves_batch(self) -> bool:
        """Whether the forward that runs now runs on half of the batch that the pipeline gives."""
        return self._decision.halves_batch

    @property
    def step_index(self) -> int:
        """The step that runs now."""
        return self._report_builder.steps_before + (self._loop.step_index if self._loop is not None else 0)

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

    @property
    def will_halve(self) -> bool:
        """Whether the batch of a guided step of this loop may be halved."""
        loop = self._loop
        if loop is None or self._layout.calls > 1 or not loop.may_halve:
            return False
        return loop.controller is None or loop.controller.may_open

    def halves_next(self, shape: tuple[int, ...]) -> bool:
        """Whether the step that runs now will run on half the batch, if its latents are of this shape."""
        halves = self._loop is not None and self._decision.halves(self._loop, shape)
        return halves and self.guided and self.call.guided()

    def before_forward(
        self, seen: DenoiserInputs, kept: CFGHalf = "unconditional", *, may_halve: bool = True, denoiser: Any = None
    ) -> None:
        """
        The denoiser is called: decide what its layers do.

        Args:
            seen (`DenoiserInputs`): What it is given.
            kept (`str`, *optional*, defaults to `"unconditional"`): The half that a half step runs on, by its place.
            may_halve (`bool`, *optional*, defaults to `True`): Whether nobody else reads the batch after us.
            denoiser (`torch.nn.Module`, *optional*): Which of several it is.

        Raises:
            ValueError: If the batch is not what guidance makes it, or what layers keep is not what it takes.
        """
        loop = self._loop or self._begin()
        guided = self._is_guided(loop, seen)
        loop.forward(guided=guided)
        if self._layout.calls > 1 and loop.forwards > 1:
            self._before_second(loop, seen, denoiser)
            return
        if self.experts.begin(denoiser):
            self.experts.took_over = loop.passes > 0
            self._adapters.take_over(self.experts.now.number)
            loop.begin_guidance()
        elif loop.passes and guided != self._guided:
            self._turn(loop, guided)
        self.experts.check()
        if self._droppable and (loop.passes or self._counts_forwards):
            self.batch.check(seen, guided and self._layout.calls == 1)
        if self._counts_forwards and not self.call.is_diffusers_loop:
            self.call.check_timestep(seen.given.get("timestep"), loop.passes)
        if self._needs_guidance() and not loop.passes and not self.call.guides():
            warn_no_cfg(self._state, self.call, gates_cross=self.gates_cross, joint=self._layout.joint)
        self._meet_text(seen.text, loop, guided)
        self.experts.now.layers.meet(seen.given)
        self._decision.make(loop, seen, kept, guided=guided, droppable=self._droppable, may_halve=may_halve)
        self._seen, self._guided = seen, guided
        self.outputs.before_forward()

    def after_forward(self, output: Any = None) -> list[torch.Tensor] | None:
        """
        The denoiser has given its output.

        Args:
            output (`torch.Tensor` or container, *optional*): What it gave.

        Returns:
            `list` of `torch.Tensor`, *optional*: After a half step, what the second half has more than the first.
        """
        self.outputs.after_forward()
        if self._guided and self._droppable and not self.half and self._seen is not None:
            self._forwards.after(self._seen.batch)
        if self.experts.call > 0 or self.half or not self._guided or self._layout.calls == 1:
            self._adapters.end_step()
        if self.experts.call > 0:
            if self._loop is not None and self._seen is not None:
                self._differences.of_second(self._loop, output, self._seen, expert=self.experts.now.number)
            if self._counts_forwards:
                self.tick()
            return None
        if self.half and not self._adapters and self.gates_cross:
            refuse(self.outputs.silent(), "did not give out what they keep, but ran on half of the batch")
        part = self.outputs.signals.part
        if self._decision.stores and self._seen is not None:
            rows = self._seen.batch // (1 if part is CachedPart.ALL else 2)
            self.experts.now.stored = CacheKey(rows, self._seen.shape, part)
        difference, loop, seen = None, self._loop, self._seen
        if loop is not None and seen is not None and self._guided and self._droppable:
            number = self.experts.now.number
            difference = self._differences.of_first(loop, output, seen, half=self.half, expert=number)
        if self._counts_forwards and not (self._guided and self._layout.calls > 1):
            # Else the second call is the end of the pass.
            self.tick()
        return difference

    def tick(
        self,
        index: int | None = None,
        latents: Any = None,
        tensors: dict[str, Any] | None = None,
        exchanged: Collection[str] = (),
    ) -> None:
        """
        A pass of the loop has ended.

        Args:
            index (`int`, *optional*): The pipeline's number of the pass.
            latents (`torch.Tensor`, *optional*): The latents of the next one, if the user's callback gave others.
            tensors (`dict`, *optional*): What the pipeline has told its callback.
            exchanged (`Collection` of `str`, *optional*): The names of what the user's callback gave others of.

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
        computed = not self._adapters.repeated()
        loop.tick(index, full=computed and not self.half, computed=computed, guided=self._guided)
        self._ticks += 1
        if self._droppable:
            # With `self._guided` as it was in the forward: the user's callback may have switched guidance off.
            self.batch.settle(self._seen, self._guided and self._layout.calls == 1, tensors or {}, latents)
        self._differences.read(loop, (tensors or {}).get("latents"))
        first = self.experts.now.by_call[0]
        did, layers = first.counts(), self.experts.layers_kept
        self._report_builder.add(loop, step, half=self.half, did=did, held=self.nbytes, layers=layers)
        if not self.gates_cross and not self.half:
            self._report_builder.passed(first.passed // (2 if self._decision.keeps_half else 1))
        least = first.least
        if least is not None and not self.report.kept_layers:
            warn_budget_too_small(self._state, self.call, least)
        if not self._counts_forwards:
            loop.follow(self.call.timeline())
        if self._ticks == 1:
            warn_gate_too_late(self._state, self.call, loop, gates_cross=self.gates_cross)
        if loop.over:
            self._end(loop)
        else:
            self.exchange([*exchanged, *self._late])
        self._late = ()

    def exchange(self, names: Collection[str]) -> None:
        """
        Something is another one from now on: the next step is a full one if what is kept is not of it.

        What is kept goes by the place in the batch, so other latents leave nothing of it. Other conditions (the text)
        leave cross-attention as it is, but not the difference that they make.

        Args:
            names (`Collection` of `str`): What pipelines call it.
        """
        loop = self._loop
        if loop is None or not (any(map(is_picture, names)) or (names and self._predicts)):
            return
        if self.experts.now.nbytes:
            # All layers have to run in the full step.
            self._adapters.begin_afresh()
        self.experts.now.forget()
        self._decision.begin_afresh()
        loop.begin_guidance()

    def prime(self, plan: StepPlan) -> None:
        """Wait for a forward that no hook announces."""
        self.waiting = True
        self.outputs.signals.set(plan.cross_attention, plan.self_attention)
        self._state.compiled.take(self.outputs.signals)

    def adopt(self, call: PipelineCall, layers: GatedLayers, *, droppable: bool) -> None:
        """The first pass of a loop has run unannounced, and a callback tells whose it was."""
        self.call, self.batch, self._droppable = call, CFGBatchCheck(call, layers.layout), droppable
        self.experts.adopt(layers)
        self._layout = layers.layout
        self._differences = self._compare()
        self.waiting = False
        self._guided = call.guided()
        self._begin().forward()
        self.outputs.after_forward()
        if self.outputs.signals.cross_attention is Action.STORE:
            self.experts.now.stored = UNSEEN

    def close(self, *, completed: bool = True) -> None:
        """The call has ended, however it ended: hold nothing, leave the report."""
        self._state.report = report = self._report_builder.report
        self.experts.forget()
        self._loop = None
        self._text.forget()
        self._seen = None
        self._differences.forget()
        reused = report.cross_attention_reused + report.self_attention_reused
        too_little = report.cross_attention_layers > report.kept_layers == 0
        gated = reused or report.half_batch_forwards or report.prediction_errors
        expected = self._decision.due or not (self._ticks or self.call.has_no_steps)
        if completed and self._decision.lost and not gated:
            warn_exchanged_in_every_step(self._state, self.call)
        elif completed and expected and not (reused or too_little):
            warn_nothing_gated(
                self.call,
                steps_seen=self._ticks > 0,
                halved=report.half_batch_forwards > 0,
                left_alone=self._left_alone,
            )

    def _begin(self) -> GuidedStepCounter:
        """A loop begins: its steps are told by now, or in its first step."""
        self._forwards.begin()
        self._loop = loop = GuidedStepCounter(self._state.schedule, self.call.timeline(), self._layout.calls)
        left_alone = self.experts.settle()
        self._left_alone = self._left_alone or bool(left_alone)
        if left_alone and self._droppable:
            self._droppable = False
            warn_ungated_processors(self._state, self.call, left_alone)
        if self._adapters.keep_guidance:
            warn_cache_owns_cfg(self._state, self.call, gates_cross=self.gates_cross)
        if self._counts_forwards:
            self.batch.expect(self.call.pictures())
        self.experts.limit(self._state.max_memory, shared=not self._droppable)
        self._decision.begin()
        return loop

    def _end(self, loop: GuidedStepCounter) -> None:
        """All passes have ended. Pipelines that run their loop several times in one call start the next one here."""
        self._report_builder.end_loop(loop)
        self._last_index = loop.last_index
        self._loop = None
        self.batch.forget()
        self._adapters.end_loop()
        self._decision.begin()
        self._differences.forget()
        self.experts.forget()

    @property
    def _predicts(self) -> bool:
        """Whether the difference of the halves of guidance is predicted from what is known."""
        return self._state.schedule.predicts and self._droppable and self.call.guided()

    def _meet_text(self, text: Any, loop: GuidedStepCounter, guided: bool) -> None:
        """A forward is given this text: if it is another one, what is kept is of the old one."""
        predicts = self._state.schedule.predicts and self._droppable and guided
        if not (self.gates_cross or predicts) or not self._text.is_exchanged(text, loop, at_gate=predicts):
            return
        if not predicts:
            if self.experts.now.stored is not None:
                self._text.say(loop)
        elif self.control.halved:
            # The ControlNet has run on one half already, so the next step is the full one.
            self._late = ("text",)
        else:
            self.exchange(("text",))

    def _is_guided(self, loop: GuidedStepCounter, seen: DenoiserInputs) -> bool:
        """Whether this step is guided: as its batch shows, or else as the call says."""
        if (
            self._layout.calls == 1
            and self._droppable
            and self.call.is_diffusers_loop
            and loop.passes
            and not self._counts_forwards
        ):
            # Some loops ask the pipeline in every step, which a callback may have changed; others ask once.
            halves = self.batch.holds_halves(seen)
            if halves is not None:
                return halves
        return self.call.guided()

    def _turn(self, loop: GuidedStepCounter, guided: bool) -> None:
        """Guidance goes off or on within the loop; it comes on with full steps, and nothing of before is reused."""
        if guided:
            self.experts.now.stored = None
        self.experts.took_over = True
        loop.begin_guidance()

    def _needs_guidance(self) -> bool:
        """Whether nothing is gated in a call without guidance."""
        schedule = self._state.schedule
        return schedule.is_auto or not (self.gates_cross or max(schedule.sp_interval, schedule.fi_interval) > 1)

    def _compare(self) -> Differences:
        """What compares the halves of guidance."""
        is_auto = self._state.schedule.is_auto
        return Differences(
            self.call.scale, self.batch, self._layout, self._adapters, self._report_builder, is_auto=is_auto
        )

    def _before_second(self, loop: GuidedStepCounter, seen: DenoiserInputs, denoiser: Any) -> None:
        """The second call of a full step: as the first one, but what only half steps reuse is not kept of it."""
        first = self._seen
        same = first is not None and (first.batch, first.shape) == (seen.batch, seen.shape)
        if self.half or not same or self.experts.now.layers.denoiser is not denoiser:
            raise ValueError(
                f"T-GATE: the second call of the denoiser in step {loop.step_index} is not of the kind of the first "
                "one, where T-GATE expects two calls for the same latents, the conditional one first. Call "
                "remove_tgate(pipe) to use this pipeline."
            )
        cross, own = self._decision.of_second_call(droppable=self._droppable)
        self.experts.call = 1
        self.outputs.signals.set(cross, own)
        self.outputs.before_forward()

    def skips(self, denoiser: Any) -> bool:
        """Whether the call of a denoiser that comes now is the one that is left out."""
        loop = self._loop
        expected = self._differences.leaves_out and loop is not None and loop.forwards == 1
        return expected and self.experts.now.layers.denoiser is denoiser

    def skipped(self) -> Any:
        """The output of the call that is left out."""
        assert self._loop is not None
        self._loop.forward(guided=True)
        self._adapters.leave_out()
        output = self._differences.left_out()
        if self._counts_forwards:
            self.tick()
        return output
