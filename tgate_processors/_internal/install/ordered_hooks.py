"""The order of a denoiser's hooks: ours are next to the forward, those of its users outside of them."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from .copies import exclude_from_copies, include_in_copies, remove_hooks


class OrderedHooks:
    """
    The forward hooks of a denoiser, and of what the pipeline calls before it: how they are installed and uninstalled.

    Args:
        denoiser (`torch.nn.Module`): The module that the pipeline calls in every step.
        controlnet (`torch.nn.Module`, *optional*): What it calls before the denoiser in every step.
    """

    def __init__(self, denoiser: torch.nn.Module, controlnet: torch.nn.Module | None = None) -> None:
        self._denoiser = denoiser
        self._controlnet = controlnet

    @property
    def _modules(self) -> list[torch.nn.Module]:
        """What has hooks."""
        return [module for module in (self._denoiser, self._controlnet) if module is not None]

    def install(self) -> None:
        """Register the hooks that are not there, and stand next to the forward."""
        for module in self._modules:
            exclude_from_copies(module, _is_ours)
        register = self._denoiser.register_forward_pre_hook, self._denoiser.register_forward_hook
        self._register(self._denoiser._forward_pre_hooks, register[0], "before")
        self._register(self._denoiser._forward_hooks, register[1], "after")
        if self._controlnet is not None:
            self._register(self._denoiser._forward_pre_hooks, register[0], "before_all")
            register_controlnet = self._controlnet.register_forward_pre_hook
            self._register(self._controlnet._forward_pre_hooks, register_controlnet, "before_controlnet")
        self._move_innermost()

    def uninstall(self) -> None:
        """Take the hooks out again."""
        for module in self._modules:
            # By looking, as an interrupt may have come between a hook and its handle.
            remove_hooks(module, lambda hook: getattr(hook, "__self__", None) is self)
            include_in_copies(module, _is_ours)

    def _register(self, hooks: Any, register: Any, method: str) -> None:
        """Register a hook if it is not registered yet."""
        if self._number(hooks, method) is None:
            register(self._hook(method), with_kwargs=True)

    def _move_innermost(self) -> None:
        """
        Move our hooks next to the forward: last of those before it, first of those after it.

        Other threads may be calling the denoiser, so a hook that is in its place is not moved.
        """
        before: Any = self._denoiser._forward_pre_hooks
        after: Any = self._denoiser._forward_hooks
        for hooks, name, last in ((before, "before", True), (before, "before_all", False), (after, "after", False)):
            number = self._number(hooks, name)
            if number is not None and not _is_at_end(hooks, number, last=last):
                hooks.move_to_end(number, last=last)

    def _hook(self, method: str) -> types.MethodType:
        """A hook: a bound method, which torch's compiler knows for such hooks."""
        hooks_class: Any = type(self)
        return types.MethodType(_uncompiled(hooks_class, method), self)

    def _number(self, hooks: Any, method: str) -> int | None:
        """The number of one of our hooks, if it is registered."""
        wanted = self._hook(method)
        return next((number for number, hook in list(hooks.items()) if hook == wanted), None)

    def _is_innermost(self) -> bool:
        """Whether only hooks of T-GATE, of this or other pipelines, read the batch after ours."""
        number = self._number(self._denoiser._forward_pre_hooks, "before")
        return number is not None and _is_at_end(self._denoiser._forward_pre_hooks, number, last=True)


@functools.cache
def _uncompiled(hooks_class: Any, method: str) -> Any:
    """A method that is not compiled with the denoiser."""
    # Here and not as a decorator, which would load the compiler with this package.
    return torch.compiler.disable(getattr(hooks_class, f"_{method}"))  # type: ignore[no-untyped-call]


def _is_ours(hook: Any) -> bool:
    """Whether a hook is one of T-GATE's, of any pipeline."""
    return isinstance(getattr(hook, "__self__", None), OrderedHooks)


def _is_at_end(hooks: Any, number: int, *, last: bool) -> bool:
    """Whether a hook is the last one, or the first one, but for those of other pipelines with T-GATE."""
    # A copy made at once: other threads may add and remove hooks meanwhile.
    there = list(hooks.items())
    for other, hook in reversed(there) if last else there:
        if other == number:
            return True
        if not _is_ours(hook):
            return False
    return False
