"""Where a `forward` comes from, and whether it is its class's own."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Packages whose wrappers keep nothing of a batch, or are judged elsewhere (DeepCache, cache-dit, hook registries).
KNOWN_PACKAGES = {"accelerate", "bitsandbytes", "cache_dit", "contextlib", "DeepCache", "diffusers", "nvtx", "peft"}
KNOWN_PACKAGES |= {"torch", "torchao"}
# Code that torch.fx has generated is of no module, but of a file of this name.
_GENERATED = "<eval_with_key>"
# Where wrappers save what they wrap, other than in `__wrapped__`: accelerate, cache-dit and HyperTile.
_SAVED_FORWARDS = ("_old_forward", "_original_forward")


def comes_from(module: torch.nn.Module, package: str) -> bool:
    """Whether the `forward` of a module comes from this package."""
    forward = vars(module).get("forward")
    return forward is not None and package in {package_of(each) for each in (forward, *_wrapped_by(forward))}


def owner_of(kind: type) -> type:
    """The class in whose body the `forward` of a class is defined."""
    return next(each for each in kind.__mro__ if "forward" in vars(each))


def foreign_of_class(kind: type) -> Any:
    """What has replaced the `forward` that a class was made with, if anything has."""
    owner = owner_of(kind)
    home = owner.__module__.split(".")[0]

    def is_own(forward: Any) -> bool:
        code = getattr(forward, "__code__", None)
        if code is None or module_of(forward) != owner.__module__:
            return False
        names = code.co_qualname.split(".")
        return names[-1] == "forward" and names[-2:-1] not in ([], ["<locals>"])

    def is_known(forward: Any) -> bool:
        # Decorators of its own.
        return package_of(forward) in (*KNOWN_PACKAGES, _GENERATED) or (
            package_of(forward) == home and hasattr(forward, "__wrapped__")
        )

    return _first_foreign([vars(owner)["forward"]], is_own, is_known, _wrapped_by)


def foreign_of(module: torch.nn.Module, denoiser: torch.nn.Module) -> Any:
    """A callable that the `forward` of a module calls and that is neither its class's own nor a known one, if any."""
    own = [vars(each)["forward"] for each in type(module).__mro__ if "forward" in vars(each)]
    aside = vars(module)

    def is_own(forward: Any) -> bool:
        return any(forward is each for each in own) or _is_lora_forward(forward, module, denoiser)

    def is_known(forward: Any) -> bool:
        return package_of(forward) in KNOWN_PACKAGES or _is_hypertile(forward, module)

    def wrapped_by(forward: Any) -> Iterator[Any]:
        yield from _wrapped_by(forward)
        if not isinstance(forward, types.MethodType):
            yield from (aside[name] for name in _SAVED_FORWARDS if name in aside)
        for reference in getattr(aside.get("_diffusers_hook"), "_fn_refs", ()):
            yield reference.original_forward or reference.forward

    return _first_foreign([aside["forward"]], is_own, is_known, wrapped_by)


def _first_foreign(
    forwards: list[Any],
    is_own: Callable[[Any], bool],
    is_known: Callable[[Any], bool],
    wrapped_by: Callable[[Any], Iterator[Any]],
) -> Any:
    """The first callable that is neither the class's own nor a known one; known ones lead to what they wrap."""
    visited: list[Any] = []
    while forwards:
        each = forwards.pop()
        if any(each is other for other in visited) or is_own(each):
            continue
        visited.append(each)
        # A bound method or a partial is as good as its function.
        if not isinstance(each, (types.MethodType, functools.partial)) and not is_known(each):
            return each
        forwards.extend(wrapped_by(each))
    return None


def _wrapped_by(forward: Any) -> Iterator[Any]:
    """What a callable is known to call."""
    if isinstance(forward, types.MethodType):
        yield forward.__func__
        return
    if isinstance(forward, functools.partial):
        given = (forward.func, *forward.args, *forward.keywords.values())
        yield from (each for each in given if callable(each) and not isinstance(each, torch.nn.Module))
    if hasattr(forward, "__wrapped__"):
        yield forward.__wrapped__


def module_of(forward: Any) -> str:
    """The Python module of a function's code, whatever name `functools.wraps` has given it."""
    # What is called and no function is known by its class.
    given = getattr(forward, "__globals__", None)
    if given is None:
        return str(type(forward).__module__)
    return str(given.get("__name__") or forward.__code__.co_filename)


def package_of(forward: Any) -> str:
    """The package of a function's code."""
    return module_of(forward).split(".")[0]


def _is_lora_forward(forward: Any, module: torch.nn.Module, denoiser: torch.nn.Module) -> bool:
    """Whether a `forward` is that of a LoRA in place of a layer: a module with weights, none of them the denoiser's."""
    adapter = getattr(forward, "__self__", None)
    if not isinstance(adapter, torch.nn.Module) or adapter is module or next(module.children(), None) is not None:
        return False
    theirs = {id(weight) for weight in denoiser.parameters()}
    weights = [id(weight) for weight in adapter.parameters()]
    return bool(weights) and theirs.isdisjoint(weights)


def _is_hypertile(forward: Any, module: torch.nn.Module) -> bool:
    """Whether a `forward` is the wrapper of the package HyperTile, which has saved the original one."""
    own, wrapped = vars(module), getattr(forward, "__wrapped__", None)
    return "_split_sizes" in own and wrapped is not None and wrapped == own.get("_original_forward")
