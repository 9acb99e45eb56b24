"""The step-counting `callback_on_step_end`."""

from __future__ import annotations

from typing import Any

from .families import find_family
from .guidance import DenoiserHooks
from .run import PipelineRun
from .schedule import CFGHalf, TGateSchedule
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
        tensor_inputs (`list[str]`): What the callback asks of the pipeline: `["latents"]`.

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

    tensor_inputs = ["latents"]  # noqa: RUF012 - diffusers concatenates lists

    def __init__(self, schedule: TGateSchedule, *, cfg_half: CFGHalf | None = None) -> None:
        if not isinstance(schedule, TGateSchedule):
            raise TypeError(f"schedule is a {type(schedule).__name__}: give a TGateSchedule(gate_step=...).")
        if cfg_half not in (None, "unconditional", "conditional"):
            raise ValueError(f'cfg_half={cfg_half!r} is no half of guidance: give "unconditional" or "conditional".')
        self.cfg_half = cfg_half
        self.state = TGateState(schedule)
        self.hooks = DenoiserHooks(self.state)
        self._visiting = False
        self.state.prime()

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """One pass of the pipeline's loop has ended."""
        if self.hooks.run is None:
            self._take_place(pipeline)
        self.hooks.check_batch(callback_kwargs.get("latents"))
        self.state.advance()
        if self._visiting and not self.state.running:
            self.reset()
        return callback_kwargs

    def reset(self) -> None:
        """Let go of all that a run holds, in particular one that an exception or an interrupt has ended."""
        self.hooks.run = None
        self.state.reset()
        if self._visiting:
            self.hooks.remove()
            self.state.prime()

    def _take_place(self, pipeline: Any) -> None:
        """Begin the run at the end of its first step, the first that a callback sees."""
        found = find_family(pipeline)
        run = PipelineRun(pipeline)
        self._visiting = True
        self.state.begin(*run.timeline())
        if run.guided() and self.state.report.gate_step == 1:
            self.reset()
            raise ValueError(
                "gate_step is the first step, and a callback first runs when that is over: use apply_tgate(pipe, ...), "
                "or a gate_step of at least 2."
            )
        self.state.enter(run.guided())
        self.hooks.run = run
        self.hooks.install(found.denoiser, self.cfg_half or found.kept_half)
