"""One call of a pipeline: its steps, and what the denoiser and its layers do in each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ..attention.cache import AttentionCache, CachedOutput
from ..attention.layers import GatedLayers
from ..attention.state import Slot, TGateState
from ..caches.adapter import CacheAdapters
from ..caches.foreign_forwards import ForeignForwards
from ..denoiser.inputs import DenoiserInputs, is_latents
from ..guidance.batch_check import CFGBatchCheck
from ..guidance.batched_cfg import BatchedCFG
from ..guidance.denoiser_cfg import ComputedCall, DenoiserCFG
from ..guidance.sequential_cfg import SequentialCFG
from ..plan.forward_plan import UNSEEN, CachedPart, CacheKey
from ..plan.step_plan import Action, CFGHalf, Level
from ..plan.steps import StepCounter
from .base import Run
from .call import PipelineCall
from .denoisers import DenoiserCaches
from .messages import RunWarnings, raise_uncached_layers
from .planner import ForwardPlanner
from .ranks import agreement_of

# No layer has computed or reused anything.
_NOTHING = ((False, False), (False, False))


class PipelineRun(Run[DenoiserCFG]):
    """
    One call of a pipeline. It is made anew for every call, and nothing of it outlives the call but the report.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        call (`PipelineCall`): What the pipeline reports.
        layers (`GatedLayers` or a sequence of them): The attention layers of its denoiser, or of its denoisers.
        can_skip_half (`bool`): Whether guidance is two halves, of which one can be skipped.
        counts_forwards (`bool`, *optional*, defaults to `False`):
            Whether the end of a forward is the end of a step, for pipelines without step callbacks.
        caches (`CacheAdapters`, *optional*): The caches of others on the denoiser.
        cross_attention (`bool`, *optional*): Whether cross-attention is gated. Defaults to what the family says.
        forwards (`ForeignForwards`, *optional*): What its denoisers do when they are called.
        can_forecast (`bool`, *optional*, defaults to `False`):
            Whether calls of the denoiser, and of what is called before it, can be left out.
        check_rows (`Callable`, *optional*):
            Is told after each forward how many rows of guidance the layers of the denoiser should have got.
    """

    def __init__(
        self,
        state: TGateState,
        call: PipelineCall,
        layers: GatedLayers | Sequence[GatedLayers],
        *,
        can_skip_half: bool,
        counts_forwards: bool = False,
        caches: CacheAdapters | None = None,
        cross_attention: bool | None = None,
        forwards: ForeignForwards | None = None,
        can_forecast: bool = False,
        check_rows: Callable[[torch.nn.Module, int], None] | None = None,
    ) -> None:
        self.denoisers = DenoiserCaches(state, [layers] if isinstance(layers, GatedLayers) else layers)
        layout = self.denoisers.active.layers.layout
        form = SequentialCFG if layout.calls_per_step > 1 else BatchedCFG
        cfg = form(state.schedule, layout, call.guidance_scale)
        forwards = forwards or ForeignForwards(())
        agree = agreement_of([each.layers.denoiser for each in self.denoisers])
        super().__init__(state, cfg, forwards, can_skip_half=can_skip_half, can_forecast=can_forecast, agree=agree)
        self.call = call
        self.gates_cross = layout.gates_cross_by_default if cross_attention is None else cross_attention
        self.batch = CFGBatchCheck(call, layout)
        self._counts_forwards = counts_forwards
        self._check_rows = check_rows
        self._caches = caches or CacheAdapters()
        self.denoisers.set_sees_half_inside(self._caches.owns_cfg)
        self._planner = ForwardPlanner(state, self.denoisers, self._caches, cfg, gates_cross=self.gates_cross)
        self._warnings = RunWarnings(state, call, gates_cross=self.gates_cross, joint=layout.joint)
        self._last_index: int | None = None
        # The inputs of the forward that runs, or has run last.
        self._inputs: DenoiserInputs | None = None
        self._guided = False
        self._active_index = 1
        self._num_samples: int | None = None
        # What was exchanged too late for the step that runs.
        self._exchanged_late: Collection[str] = ()

    @property
    def attention_cache(self) -> AttentionCache:
        """The cached outputs of the layers that run now."""
        return self.denoisers.attention_cache

    @property
    def cached_outputs(self) -> dict[Slot, CachedOutput]:
        """The cached outputs of the layers that run now, by gate."""
        return self.attention_cache.cached

    @property
    def nbytes(self) -> int:
        """Bytes held in stored outputs, and in differences of the halves of guidance."""
        return self.denoisers.nbytes + self._cfg.nbytes

    @property
    def guided(self) -> bool:
        """Whether the last forward was given both halves of guidance, in one batch."""
        return self._guided and self._can_skip_half

    @property
    def computes_cross_attention(self) -> bool:
        """Whether half steps compute any cross-attention."""
        return not self.gates_cross or bool(self.denoisers.active.per_call[0].over_budget)

    @property
    def halves_batch(self) -> bool:
        """Whether the forward that runs now runs on half of the batch that the pipeline gives."""
        return self._planner.plan.halves_batch

    @property
    def step_index(self) -> int:
        """The step that runs now."""
        return self._report_builder.step_offset + (self._loop.step_index if self._loop is not None else 0)

    @property
    def pass_index(self) -> int:
        """Passes of the loop that have ended."""
        return self._loop.pass_index if self._loop is not None else 0

    @property
    def is_between_loops(self) -> bool:
        """Whether no loop is under way."""
        return self._loop is None

    @property
    def gates_first_step(self) -> bool:
        """Whether the gate lies in the first step."""
        return self._loop is not None and self._loop.gate_step == 1

    @property
    def may_halve_batch(self) -> bool:
        """Whether the batch of a guided step of this loop may be halved."""
        return not self._is_sequential and self._loop is not None and self._loop.can_halve_batch

    def halves_next_forward(self, shape: tuple[int, ...]) -> bool:
        """Whether the step that runs now will run on half the batch, if its latents are of this shape."""
        loop = self._loop
        halves = loop is not None and self._planner.halves_next_forward(loop, shape)
        return halves and self.guided and self.call.do_cfg_now()

    def before_forward(
        self,
        inputs: DenoiserInputs,
        active_half: CFGHalf = "unconditional",
        *,
        may_halve: bool = True,
        is_halved: bool = False,
        denoiser: Any = None,
    ) -> None:
        """
        The denoiser is called: plan what it and its layers do.

        Args:
            inputs (`DenoiserInputs`): Its inputs.
            active_half (`str`, *optional*, defaults to `"unconditional"`):
                The half that a half step runs on, by its place.
            may_halve (`bool`, *optional*, defaults to `True`): Whether no other hook reads the batch after ours.
            is_halved (`bool`, *optional*, defaults to `False`): Whether a ControlNet has run on one half already.
            denoiser (`torch.nn.Module`, *optional*): Which of several it is.

        Raises:
            ValueError: If the batch is not what guidance makes it, or a layer that has to reuse an output has none.
        """
        loop = self._loop or self._begin_loop()
        guided = self._is_guided(loop, inputs)
        loop.begin_forward(guided=guided)
        if self._is_sequential and loop.forwards_in_pass > 1:
            self._before_second_call(loop, inputs, denoiser)
            return
        if self.denoisers.activate(denoiser):
            self.denoisers.switched = loop.pass_index > 0
            self._caches.on_denoiser_switch(self.denoisers.active.index)
            self._restart_guidance(loop)
        elif loop.pass_index and guided != self._guided:
            self._switch_guidance(loop, guided)
        self._check_batch(loop, inputs, guided)
        self._check_prompt_embeds(inputs.encoder_hidden_states, loop, guided, is_halved)
        self.denoisers.active.layers.set_active(inputs.arguments)
        self._inputs, self._guided = inputs, guided
        self._active_index = int(active_half == "conditional")
        step, context = self._planner.begin_step(
            loop, inputs, active_half, guided=guided, can_skip_half=self._can_skip_half, may_halve=may_halve
        )
        self._warnings.on_step_planned(step, context)

    def after_forward(self, output: Any = None) -> list[torch.Tensor] | None:
        """
        The denoiser has returned.

        Args:
            output (`torch.Tensor` or container, *optional*): Its output.

        Returns:
            `list` of `torch.Tensor`, *optional*: After a half step, the second half minus the first.
        """
        plan, inputs, loop = self._planner.plan, self._inputs, self._loop
        self.attention_cache.after_forward()
        if self._agree is not None and inputs is not None:
            self.attention_cache.agree_on_budget(self._agree, inputs.sample.device)
        if self.guided and not plan.is_half_step and inputs is not None:
            self._forwards.after_forward(inputs.batch_size)
        if self._check_rows is not None and inputs is not None:
            may_halve = self.guided and self.may_halve_batch
            self._check_rows(self.denoisers.active.layers.denoiser, inputs.batch_size if may_halve else 0)
        is_second = self.denoisers.call_index > 0
        is_last = is_second or plan.is_half_step or not (self._guided and self._is_sequential)
        if is_last:
            self._caches.on_step_end()
        if not is_second:
            if plan.is_half_step and not self._caches and self.gates_cross:
                what = "did not give out what they keep, but ran on half of the batch"
                raise_uncached_layers(self.attention_cache.uncalled_layers(), what)
            if plan.marks_cache and inputs is not None:
                rows = inputs.batch_size // (1 if plan.part is CachedPart.ALL else 2)
                self.denoisers.active.cache_key = CacheKey(rows, inputs.sample_shape, plan.part)
        difference = None
        if loop is not None and inputs is not None and self.guided:
            difference = self._on_guided_output(loop, output, inputs)
        return difference

    def on_auxiliary_call(self, inputs: DenoiserInputs) -> None:
        """The denoiser is called once more in a step, for guidance of another kind, which runs whole."""

    def on_step_end(
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
            tensors (`dict`, *optional*): What the pipeline has passed to its callback.
            exchanged (`Collection` of `str`, *optional*): The names of what the user's callback gave others of.

        Raises:
            ValueError: If the steps or the batch are not those that the pipeline reports.
        """
        loop = self._loop or self._begin_loop()
        if self._last_index is not None and index == self._last_index + 1:
            raise ValueError(
                f"T-GATE: the loop goes on with step {index} after the {index} steps that the pipeline says it has "
                "(`num_timesteps`). Call remove_tgate(pipe) to use this pipeline."
            )
        self._last_index = None
        step, level = loop.step_index, self._planner.plan.level
        computed = not self._caches.was_hit()
        errors = self._read_errors(loop)
        paced = level if computed or level is not Level.FULL else Level.HALF
        ends_step = loop.end_pass(index, level=paced, computed=computed, guided=self._guided, errors=errors)
        if self._can_skip_half:
            # With `self._guided` as it was in the forward: the user's callback may have switched guidance off.
            self.batch.on_step_end(self._inputs, self._guided and not self._is_sequential, tensors or {}, latents)
        given = (tensors or {}).get("latents")
        self._num_samples = len(given) if isinstance(given, torch.Tensor) else self._num_samples
        self._cfg.end_pass(given, ends_step=ends_step)
        is_first = not self.report.num_inference_steps
        self._report_step(loop, step)
        if not self._counts_forwards:
            loop.set_timeline(self.call.timesteps.read_timeline())
        if is_first:
            self._warnings.gate_too_late(loop)
        if loop.is_finished:
            self._end_loop(loop)
        else:
            self.invalidate([*exchanged, *self._exchanged_late])
        self._exchanged_late = ()

    def invalidate(self, names: Collection[str]) -> None:
        """
        Some inputs are exchanged: the next step is a full one if what is cached depends on them.

        What is cached goes by the place in the batch, so other latents leave nothing of it. Other conditions (the text)
        leave cross-attention as it is, but not the difference that they make.

        Args:
            names (`Collection` of `str`): Their names in pipelines.
        """
        loop = self._loop
        if loop is None or not (any(map(is_latents, names)) or (names and (self._predicts or self._can_forecast))):
            return
        if self.denoisers.active.nbytes:
            # All layers have to run in the full step.
            self._caches.reset()
        self.denoisers.active.reset()
        self._planner.invalidate()
        self._restart_guidance(loop)

    def adopt_first_pass(self, first: AttentionCache) -> None:
        """The first pass of a loop has run without hooks: take over what the layers have cached in it."""
        self.denoisers.adopt(first)
        loop = self._begin_loop()
        self._guided = self.call.do_cfg_now()
        loop.begin_forward(guided=self._guided)
        first.after_forward()
        if first.actions.cross_attention is Action.STORE:
            self.denoisers.active.cache_key = UNSEEN

    def finish(self, *, completed: bool = True) -> None:
        """The call has ended, however it ended: release cached tensors, store the report."""
        self.denoisers.reset()
        self._inputs = None
        self._warnings.finish(self._release(), completed=completed)

    def _begin_loop(self) -> StepCounter:
        """A loop begins: its steps are reported by now, or in its first step."""
        ungated = self.denoisers.regate_replaced()
        if ungated:
            self._warnings.ungated(ungated if self._can_skip_half else [])
            # Their processors may count their calls.
            self._can_skip_half = self._can_forecast = False
        loop = self._begin_counting(self.call.timesteps.read_timeline())
        if self._caches.owns_cfg:
            self._warnings.cache_owns_cfg()
        if self._counts_forwards:
            self._num_samples = self.call.num_samples()
            self.batch.set_num_samples(self._num_samples)
        self.denoisers.set_budget(self._state.max_memory, shared=not self._can_skip_half)
        self._planner.reset()
        return loop

    def _end_loop(self, loop: StepCounter) -> None:
        """All passes have ended. Pipelines that run their loop several times in one call start the next one here."""
        self._report_builder.end_loop(loop)
        self._last_index = loop.last_index
        self._loop = None
        self.batch.reset()
        self._caches.on_loop_end()
        self._cfg.release()
        self.denoisers.reset()
        self._planner.reset()

    @property
    def _is_sequential(self) -> bool:
        """Whether guidance is sequential: two calls of the denoiser in a step."""
        return self._cfg.calls_per_step > 1

    @property
    def _predicts(self) -> bool:
        """Whether the difference of the halves of guidance is predicted from what is known."""
        return self._state.schedule.predicts and self._can_skip_half and self.call.do_cfg_now()

    def _switch_guidance(self, loop: StepCounter, guided: bool) -> None:
        """Guidance goes off or on within the loop; it begins with full steps, and nothing from before is reused."""
        if guided:
            self.denoisers.active.cache_key = None
        self.denoisers.switched = True
        self._restart_guidance(loop)

    def _is_guided(self, loop: StepCounter, inputs: DenoiserInputs) -> bool:
        """Whether this step is guided: as its batch shows, or else as the call says."""
        shows = not self._is_sequential and self._can_skip_half and self.call.is_diffusers_loop
        if shows and loop.pass_index and not self._counts_forwards:
            # Some loops ask the pipeline in every step, which a callback may have changed; others ask once.
            halves = self.batch.has_both_halves(inputs)
            if halves is not None:
                return halves
        return self.call.do_cfg_now()

    def _check_batch(self, loop: StepCounter, inputs: DenoiserInputs, guided: bool) -> None:
        """Refuse a forward that is not the one that the steps before it have led to."""
        self.denoisers.check_not_replaced()
        if self._can_skip_half and (loop.pass_index or self._counts_forwards):
            self.batch.validate(inputs, guided and not self._is_sequential)
        if self._counts_forwards and not self.call.is_diffusers_loop:
            self.call.timesteps.check_timestep(inputs.arguments.get("timestep"), loop.pass_index)
        if not (loop.pass_index or self._can_forecast):
            self._warnings.no_cfg()

    def _check_prompt_embeds(self, text: Any, loop: StepCounter, guided: bool, is_halved: bool) -> None:
        """A forward has this text: if it differs from the last one, what is cached is of the old one."""
        predicts = self._state.schedule.predicts and (self._can_forecast or (self._can_skip_half and guided))
        if not (self.gates_cross or predicts):
            return
        if not self._warnings.text.is_exchanged(
            text, lambda: self._planner.step_plan(loop, is_split=guided and self._can_skip_half).phase, at_gate=predicts
        ):
            return
        if not predicts:
            if self.denoisers.active.cache_key is not None:
                self._warnings.text_exchanged(loop)
        elif is_halved:
            # The ControlNet has run on one half already, so the next step is the full one.
            self._exchanged_late = ("text",)
        else:
            self.invalidate(("text",))

    def _before_second_call(self, loop: StepCounter, inputs: DenoiserInputs, denoiser: Any) -> None:
        """The second call of a full step: as the first one, but what only half steps reuse is not cached in it."""
        first = self._inputs
        same = first is not None and (first.batch_size, first.sample_shape) == (inputs.batch_size, inputs.sample_shape)
        if self._planner.plan.is_half_step or not same or self.denoisers.active.layers.denoiser is not denoiser:
            raise ValueError(
                f"T-GATE: the second call of the denoiser in step {loop.step_index} is not of the kind of the first "
                "one, where T-GATE expects two calls for the same latents, the conditional one first. Call "
                "remove_tgate(pipe) to use this pipeline."
            )
        self._planner.begin_second_call(can_skip_half=self._can_skip_half)

    def _on_guided_output(self, loop: StepCounter, output: Any, inputs: DenoiserInputs) -> list[torch.Tensor] | None:
        """A call of a guided step has ended: complete a half step, or record both halves of a full one."""
        call = self._computed_call(loop, output, inputs)
        if self._planner.plan.is_half_step:
            return self._cfg.complete(call)
        if loop.has_half_steps_left or loop.has_forecast_steps_left:
            self._cfg.observe(call)
        return None

    def _computed_call(self, loop: StepCounter, output: Any, inputs: DenoiserInputs) -> ComputedCall:
        """A call of the step that runs now, for the form of guidance."""
        return ComputedCall(
            loop.pass_index,
            output,
            inputs,
            self.denoisers.call_index,
            0 if self.batch.unconditional_first else 1,
            self.denoisers.active.index,
            cache_hit=self._state.schedule.is_auto and self._caches.was_hit(),
            is_split=self.guided,
            active_index=self._active_index,
            num_samples=self._num_samples,
        )

    def _report_step(self, loop: StepCounter, step: int) -> None:
        """A pass of this step has ended: add it to the report."""
        level, first = self._planner.plan.level, self.denoisers.active.per_call[0]
        kept = self.denoisers.cached_layer_counts
        self._report_builder.add_pass(
            loop,
            step,
            level=level,
            counts=_NOTHING if level is Level.FORECAST else first.last_forward_counts(),
            cached_bytes=self.nbytes,
            cached_layers=kept,
        )
        if not self.gates_cross and level is Level.FULL:
            self._report_builder.add_uncached_bytes(
                first.uncached_bytes // (2 if self._planner.plan.caches_one_half else 1)
            )
        if first.min_bytes is not None and not self.report.kept_layers:
            self._warnings.budget_too_small(first.min_bytes)
