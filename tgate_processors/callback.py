"""The step-counting `callback_on_step_end`: the clock, which ticks outside the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from .families import check_half, find_family
from .guidance import DenoiserHooks
from .run import PipelineRun
from .schedule import CFGHalf, StepPlan, TGateSchedule
from .state import TGateState


class TGateCallback:
    r"""
    Step-counting `callback_on_step_end`: the clock of T-GATE.

    [`apply_tgate`] makes one and hands it to every call of the pipeline. Make one yourself to choose the layers: put
    [`TGateAttnProcessor`]s with its `state` into the denoiser and hand it to the call. It then takes its place on the
    denoiser at the end of the first step and leaves it at the end of the last one.

    Args:
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        cfg_half (`str`, *optional*):
            The half of classifier-free guidance that stays after the gate, `"unconditional"` or `"conditional"`.
            Defaults to what the published implementation keeps for the pipeline.

    Attributes:
        state (`TGateState`): The run, for [`TGateAttnProcessor`]. `state.report` tells what the last run did.
        tensor_inputs (`list[str]`): What the callback asks of the pipeline, for `MultiPipelineCallbacks`: nothing.

    Raises:
        TypeError: If `schedule` is not a `TGateSchedule`.
        ValueError:
            If `cfg_half` is neither half; when run, if the pipeline cannot be gated, or if the gate lies in the first
            step of a guided call, whose end is the first that a callback sees.

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

    def __init__(self, schedule: TGateSchedule, *, cfg_half: CFGHalf | None = None) -> None:
        if not isinstance(schedule, TGateSchedule):
            raise TypeError(f"schedule is a {type(schedule).__name__}: give a TGateSchedule(gate_step=...).")
        if cfg_half not in (None, "unconditional", "conditional"):
            raise ValueError(f'cfg_half={cfg_half!r} is no half of guidance: give "unconditional" or "conditional".')
        self.cfg_half = cfg_half
        self.state = TGateState(schedule)
        self.hooks = DenoiserHooks(self.state)
        self.before_step: Callable[[StepPlan, bool], None] | None = None
        self.check_layers: Callable[[], None] | None = None
        self._run: PipelineRun | None = None
        self._visiting = True
        self.state.prime()

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """One pass of the pipeline's loop has ended."""
        if self._visiting and not self.state.running:
            self._begin_late(pipeline)
        self._check_batch(callback_kwargs.get("latents"))
        self._tick()
        if self._visiting and not self.state.running:
            self.reset()
        return callback_kwargs

    @property
    def running(self) -> bool:
        """Whether a call of the pipeline is under way."""
        return self._run is not None

    def settle(self) -> None:
        """Stay on the denoiser between the calls, for a pipeline that announces each of them by `start`."""
        self._visiting = False
        self.reset()

    def start(self, run: PipelineRun, *, by_forward: bool) -> None:
        """
        A call of the pipeline starts; its loop begins with the first denoiser forward.

        Args:
            run (`PipelineRun`): The call.
            by_forward (`bool`): Whether the end of a forward is the tick, for pipelines without step callbacks.
        """
        self.reset()
        self._run = run
        self.state.claim()
        self.hooks.before_forward = self._begin
        self.hooks.after_forward = self._tick if by_forward else None

    def reset(self) -> None:
        """Let go of all that a run holds, in particular one that an exception or an interrupt has ended."""
        self._run = None
        self.state.reset()
        self.hooks.rest()
        if self._visiting:
            self.hooks.remove()
            self.state.prime()

    def _begin(self) -> None:
        """Begin the loop, if it has not begun: its steps are known now."""
        if self._run is not None and not self.state.running:
            self.state.begin(*self._run.timeline())
            self._prepare()

    def _tick(self) -> None:
        """One pass of the loop has ended; get ready for the next one."""
        self.state.advance()
        self._prepare()

    def _prepare(self) -> None:
        """Set what the denoiser does in the pass to come."""
        if self._run is None or not self.state.running:
            return
        if self.check_layers is not None:
            self.check_layers()
        plan = self.state.enter(self.hooks.droppable and self._run.guided())
        if self.before_step is not None:
            self.before_step(plan, self.state.guided)

    def _begin_late(self, pipeline: Any) -> None:
        """Begin the run at the end of its first pass, the first that a callback alone sees."""
        found = find_family(pipeline)
        check_half(pipeline, found, self.cfg_half)
        self._run = run = PipelineRun(pipeline)
        # The first forward had no hook to do it.
        self.state.secure()
        self.state.begin(*run.timeline())
        if run.guided() and self.state.report.gate_step == 1:
            self.reset()
            raise ValueError(
                "gate_step is the first step, and a callback first runs when that is over: use apply_tgate(pipe, ...), "
                "or a gate_step of at least 2."
            )
        self.hooks.install(found.denoiser, self.cfg_half, found.kept_half, found.controlnet)
        self._prepare()
        self.hooks.before_forward = self._forget_a_broken_run

    def _forget_a_broken_run(self) -> None:
        """Start afresh if the denoiser is called by a later call than the one that was begun."""
        if self._run is not None and self._run.is_over():
            self.reset()

    def _check_batch(self, latents: Any) -> None:
        """Compare the batch that the denoiser got with the latents: two halves with guidance, else one."""
        guided = self.state.guided
        parts = 2 if guided else 1
        batch = self.hooks.batch if self.hooks.droppable else 0
        if batch and isinstance(latents, torch.Tensor) and batch != parts * latents.shape[0]:
            raise ValueError(
                f"the denoiser got a batch of {batch} for {latents.shape[0]} latents with classifier-free guidance "
                f"{'on' if guided else 'off'}, where T-GATE expects {parts * latents.shape[0]}: the guidance of "
                "this pipeline is not two halves of one batch. Call remove_tgate(pipe) to use it."
            )
