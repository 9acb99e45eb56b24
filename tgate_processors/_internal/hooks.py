"""The hooks of a denoiser: they tell the run of every forward, halve what goes in and double what comes out."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from .checkpointing import Differentiated, cannot_replay
from .halving import double, halve_named, stacked, unstacked
from .layout import Layout, Names
from .schedule import CFGHalf
from .seen import Seen, latents_of, rows_of, see, unknown_batches
from .state import TGateState


class DenoiserHooks:
    """
    The forward hooks of a denoiser, and of what the pipeline calls before it in every step.

    They stand next to the forward, inside the user's hooks, which therefore see the batch that the pipeline gives and
    the output that it gets. Where a ControlNet has run on one half, the pipeline itself gives its residuals at half,
    and then the user's hooks see one half of everything. Where guidance is dropped, the two halves that are given back
    are the same, and the pipeline's own `uncond + scale * (cond - uncond)` gives them back exactly, for any scale and
    any rescaling; where it is predicted, they differ by the predicted difference. Only the inputs of a ControlNet are
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
        self._state = state
        self._told = told
        self._denoiser = denoiser
        self._controlnet = controlnet
        self._kept = kept
        self._default = default
        self._layout = layout or Layout()
        self._handles: list[tuple[Any, Any]] = []
        self._differentiated = Differentiated()

    def install(self) -> None:
        """Register the hooks."""
        self.remove()
        self._register(self._denoiser.register_forward_pre_hook, self._denoiser._forward_pre_hooks, self.before)
        self._register(self._denoiser.register_forward_hook, self._denoiser._forward_hooks, self.after)
        controlnet = self._controlnet
        if controlnet is not None:
            hooks = controlnet._forward_pre_hooks
            self._register(controlnet.register_forward_pre_hook, hooks, self.before_controlnet)
        self.stand_inside()

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle, _ in self._handles:
            handle.remove()
        self._handles = []

    def stand_inside(self) -> None:
        """Stand next to the forward: last of those before it, first of those after it."""
        for handle, hooks in self._handles:
            if handle.id in hooks:
                hooks.move_to_end(handle.id, last=hooks is not self._denoiser._forward_hooks)

    def _stand_outside(self) -> None:
        """Be the first of those before the forward."""
        handle, hooks = self._handles[0]
        hooks.move_to_end(handle.id, last=False)

    # Bound methods, which torch's compiler knows for such hooks, and which are copied with what they are bound to.

    @property
    def before(self) -> types.MethodType:
        """The hook before the denoiser's forward."""
        return types.MethodType(_eager("before"), self)

    @property
    def after(self) -> types.MethodType:
        """The hook after the denoiser's forward."""
        return types.MethodType(_eager("after"), self)

    @property
    def before_controlnet(self) -> types.MethodType:
        """The hook before the ControlNet's forward."""
        return types.MethodType(_eager("before_controlnet"), self)

    def _register(self, register: Any, hooks: Any, hook: Any) -> None:
        """Register a hook."""
        self._handles.append((register(hook, with_kwargs=True), hooks))

    def _is_innermost(self) -> bool:
        """Whether nobody but other pipelines' T-GATE reads the batch after us."""
        own = self._handles[0][0].id
        for number, hook in reversed(self._denoiser._forward_pre_hooks.items()):
            if number == own:
                return True
            if not isinstance(getattr(hook, "__self__", None), DenoiserHooks):
                return False
        return False

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward begins: tell the run, and halve the batch if it says so."""
        run = self._state.current()
        if run is None or run.waiting:
            if torch.is_grad_enabled():
                self._differentiated.check(latents_of({"sample": args[0]} if args else kwargs))
            return None
        if cannot_replay(self._denoiser):
            raise ValueError(
                "T-GATE: with gradients on, this version of diffusers computes checkpointed blocks again where T-GATE "
                "cannot reach them. Call disable_gradient_checkpointing() on the denoiser, or update diffusers."
            )
        seen = see(module, args, kwargs)
        self._differentiated.note(seen.sample)
        if self._layout.is_beside(seen.given):
            self._state.stand_aside()
            return None
        innermost = self._is_innermost()
        # For the hooks after this forward, and for the next one: some may have come since the last.
        self.stand_inside()
        may_halve = innermost or run.control.halved or self._layout.calls > 1
        run.before_forward(seen, self._kept_half(run), may_halve=may_halve, denoiser=module)
        if run.guided and run.will_halve:
            self._check_own(module, seen, self._layout.of_denoiser)
        if not run.halves_batch:
            run.control.see(rows_of([seen.given.get(name) for name in self._layout.residuals]))
            if run.control.halved:
                raise ValueError(
                    "T-GATE: the ControlNet ran on half of the batch, but the denoiser has to run on all of it, "
                    "because its latents have changed. Change their size before the gate, or call remove_tgate(pipe)."
                )
            return None
        return self._halved(run, seen.batch, args, kwargs, list(seen.given))

    def _halved(self, run: Any, batch: int, args: Any, kwargs: dict[str, Any], names: list[str]) -> Any:
        """The half of the arguments that stays. The user's hooks after the forward find the whole ones again."""
        layout = self._layout
        wanted: Names = layout.of_denoiser if run.control.halved else {**layout.of_denoiser, **layout.residuals}
        kept = self._kept_half(run)
        positional = dict(zip(names, args, strict=False))
        new_args = list(halve_named(positional, wanted, batch, kept).values())
        new_kwargs = halve_named(kwargs, wanted, batch, kept)
        run.whole = _Whole(batch // 2, kept, args, kwargs, new_args, new_kwargs)
        run.control.halved = False
        return new_args, new_kwargs

    def _check_own(self, module: torch.nn.Module, seen: Seen, names: Names) -> None:
        """Refuse arguments that diffusers does not know, if they may be a batch of which one half is to go."""
        if self._told:
            return
        for name, tensor in unknown_batches(module, seen, {**names, **self._layout.residuals}):
            raise ValueError(
                f"T-GATE: {type(module).__name__} has an argument {name!r} of its own, here of shape "
                f"{tuple(tensor.shape)} with a guided batch of {seen.batch}, where T-GATE has to know whether it is a "
                f"part of that batch, to leave one half of it out. Say that it is, apply_tgate(pipe, ..., "
                f"batch_arguments=({name!r},)), or that none is, batch_arguments=(), or call remove_tgate(pipe) to "
                "use this pipeline."
            )

    def _kept_half(self, run: Any) -> CFGHalf:
        """The half that stays, in the order of this pipeline's batch."""
        # Cross-attention that is computed anew on one half of the text belongs to that half.
        conditional = run.control.conditional_only or self._state.schedule.predicts or run.computes_cross
        kept = self._kept or ("conditional" if conditional else self._default)
        if run.batch.unconditional_first:
            return kept  # type: ignore[return-value]
        return "unconditional" if kept == "conditional" else "conditional"

    def _before_controlnet(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Halve the batch if the denoiser's will be, unless it is one half already."""
        run = self._state.current()
        if run is None or run.waiting:
            return None
        seen = see(module, args, kwargs)
        run.control.enter(seen.batch)
        if run.control.conditional_only or not run.halves_next(seen.shape):
            return None
        self._check_own(module, seen, self._layout.of_controlnet)
        run.control.halved = True
        self._stand_outside()
        kept = self._kept_half(run)
        names = list(seen.given)
        positional = dict(zip(names, args, strict=False))
        names_of_batch = self._layout.of_controlnet
        new_args = list(halve_named(positional, names_of_batch, seen.batch, kept).values())
        return new_args, halve_named(kwargs, names_of_batch, seen.batch, kept)

    def _after(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """A forward has ended: tell the run, and give the output of the half back as both halves."""
        run = self._state.current()
        if run is None:
            self._state.come_back()
        if run is None or run.waiting:
            return None
        whole, run.whole = run.whole, None
        difference = run.after_forward(output)
        if whole is None:
            return None
        if self._layout.entries:
            output = stacked(output)
        if rows_of(output) != whole.rows:
            raise ValueError(
                f"T-GATE: {type(module).__name__} gave {rows_of(output)} rows for half of the batch, where T-GATE "
                f"expects {whole.rows}: one of its arguments is of the whole batch and unknown to T-GATE. Call "
                "remove_tgate(pipe) to use this pipeline."
            )
        whole.give_back()
        doubled = double(output, whole.rows, difference, whole.kept, several=self._layout.several)
        return unstacked(doubled) if self._layout.entries else doubled


class _Whole:
    """The whole arguments of a forward that runs on half of them."""

    def __init__(
        self, rows: int, kept: CFGHalf, args: Any, kwargs: dict[str, Any], now_args: list[Any], now_kwargs: Any
    ) -> None:
        self.rows = rows
        self.kept = kept
        self._args, self._kwargs = args, kwargs
        self._now_args, self._now_kwargs = now_args, now_kwargs

    def give_back(self) -> None:
        """Put them back where the user's forward hooks look."""
        self._now_args[:] = self._args
        self._now_kwargs.update(self._kwargs)


@functools.cache
def _eager(method: str) -> Any:
    """A method that is not compiled with the denoiser."""
    # Here and not as a decorator, which would load the compiler with this package.
    function = torch.compiler.disable(getattr(DenoiserHooks, f"_{method}"))  # type: ignore[no-untyped-call]
    # Bound methods are pickled by this name.
    function.__name__ = method
    return function
