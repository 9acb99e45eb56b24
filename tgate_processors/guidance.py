"""Dropping classifier-free guidance at the denoiser: one half of the batch goes in, its output comes out twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from .run import PipelineRun
from .schedule import CFGHalf, Phase, StepPlan
from .state import TGateState


class DenoiserHooks:
    """
    The forward hooks of a denoiser: they open each step and, from the gate on, halve the batch.

    The pipeline's own `uncond + scale * (cond - uncond)` then gives the one output back exactly, for any scale and any
    rescaling. Without a `run` the hooks do nothing.

    Args:
        state (`TGateState`): Where the run stands.
    """

    def __init__(self, state: TGateState) -> None:
        self.run: PipelineRun | None = None
        self._state = state
        self._handles: list[Any] = []
        self._kept: CFGHalf = "unconditional"
        self._ticks = False
        self._before_step: Callable[[StepPlan, bool], None] | None = None
        self._guided = False
        self._batch = 0
        self._halved = False

    def install(
        self,
        denoiser: torch.nn.Module,
        kept: CFGHalf,
        *,
        ticks: bool = False,
        before_step: Callable[[StepPlan, bool], None] | None = None,
    ) -> None:
        """
        Register the hooks.

        Args:
            denoiser (`torch.nn.Module`): The module that the pipeline calls in every step.
            kept (`str`): The half that stays after the gate, `"unconditional"` (the first) or `"conditional"`.
            ticks (`bool`, *optional*, defaults to `False`):
                Whether the end of a forward is the end of a step, for pipelines without `callback_on_step_end`.
            before_step (`Callable`, *optional*):
                Called before each forward with the `StepPlan` and whether guidance is on.
        """
        self.remove()
        self._kept, self._ticks, self._before_step = kept, ticks, before_step
        self._handles = [
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            denoiser.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check_batch(self, latents: Any) -> None:
        """Compare the batch that the denoiser got with the latents: two halves with guidance, else one."""
        parts = 2 if self._guided else 1
        if self._batch and isinstance(latents, torch.Tensor) and self._batch != parts * latents.shape[0]:
            raise ValueError(
                f"the denoiser got a batch of {self._batch} for {latents.shape[0]} latents with "
                f"classifier-free guidance {'on' if self._guided else 'off'}, where T-GATE expects "
                f"{parts * latents.shape[0]}: the guidance of this pipeline is not two halves of one batch. Call "
                "remove_tgate(pipe) to use it."
            )

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Open the step; halve the batch after the gate."""
        if self.run is None:
            return None
        if self._state.running and self.run.is_over():
            self._state.reset()
        if not self._state.running:
            self._state.begin(*self.run.timeline())
        self._guided = self.run.guided()
        plan = self._state.enter(self._guided)
        if self._before_step is not None:
            self._before_step(plan, self._guided)
        self._batch = _batch_size(args, kwargs)
        self._halved = self._guided and plan.phase is Phase.FIDELITY_IMPROVING
        if not self._halved:
            return None
        return _halve(args, self._batch, self._kept), _halve(kwargs, self._batch, self._kept)

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Give the output of the half back as both halves."""
        if self.run is None:
            return None
        if self._ticks:
            self._state.advance()
        return _double(output, self._batch // 2) if self._halved else None


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Batch size of the noisy sample, the denoiser's first input."""
    sample = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
    return int(sample.shape[0])


def _halve(value: Any, batch: int, kept: CFGHalf) -> Any:
    """Keep one half of every tensor that holds a whole number of entries per sample, however deep it lies."""
    if isinstance(value, torch.Tensor):
        # `(1,)` timesteps, scalars and tables shared by the batch stay; `2B * frames` is halved like `2B`.
        if value.dim() == 0 or value.shape[0] < batch or value.shape[0] % batch:
            return value
        half = value.shape[0] // 2
        return value[:half] if kept == "unconditional" else value[half:]
    return _mapped(value, lambda item: _halve(item, batch, kept))


def _double(value: Any, half: int) -> Any:
    """Repeat every tensor of the half batch."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value]) if value.dim() and value.shape[0] == half else value
    return _mapped(value, lambda item: _double(item, half))


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the items of a container, into a new container of the same kind."""
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: function(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(function(item) for item in value)
    return value
