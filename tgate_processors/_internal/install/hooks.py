"""The hooks of a denoiser: they tell the run of every forward, halve what goes in and double what comes out."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..attention.state import TGateState
from ..denoiser.batch import complete_batch, guided_parts, slice_arguments, stack_samples, unstack_samples
from ..denoiser.inputs import DenoiserInputs, batch_size_of, get_latents, read_inputs, unknown_batch_arguments
from ..denoiser.lock import exclusively
from ..denoiser.spec import BatchArguments, Layout
from ..plan.step_plan import CFGHalf
from .gradient_checkpointing import WholeDenoiserCheckpointGuard, cannot_replay
from .hook_memory import HookMemory, OriginalArguments
from .ordered_hooks import OrderedHooks


class DenoiserHooks(OrderedHooks):
    """
    The forward hooks of a denoiser, and of what the pipeline calls before it in every step.

    They stand next to the forward, inside the user's hooks, which therefore see the batch that the pipeline gives and
    the output that it gets. Where a ControlNet has run on one half, the pipeline itself gives its residuals at half,
    and then the user's hooks see one half of everything: a hook that stands outside of theirs does the work. Where
    guidance is dropped, the two halves that are given back are the same, and the pipeline's own
    `uncond + scale * (cond - uncond)` gives them back exactly, for any scale and any rescaling; where it is predicted,
    they differ by the predicted difference. Only the inputs of a ControlNet are
    halved: what it gives goes to the denoiser, which needs the same half. The hooks are not compiled with the denoiser.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        denoiser (`torch.nn.Module`): The module that the pipeline calls in every step.
        controlnet (`torch.nn.Module`, *optional*): What it calls before the denoiser in every step.
        kept (`str`, *optional*): The half that stays, `"unconditional"` or `"conditional"`.
        default (`str`, *optional*): The half that stays if none is given and guidance is dropped; with a ControlNet
            that sees the conditional half only (`guess_mode`) it is that one, because the other has no control.
        layout (`Layout`, *optional*): What the batch is.
        told (`bool`, *optional*, defaults to `False`):
            Whether the user has said which arguments that the denoiser alone has are a batch.
    """

    def __init__(
        self,
        state: TGateState,
        denoiser: torch.nn.Module,
        controlnet: torch.nn.Module | None = None,
        kept: CFGHalf | None = None,
        default: CFGHalf | None = None,
        layout: Layout | None = None,
        told: bool = False,
    ) -> None:
        super().__init__(denoiser, controlnet)
        self._state = state
        self._told = told
        self._kept = kept
        self._default = default
        self._layout = layout or Layout()
        self._differentiated = WholeDenoiserCheckpointGuard()
        self._memories: weakref.WeakKeyDictionary[Any, HookMemory] = weakref.WeakKeyDictionary()

    def _before_all(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """A forward begins whose ControlNet has run on one half."""
        run = self._run(kwargs)
        if run is None or not self._memory(run).ran_on_half:
            return None
        self._memory(run).is_announced = True
        return self._enter(run, module, args, kwargs or {})

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """A forward begins."""
        run = self._run(kwargs)
        if run is None:
            if torch.is_grad_enabled():
                self._differentiated.check(get_latents({"sample": args[0]} if args else kwargs or {}))
            return None
        memory = self._memory(run)
        if memory.is_announced:
            memory.is_announced = False
            return None
        return self._enter(run, module, args, kwargs or {})

    def _run(self, kwargs: dict[str, Any] | None) -> Any:
        """The run that a hook serves. Without keyword arguments torch calls what was removed when it had listed it."""
        return None if kwargs is None else self._state.current()

    def _memory(self, run: Any) -> HookMemory:
        """What these hooks know of a run."""
        memory = self._memories.get(run)
        if memory is None:
            memory = self._memories[run] = HookMemory()
        return memory

    def _enter(self, run: Any, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tell the run of a forward, and halve the batch if it says so."""
        if cannot_replay(self._denoiser):
            raise ValueError(
                "T-GATE: with gradients on, this version of diffusers computes checkpointed blocks again where T-GATE "
                "cannot reach them. Call disable_gradient_checkpointing() on the denoiser, or update diffusers."
            )
        inputs = read_inputs(module, args, kwargs)
        self._differentiated.note(inputs.sample)
        memory = self._memory(run)
        if self._layout.is_auxiliary_call(inputs.arguments):
            memory.is_announced = False
            self._state.suspend()
            return None
        innermost = self._is_innermost()
        # For the hooks after this forward, and for the next one: some may have come since the last.
        exclusively(self._stand_inside)
        is_halved = memory.ran_on_half
        may_halve = innermost or is_halved or self._layout.calls > 1
        run.before_forward(inputs, self._active_half(run), may_halve=may_halve, is_halved=is_halved, denoiser=module)
        if run.guided and run.may_halve_batch:
            self._check_own(module, inputs, self._layout.denoiser_arguments)
        if not run.halves_batch:
            memory.see_residuals(batch_size_of([inputs.arguments.get(name) for name in self._layout.residuals]))
            if is_halved:
                raise ValueError(
                    "T-GATE: the ControlNet ran on half of the batch, but the denoiser has to run on all of it, "
                    "because its latents have changed. Change their size before the gate, or call remove_tgate(pipe)."
                )
            return None
        return self._halved(run, inputs, args, kwargs)

    def _halved(self, run: Any, inputs: DenoiserInputs, args: Any, kwargs: dict[str, Any]) -> Any:
        """The half of the arguments that stays. The user's hooks after the forward find the whole ones again."""
        layout, memory, batch = self._layout, self._memory(run), inputs.batch_size
        wanted: BatchArguments = (
            layout.denoiser_arguments if memory.ran_on_half else {**layout.denoiser_arguments, **layout.residuals}
        )
        kept = self._active_half(run)
        positional = dict(zip(inputs.arguments, args, strict=False))
        new_args = list(slice_arguments(positional, wanted, batch, kept).values())
        new_kwargs = slice_arguments(kwargs, wanted, batch, kept)
        memory.original = OriginalArguments(inputs, kept, args, kwargs, new_args, new_kwargs)
        memory.ran_on_half = False
        return new_args, new_kwargs

    def _check_own(self, module: torch.nn.Module, inputs: DenoiserInputs, names: BatchArguments) -> None:
        """Refuse arguments that diffusers does not know, if they may be a batch of which one half is to go."""
        if self._told:
            return
        for name, tensor in unknown_batch_arguments(module, inputs, {**names, **self._layout.residuals}):
            raise ValueError(
                f"T-GATE: {type(module).__name__} has an argument {name!r} of its own, here of shape "
                f"{tuple(tensor.shape)} with a guided batch of {inputs.batch_size}, where T-GATE has to know whether "
                f"it is a part of that batch, to leave one half of it out. Say that it is, apply_tgate(pipe, ..., "
                f"batch_arguments=({name!r},)), or that none is, batch_arguments=(), or call remove_tgate(pipe) to "
                "use this pipeline."
            )

    def _active_half(self, run: Any) -> CFGHalf:
        """The half that stays, in the order of this pipeline's batch."""
        # Cross-attention that is computed anew on one half of the text belongs to that half.
        conditional = self._memory(run).guess_mode or self._state.schedule.predicts or run.computes_cross_attention
        kept = self._kept or ("conditional" if conditional else self._default)
        if run.batch.unconditional_first:
            return kept  # type: ignore[return-value]
        return "unconditional" if kept == "conditional" else "conditional"

    def _before_controlnet(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Halve the batch if the denoiser's will be, unless it is one half already."""
        run = self._run(kwargs)
        if run is None or kwargs is None:
            return None
        inputs = read_inputs(module, args, kwargs)
        memory = self._memory(run)
        memory.before_controlnet(inputs.batch_size)
        if memory.guess_mode or not run.halves_next_forward(inputs.sample_shape):
            return None
        self._check_own(module, inputs, self._layout.controlnet_arguments)
        memory.ran_on_half = True
        kept = self._active_half(run)
        names = list(inputs.arguments)
        positional = dict(zip(names, args, strict=False))
        names_of_batch = self._layout.controlnet_arguments
        new_args = list(slice_arguments(positional, names_of_batch, inputs.batch_size, kept).values())
        return new_args, slice_arguments(kwargs, names_of_batch, inputs.batch_size, kept)

    def _after(self, module: torch.nn.Module, args: Any, *rest: Any) -> Any:
        """A forward has ended: tell the run, and give the output of the half back as both halves."""
        kwargs, output = rest if len(rest) > 1 else (None, rest[0])
        if self._state.current() is None:
            self._state.resume()
            return None
        run = self._run(kwargs)
        if run is None:
            return None
        memory = self._memory(run)
        whole, memory.original = memory.original, None
        difference = run.after_forward(output)
        if whole is None:
            return None
        if self._layout.entries:
            output = stack_samples(output)
        rows = batch_size_of(output)
        if rows != whole.rows:
            raise ValueError(
                f"T-GATE: {type(module).__name__} gave {rows} rows for half of the batch, where T-GATE "
                f"expects {whole.rows}: one of its arguments is of the whole batch and unknown to T-GATE. Call "
                "remove_tgate(pipe) to use this pipeline."
            )
        whole.restore()
        doubled = complete_batch(
            output,
            whole.rows,
            difference,
            whole.active_half,
            lambda both: guided_parts(both, whole.inputs, self._layout),
        )
        return unstack_samples(doubled) if self._layout.entries else doubled
