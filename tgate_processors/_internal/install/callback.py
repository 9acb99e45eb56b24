"""The step-counting `callback_on_step_end`: the clock, which ticks outside the denoiser."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar

import torch

from ..attention.cache import AttentionCache
from ..attention.layers import GatedLayers
from ..attention.state import TGateState
from ..caches.detect import detect_caches
from ..caches.foreign_forwards import CustomForwards, ForeignForwards, validate_custom_forwards
from ..denoiser.lock import exclusively
from ..families import ResolvedPipeline, resolve_and_check
from ..plan.planning import first_step
from ..plan.schedule import GateStep, TGateSchedule, as_schedule
from ..plan.step_plan import CFGHalf
from ..plan.validation import is_choice, shown
from ..run.run import PipelineRun
from .gradient_checkpointing import replay_checkpoints, stop_replaying_checkpoints
from .hooks import DenoiserHooks
from .pipeline_call import call_of
from .pipeline_check import reject_forecasts


class TGateCallback:
    r"""
    Step-counting `callback_on_step_end`: the clock of T-GATE, for wiring it by hand.

    [`apply_tgate`] does all of this by itself. Make a clock yourself to choose the layers: put
    [`TGateAttnProcessor`]s with its `state` into the denoiser and pass it to the call. It then takes its place on the
    denoiser at the end of the first step and leaves it at the end of the last one. Half of guidance is left out only if
    every cross-attention layer has a gate; else all of it stays on. Nothing is forecast.

    Args:
        schedule (`TGateSchedule`, `int`, `float` or `str`):
            The schedule, or its `gate_step`, as in [`apply_tgate`].
        cfg_half (`str`, *optional*):
            The half of classifier-free guidance that stays after the gate, `"unconditional"` or `"conditional"`.
            Defaults to what the published implementation keeps for the pipeline.
        custom_forwards (`str`, *optional*):
            `"gate"` says that a `forward` that is not its class's own keeps nothing from one call to the next. By
            default it is refused.

    Attributes:
        state (`TGateState`): The run, for [`TGateAttnProcessor`]. `state.report` tells what the last run did.
        tensor_inputs (`list[str]`): What the callback asks for, for `MultiPipelineCallbacks`: nothing.

    Raises:
        TypeError: If `schedule` stands for none.
        ValueError:
            If `schedule`, `cfg_half` or `custom_forwards` is none of its words; when run, if the pipeline cannot be
            gated, if `levels` has forecast steps, or if the gate lies in the first step of a guided call, whose end is
            the first that a callback sees.

    Example:

    ```py
    >>> from tgate_processors import TGateAttnProcessor, TGateCallback, TGateSchedule

    >>> callback = TGateCallback(TGateSchedule(gate_step=10))
    >>> before = pipe.unet.attn_processors
    >>> pipe.unet.set_attn_processor({name: TGateAttnProcessor(p, callback.state) for name, p in before.items()})
    >>> image = pipe(prompt, callback_on_step_end=callback).images[0]
    >>> pipe.unet.set_attn_processor(before)
    ```

    Source: T-GATE (https://arxiv.org/abs/2404.02747).
    """

    tensor_inputs: ClassVar[list[str]] = []

    def __init__(
        self,
        schedule: TGateSchedule | GateStep,
        *,
        cfg_half: CFGHalf | None = None,
        custom_forwards: CustomForwards | None = None,
    ) -> None:
        self.state = TGateState(as_schedule(schedule, "schedule"))
        self._custom_forwards = validate_custom_forwards(custom_forwards)
        self.cfg_half = validate_cfg_half(cfg_half)
        self._run: PipelineRun | None = None
        self._attached = ExitStack()
        self._await_first_step()

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """One pass of the pipeline's loop has ended."""
        try:
            run = self._run or self._attach(pipeline)
            # In a callback of another thread there is no run of this one.
            if self.state.current() is run:
                run.on_step_end(step_index, tensors=callback_kwargs)
        except BaseException:
            self.reset()
            raise
        if run.is_between_loops:
            run.finish()
            self.reset()
        return callback_kwargs

    def reset(self) -> None:
        """Release everything that a run holds, for example after an exception or an interrupt."""
        self._attached.close()
        self._run = None
        self._await_first_step()

    def _await_first_step(self) -> None:
        """Set what the layers do in the first step of a call, which has no run yet."""
        self.state.first_step_cache = cache = AttentionCache(self.state, GatedLayers(None, self.state))
        plan = first_step(self.state.schedule)
        cache.actions.set(plan.cross_attention, plan.self_attention)
        self.state.compiled_actions.copy_from(cache.actions)

    def _attach(self, pipeline: Any) -> PipelineRun:
        """Begin the run at the end of its first pass, the first that a callback alone sees."""
        self._attached.close()
        found = resolve_and_check(pipeline, self.state.schedule, self.cfg_half, None)
        self._check(pipeline, found)
        layout = found.family.layout
        layers = GatedLayers(found.denoiser, self.state, "gate", layout)
        layers.discover()
        call = call_of(found, pipeline)
        run = PipelineRun(self.state, call, layers, can_skip_half=found.default_cfg_half is not None)
        first, self.state.first_step_cache = self.state.first_step_cache, None
        assert isinstance(first, AttentionCache)
        self._run = run
        hooks = DenoiserHooks(
            self.state, found.denoiser, found.controlnet, self.cfg_half, found.default_cfg_half, layout
        )
        watch = found.denoiser.register_forward_pre_hook(self._reset_stale_run)
        exclusively(hooks.install)
        self._attached.callback(watch.remove)
        self._attached.callback(lambda: exclusively(hooks.uninstall))
        self._attached.callback(stop_replaying_checkpoints, found.denoiser, self)
        replay_checkpoints(found.denoiser, self.state, self)
        self.state.enter(run)
        self._attached.callback(self.state.leave)
        run.adopt_first_pass(first)
        if call.do_cfg_now() and run.gates_first_step:
            raise ValueError(
                "T-GATE: gate_step is the first step, and a callback first runs when that is over: use "
                "apply_tgate(pipe, ...), or a gate_step of at least 2."
            )
        return run

    def _check(self, pipeline: Any, found: ResolvedPipeline) -> None:
        """Refuse what a callback alone cannot gate."""
        schedule = self.state.schedule
        if found.family.layout.calls_per_step > 1:
            raise ValueError(
                f"T-GATE: the guidance of {type(pipeline).__name__} is two calls of its denoiser, and a callback alone "
                "cannot leave one out: use apply_tgate(pipe, ...)."
            )
        reject_forecasts(schedule, "a callback alone cannot leave out a call of the denoiser")
        reason = "a callback alone cannot tell it where the batch changes: use apply_tgate(pipe, ...)"
        detect_caches(found.denoiser, schedule, reason=reason)
        ForeignForwards([found.denoiser], self._custom_forwards).check()

    def _reset_stale_run(self, module: torch.nn.Module, args: Any) -> None:
        """Start afresh if the denoiser is called by a later call than the one that was begun."""
        if self._run is not None and self._run.call.timesteps.is_stale():
            # The hooks stay for this forward, which torch has begun with them.
            self._run = None
            self.state.leave()
            self._await_first_step()


def validate_cfg_half(cfg_half: CFGHalf | None) -> CFGHalf | None:
    """Validate `cfg_half`."""
    if not is_choice("cfg_half", cfg_half, "unconditional", "conditional"):
        raise ValueError(f'`cfg_half` must be "unconditional" or "conditional", got {shown(cfg_half)}.')
    return cfg_half
