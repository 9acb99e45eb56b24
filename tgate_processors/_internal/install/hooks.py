"""The hooks of a denoiser: they notify the run of every forward, slice its inputs and complete its output."""

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
from .gradient_checkpointing import WholeDenoiserCheckpointGuard, has_unpatchable_checkpointing
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
        cfg_half (`str`, *optional*): The active half that the user has chosen, `"unconditional"` or `"conditional"`.
        default_half (`str`, *optional*): The active half if none is chosen and guidance is dropped; with a ControlNet
            that sees the conditional half only (`guess_mode`) it is that one, because the other has no control.
        layout (`Layout`, *optional*): What the batch is.
        batch_is_known (`bool`, *optional*, defaults to `False`):
            Whether the user has given the `batch_arguments` of the denoiser.
    """

    def __init__(
        self,
        state: TGateState,
        denoiser: torch.nn.Module,
        controlnet: torch.nn.Module | None = None,
        cfg_half: CFGHalf | None = None,
        default_half: CFGHalf | None = None,
        layout: Layout | None = None,
        batch_is_known: bool = False,
    ) -> None:
        super().__init__(denoiser, controlnet)
        self._state = state
        self._batch_is_known = batch_is_known
        self._cfg_half = cfg_half
        self._default_half = default_half
        self._layout = layout or Layout()
        self._checkpoint_guard = WholeDenoiserCheckpointGuard()
        self._memories: weakref.WeakKeyDictionary[Any, HookMemory] = weakref.WeakKeyDictionary()

    def _before_all(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """A forward begins whose ControlNet has run on one half."""
        run = self._current_run(kwargs)
        if run is None or not self._memory(run).ran_on_half:
            return None
        self._memory(run).is_announced = True
        return self._begin_forward(run, module, args, kwargs or {})

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """A forward begins."""
        run = self._current_run(kwargs)
        if run is None:
            if torch.is_grad_enabled():
                self._checkpoint_guard.check(get_latents({"sample": args[0]} if args else kwargs or {}))
            return None
        memory = self._memory(run)
        if memory.is_announced:
            memory.is_announced = False
            return None
        return self._begin_forward(run, module, args, kwargs or {})

    def _current_run(self, kwargs: dict[str, Any] | None) -> Any:
        """The run that a hook serves. Without keyword arguments torch calls what was removed when it had listed it."""
        return None if kwargs is None else self._state.current()

    def _memory(self, run: Any) -> HookMemory:
        """The memory of these hooks for a run."""
        memory = self._memories.get(run)
        if memory is None:
            memory = self._memories[run] = HookMemory()
        return memory

    def _begin_forward(self, run: Any, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Notify the run of a forward, and slice the batch if the run says so."""
        if has_unpatchable_checkpointing(self._denoiser):
            raise ValueError(
                "T-GATE: with gradients on, this version of diffusers computes checkpointed blocks again where T-GATE "
                "cannot reach them. Call disable_gradient_checkpointing() on the denoiser, or update diffusers."
            )
        inputs = read_inputs(module, args, kwargs)
        self._checkpoint_guard.record(inputs.sample)
        memory = self._memory(run)
        if self._layout.is_auxiliary_call(inputs.arguments):
            memory.is_announced = False
            run.on_auxiliary_call(inputs)
            self._state.suspend()
            return None
        innermost = self._is_innermost()
        # For the hooks after this forward, and for the next one: some may have come since the last.
        exclusively(self._move_innermost)
        is_halved = memory.ran_on_half
        may_halve = innermost or is_halved or self._layout.calls_per_step > 1
        run.before_forward(inputs, self._active_half(run), may_halve=may_halve, is_halved=is_halved, denoiser=module)
        if run.guided and run.may_halve_batch:
            self._reject_unknown_batches(module, inputs, self._layout.denoiser_arguments)
        if not run.halves_batch:
            memory.read_residuals(
                batch_size_of([inputs.arguments.get(name) for name in self._layout.controlnet_residuals])
            )
            if is_halved:
                raise ValueError(
                    "T-GATE: the ControlNet ran on half of the batch, but the denoiser has to run on all of it, "
                    "because its latents have changed. Change their size before the gate, or call remove_tgate(pipe)."
                )
            return None
        return self._slice_inputs(run, inputs, args, kwargs)

    def _slice_inputs(self, run: Any, inputs: DenoiserInputs, args: Any, kwargs: dict[str, Any]) -> Any:
        """Slice the arguments to the active half. They are restored for the user's hooks after the forward."""
        layout, memory, batch = self._layout, self._memory(run), inputs.batch_size
        wanted: BatchArguments = (
            layout.denoiser_arguments
            if memory.ran_on_half
            else {**layout.denoiser_arguments, **layout.controlnet_residuals}
        )
        active_half = self._active_half(run)
        positional = dict(zip(inputs.arguments, args, strict=False))
        new_args = list(slice_arguments(positional, wanted, batch, active_half).values())
        new_kwargs = slice_arguments(kwargs, wanted, batch, active_half)
        memory.original = OriginalArguments(inputs, active_half, args, kwargs, new_args, new_kwargs)
        memory.ran_on_half = False
        return new_args, new_kwargs

    def _reject_unknown_batches(self, module: torch.nn.Module, inputs: DenoiserInputs, names: BatchArguments) -> None:
        """Refuse arguments that diffusers does not have, if they may hold the batch that is to be sliced."""
        if self._batch_is_known:
            return
        for name, tensor in unknown_batch_arguments(module, inputs, {**names, **self._layout.controlnet_residuals}):
            raise ValueError(
                f"T-GATE: {type(module).__name__} has an argument {name!r} of its own, here of shape "
                f"{tuple(tensor.shape)} with a guided batch of {inputs.batch_size}, where T-GATE has to know whether "
                f"it is a part of that batch, to leave one half of it out. Say that it is, apply_tgate(pipe, ..., "
                f"batch_arguments=({name!r},)), or that none is, batch_arguments=(), or call remove_tgate(pipe) to "
                "use this pipeline."
            )

    def _active_half(self, run: Any) -> CFGHalf:
        """The active half, in the order of this pipeline's batch."""
        # Cross-attention that is computed anew on one half of the text belongs to that half.
        conditional = self._memory(run).guess_mode or self._state.schedule.predicts or run.computes_cross_attention
        half = self._cfg_half or ("conditional" if conditional else self._default_half)
        if run.batch.unconditional_first:
            return half  # type: ignore[return-value]
        return "unconditional" if half == "conditional" else "conditional"

    def _before_controlnet(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Slice the ControlNet's batch if the denoiser's will be sliced, unless it is one half already."""
        run = self._current_run(kwargs)
        if run is None or kwargs is None:
            return None
        inputs = read_inputs(module, args, kwargs)
        memory = self._memory(run)
        memory.before_controlnet(inputs.batch_size)
        if memory.guess_mode or not run.halves_next_forward(inputs.sample_shape):
            return None
        self._reject_unknown_batches(module, inputs, self._layout.controlnet_arguments)
        memory.ran_on_half = True
        active_half = self._active_half(run)
        names = list(inputs.arguments)
        positional = dict(zip(names, args, strict=False))
        names_of_batch = self._layout.controlnet_arguments
        new_args = list(slice_arguments(positional, names_of_batch, inputs.batch_size, active_half).values())
        return new_args, slice_arguments(kwargs, names_of_batch, inputs.batch_size, active_half)

    def _after(self, module: torch.nn.Module, args: Any, *rest: Any) -> Any:
        """A forward has ended: notify the run, and complete the output of one half to both halves."""
        kwargs, output = rest if len(rest) > 1 else (None, rest[0])
        if self._state.current() is None:
            self._state.resume()
            return None
        run = self._current_run(kwargs)
        if run is None:
            return None
        memory = self._memory(run)
        original, memory.original = memory.original, None
        difference = run.after_forward(output)
        if original is None:
            return None
        if self._layout.list_arguments:
            output = stack_samples(output)
        rows = batch_size_of(output)
        if rows != original.rows:
            raise ValueError(
                f"T-GATE: {type(module).__name__} gave {rows} rows for half of the batch, where T-GATE "
                f"expects {original.rows}: one of its arguments is of the whole batch and unknown to T-GATE. Call "
                "remove_tgate(pipe) to use this pipeline."
            )
        original.restore()
        doubled = complete_batch(
            output,
            original.rows,
            difference,
            original.active_half,
            lambda both: guided_parts(both, original.inputs, self._layout),
        )
        return unstack_samples(doubled) if self._layout.list_arguments else doubled
