"""Dropping classifier-free guidance at the denoiser: one half of the batch goes in, its output comes out twice."""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from .schedule import Action, CFGHalf
from .state import TGateState

logger = logging.getLogger(__name__)


class DenoiserHooks:
    """
    The forward hooks of a denoiser: while its run is `halving`, they halve the batch.

    The pipeline's own `uncond + scale * (cond - uncond)` then gives the one output back exactly, for any scale and any
    rescaling. A ControlNet is halved on its way in only: what it gives goes to the denoiser, which needs the same half.
    The hooks are no part of a compiled denoiser.

    Args:
        state (`TGateState`): The run, whose forwards these hooks serve.
    """

    def __init__(self, state: TGateState) -> None:
        self._state = state
        self.kept: CFGHalf | None = None
        self.default: CFGHalf | None = None
        self.before_forward: Callable[[], None] | None = None
        self.after_forward: Callable[[], None] | None = None
        self.batch = 0
        self._control_batch = 0
        self._prompt: Any = None
        self._warned = False
        self._handles: list[Any] = []

    @property
    def droppable(self) -> bool:
        """Whether guidance is two halves, of which one can be left out."""
        return self.default is not None

    def install(
        self,
        denoiser: torch.nn.Module,
        kept: CFGHalf | None,
        default: CFGHalf | None,
        controlnet: torch.nn.Module | None = None,
    ) -> None:
        """
        Register the hooks.

        Args:
            denoiser (`torch.nn.Module`): The module that the pipeline calls in every step.
            kept (`str`, *optional*): The half that stays, `"unconditional"` (the first) or `"conditional"`.
            default (`str`, *optional*): The half that stays if none is given; with a ControlNet that sees the
                conditional half only (`guess_mode`) it is that one, because the other has no control. `None`: guidance
                is not two halves and stays as it is.
            controlnet (`torch.nn.Module`, *optional*): What the pipeline calls before the denoiser in every step.
        """
        self.remove()
        self.kept, self.default = kept, default
        self._handles = [
            denoiser.register_forward_pre_hook(self._eager(DenoiserHooks._before), with_kwargs=True),
            denoiser.register_forward_hook(self._eager(DenoiserHooks._after), with_kwargs=True),
        ]
        if controlnet is not None:
            hook = self._eager(DenoiserHooks._before_controlnet)
            self._handles.append(controlnet.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def rest(self) -> None:
        """Do nothing until the next run."""
        self.before_forward = None
        self.after_forward = None
        self.batch = 0
        self._control_batch = 0
        self._prompt = None

    def _eager(self, hook: Callable[..., Any]) -> Any:
        """Bind a hook that is no part of a compiled denoiser."""
        # Here and not as a decorator, which would load the compiler with this package. A bound method is copied with
        # the object that it is bound to.
        return types.MethodType(torch.compiler.disable(hook), self)  # type: ignore[no-untyped-call]

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Halve the batch after the gate."""
        if not self._state.is_mine():
            return None
        if self.before_forward is not None:
            self.before_forward()
        self.batch = _batch_size(args, kwargs)
        self._watch_prompt(kwargs.get("encoder_hidden_states"))
        return self._halved(args, kwargs) if self._state.halving else None

    def _before_controlnet(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Halve the batch after the gate, unless it is one half already."""
        if not self._state.is_mine():
            return None
        if not self._state.halving:
            self._control_batch = _batch_size(args, kwargs)
            return None
        # What is one half already has too few rows to be halved.
        return self._halved(args, kwargs)

    def _watch_prompt(self, prompt: Any) -> None:
        """Warn once of a prompt that is exchanged when nobody reads it any more."""
        if not isinstance(prompt, torch.Tensor):
            return
        before = self._prompt() if self._prompt is not None else None
        reused = self._state.running and self._state.cross_attention is Action.REUSE
        # With another batch it is guidance that was switched off, and not the prompt.
        exchanged = before is not None and before is not prompt and before.shape == prompt.shape
        if reused and exchanged and not self._warned:
            self._warned = True
            logger.warning(
                "the text embeddings were exchanged in step %s, after the gate: cross-attention goes on with the "
                "outputs of the former ones. Exchange them before gate_step=%s, or give a later gate_step.",
                self._state.step_index,
                self._state.report.gate_step,
            )
        self._prompt = weakref.ref(prompt)

    def _halved(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The half of the arguments that stays."""
        half_controlled = 2 * self._control_batch == self.batch
        kept = self.kept or ("conditional" if half_controlled else self.default)
        assert kept is not None
        return _halve(args, self.batch, kept), _halve(kwargs, self.batch, kept)

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Give the output of the half back as both halves."""
        if not self._state.is_mine():
            return None
        self._state.secure()
        halved = self._state.halving
        if self.after_forward is not None:
            self.after_forward()
        return _double(output, self.batch // 2) if halved else None


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
