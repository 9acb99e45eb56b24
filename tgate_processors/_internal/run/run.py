"""One call of a pipeline: what the denoiser and its layers do in each of its steps."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from ..attention.cache import AttentionCache
from ..denoiser.inputs import DenoiserInputs
from ..guidance.denoiser_cfg import ComputedCall
from ..plan.forward_plan import UNSEEN, CachedPart, CacheKey
from ..plan.step_plan import Action, CFGHalf, Level
from ..plan.steps import StepCounter
from .loop_run import LoopRun
from .messages import raise_uncached_layers


class PipelineRun(LoopRun):
    """
    One call of a pipeline. It is made anew for every call, and nothing of it outlives the call but the report.

    It takes what `LoopRun` takes.
    """

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
