"""Copies and pickles of a denoiser, which are made without the hooks of T-GATE, and how hooks are taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The hooks that T-GATE puts in, and where torch notes which of them get keyword arguments.
_HOOKS = {
    "_forward_pre_hooks": "_forward_pre_hooks_with_kwargs",
    "_forward_hooks": "_forward_hooks_with_kwargs",
}
# Copies and pickles call this to get the state of an object.
_GETSTATE = "__getstate__"


def remove_hooks(module: torch.nn.Module, which: Callable[[Any], bool]) -> None:
    """Take hooks out of a module, and what torch notes about them."""
    for name, notes in _HOOKS.items():
        hooks = vars(module)[name]
        for number in [number for number, hook in list(hooks.items()) if which(hook)]:
            hooks.pop(number, None)
        for number in [number for number in list(vars(module)[notes]) if number not in hooks]:
            vars(module)[notes].pop(number, None)


def exclude_from_copies(module: torch.nn.Module, which: Callable[[Any], bool]) -> None:
    """Have copies of a module made without these hooks, which would have no effect and could not be removed."""

    def state() -> Any:
        module_class: Any = type(module)
        kept = dict(module_class.__getstate__(module))
        kept.pop(_GETSTATE, None)
        for name, notes in _HOOKS.items():
            gone = {number for number, hook in list(kept[name].items()) if which(hook)}
            for part in (name, notes):
                kept[part] = type(kept[part])((n, value) for n, value in list(kept[part].items()) if n not in gone)
        return kept

    vars(module).setdefault(_GETSTATE, state)


def include_in_copies(module: torch.nn.Module, which: Callable[[Any], bool]) -> None:
    """The inverse of `exclude_from_copies`, when none of these hooks is left."""
    if not any(which(hook) for name in _HOOKS for hook in list(vars(module)[name].values())):
        vars(module).pop(_GETSTATE, None)
