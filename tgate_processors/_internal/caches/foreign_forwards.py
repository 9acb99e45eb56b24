"""A `forward` that is not its class's own, or that keeps tensors of the batch: refused by name."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from ..plan.validation import is_choice, shown

CustomForwards = Literal["gate"]

# Packages whose wrappers keep nothing of a batch, or are judged elsewhere (DeepCache, cache-dit, hook registries).
_KNOWN = {"accelerate", "bitsandbytes", "cache_dit", "contextlib", "DeepCache", "diffusers", "nvtx", "peft"}
_KNOWN |= {"torch", "torchao"}
# Code that torch.fx has generated is of no module, but of a file of this name.
_GENERATED = "<eval_with_key>"
# Where wrappers put what they stand in front of, besides `__wrapped__`: accelerate, cache-dit and HyperTile.
_ASIDE = ("_old_forward", "_original_forward")
# Packages without a way back, by the name of what they do.
_NAMED = {"para_attn": "ParaAttention"}
# Packages whose classes keep nothing of a batch, and what every module has.
_PLAIN = _KNOWN | {"transformers"}
_OF_TORCH = frozenset(vars(torch.nn.Module()))


class ForeignForwards:
    """
    What the modules of a pipeline's denoisers do when they are called.

    Nobody can tell a cache from a class of the user's before it runs, but a cache keeps a tensor of the batch.

    Args:
        denoisers (`Sequence` of `torch.nn.Module`): The denoisers, and what the pipeline calls before them.
        custom (`str`, *optional*): `"gate"` where the user says that none of them keeps anything.
    """

    def __init__(self, denoisers: Sequence[torch.nn.Module], custom: CustomForwards | None = None) -> None:
        self._denoisers = () if custom else tuple(denoisers)
        self._custom: list[tuple[torch.nn.Module, torch.nn.Module]] = []
        self._before: set[int] = set()

    def check(self) -> None:
        """
        Refuse modules with another `forward` than their class was made with.

        Raises:
            ValueError: If there is one that is not known to keep nothing. The message names it and says what to do.
        """
        self._custom = []
        classes: dict[type, bool] = {}
        for denoiser in self._denoisers:
            for module in denoiser.modules():
                foreign, kind = None, type(module)
                if kind not in classes:
                    classes[kind] = _package_of(kind) not in _PLAIN
                    foreign = _foreign_of_class(kind)
                if foreign is None and "forward" in vars(module):
                    foreign = _foreign_of(module, denoiser)
                if foreign is not None:
                    raise ValueError(_message(denoiser, module, foreign))
                if classes[kind]:
                    self._custom.append((denoiser, module))

    def begin(self) -> None:
        """A loop begins, and the call itself may have put something in."""
        self.check()
        self._before = {id(tensor) for _, module in self._custom for _, tensor in _held(module)}

    def after(self, rows: int) -> None:
        """
        A forward of the whole batch has ended.

        Args:
            rows (`int`): The batch.

        Raises:
            ValueError: If a class that is not diffusers' keeps a tensor of it.
        """
        for denoiser, module in self._custom:
            for name, tensor in _held(module):
                if id(tensor) not in self._before and tensor.dim() > 2 and len(tensor) == rows:
                    raise ValueError(_message_of_kept(denoiser, module, name, tensor))


def checked_forwards(custom: CustomForwards | None) -> CustomForwards | None:
    """Validate `custom_forwards`."""
    if not is_choice("custom_forwards", custom, "gate"):
        raise ValueError(f'custom_forwards must be "gate" or None, not {shown(custom)}.')
    return custom


def comes_from(module: torch.nn.Module, package: str) -> bool:
    """Whether the `forward` of a module is of this package."""
    forward = vars(module).get("forward")
    return forward is not None and package in {_package(each) for each in (forward, *_behind(forward))}


def _owner(kind: type) -> type:
    """The class that a class has its `forward` of."""
    return next(each for each in kind.__mro__ if "forward" in vars(each))


def _package_of(kind: type) -> str:
    """The package that a class has its `forward` of."""
    return _owner(kind).__module__.split(".")[0]


def _held(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that the `forward` of a module can find again, by the name that it has for them."""
    forward: Any = type(module).forward
    found = {**vars(type(module)), **vars(module)}
    while (code := getattr(forward, "__code__", None)) is not None:
        found.update(zip(code.co_freevars, map(_content, forward.__closure__ or ()), strict=True))
        found.update({name: forward.__globals__[name] for name in code.co_names if name in forward.__globals__})
        forward = getattr(forward, "__wrapped__", None)
    for name, value in found.items():
        if name not in _OF_TORCH:
            yield from ((name, tensor) for tensor in _tensors(value))


def _content(cell: Any) -> Any:
    """What a closure holds, if it does by now."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _tensors(value: Any, depth: int = 2) -> Iterator[torch.Tensor]:
    """The tensors in a value, in containers of it, and in plain objects."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, (type, types.ModuleType, types.FunctionType, torch.nn.Module)):
        inner = value.values() if isinstance(value, dict) else value
        if not isinstance(value, (dict, list, tuple)):
            inner = vars(value).values() if hasattr(value, "__dict__") else ()
        for each in list(inner):
            yield from _tensors(each, depth - 1)


def _foreign_of_class(kind: type) -> Any:
    """What is in the place of the `forward` that a class was made with, if anything is."""
    owner = _owner(kind)
    home = owner.__module__.split(".")[0]

    def is_own(forward: Any) -> bool:
        code = getattr(forward, "__code__", None)
        if code is None or _module(forward) != owner.__module__:
            return False
        names = code.co_qualname.split(".")
        return names[-1] == "forward" and names[-2:-1] not in ([], ["<locals>"])

    def is_known(forward: Any) -> bool:
        # Decorators of its own.
        return _package(forward) in (*_KNOWN, _GENERATED) or (
            _package(forward) == home and hasattr(forward, "__wrapped__")
        )

    return _first_foreign([vars(owner)["forward"]], is_own, is_known, _behind)


def _foreign_of(module: torch.nn.Module, denoiser: torch.nn.Module) -> Any:
    """What the `forward` of a module ends in, or passes through, if it is not its class's own."""
    own = [vars(each)["forward"] for each in type(module).__mro__ if "forward" in vars(each)]
    aside = vars(module)

    def is_own(forward: Any) -> bool:
        return any(forward is each for each in own) or _is_adapter(forward, module, denoiser)

    def is_known(forward: Any) -> bool:
        return _package(forward) in _KNOWN or _is_hypertile(forward, module)

    def behind(forward: Any) -> Iterator[Any]:
        yield from _behind(forward)
        if not isinstance(forward, types.MethodType):
            yield from (aside[name] for name in _ASIDE if name in aside)
        for reference in getattr(aside.get("_diffusers_hook"), "_fn_refs", ()):
            yield reference.original_forward or reference.forward

    return _first_foreign([aside["forward"]], is_own, is_known, behind)


def _first_foreign(
    forwards: list[Any],
    is_own: Callable[[Any], bool],
    is_known: Callable[[Any], bool],
    behind: Callable[[Any], Iterator[Any]],
) -> Any:
    """The first callable that is neither the class's own nor a known one, which leads to what is behind it."""
    seen: list[Any] = []
    while forwards:
        each = forwards.pop()
        if any(each is other for other in seen) or is_own(each):
            continue
        seen.append(each)
        # A bound method or a partial is as good as its function.
        if not isinstance(each, (types.MethodType, functools.partial)) and not is_known(each):
            return each
        forwards.extend(behind(each))
    return None


def _behind(forward: Any) -> Iterator[Any]:
    """What a callable says that it calls."""
    if isinstance(forward, types.MethodType):
        yield forward.__func__
        return
    if isinstance(forward, functools.partial):
        given = (forward.func, *forward.args, *forward.keywords.values())
        yield from (each for each in given if callable(each) and not isinstance(each, torch.nn.Module))
    if hasattr(forward, "__wrapped__"):
        yield forward.__wrapped__


def _module(forward: Any) -> str:
    """The module of Python that a function's code is of, whatever `functools.wraps` has made it say of itself."""
    # What is called and no function is known by its class.
    given = getattr(forward, "__globals__", None)
    if given is None:
        return str(type(forward).__module__)
    return str(given.get("__name__") or forward.__code__.co_filename)


def _package(forward: Any) -> str:
    """The package that a function's code is of."""
    return _module(forward).split(".")[0]


def _is_adapter(forward: Any, module: torch.nn.Module, denoiser: torch.nn.Module) -> bool:
    """Whether it is that of a LoRA which stands in for a layer: a module with weights, none of them the denoiser's."""
    adapter = getattr(forward, "__self__", None)
    if not isinstance(adapter, torch.nn.Module) or adapter is module or next(module.children(), None) is not None:
        return False
    theirs = {id(weight) for weight in denoiser.parameters()}
    weights = [id(weight) for weight in adapter.parameters()]
    return bool(weights) and theirs.isdisjoint(weights)


def _is_hypertile(forward: Any, module: torch.nn.Module) -> bool:
    """Whether it is what the package HyperTile has put in front of the `forward` that it laid aside."""
    aside, behind = vars(module), getattr(forward, "__wrapped__", None)
    return "_split_sizes" in aside and behind is not None and behind == aside.get("_original_forward")


def _named(denoiser: torch.nn.Module, module: torch.nn.Module) -> str:
    """What errors call a module."""
    name = next(name for name, each in denoiser.named_modules() if each is module)
    # `torch.compile(pipe.unet)` wraps the module.
    name = name.removeprefix("_orig_mod").removeprefix(".")
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _message_of_kept(denoiser: torch.nn.Module, module: torch.nn.Module, name: str, tensor: torch.Tensor) -> str:
    """What was found to be kept, and what to do."""
    return (
        f"T-GATE found that the forward of {_named(denoiser, module)}, which is of {_owner(type(module)).__module__}, "
        f"keeps a tensor of the whole batch, {name} of shape {tuple(tensor.shape)}, as a cache does, and T-GATE halves "
        "the batch and leaves calls out. Take it out; or, if that is not used again in the next call, say so, "
        'apply_tgate(pipe, ..., custom_forwards="gate"); or call remove_tgate(pipe).'
    )


def _message(denoiser: torch.nn.Module, module: torch.nn.Module, foreign: Any) -> str:
    """What was found, and what to do."""
    code = getattr(foreign, "__code__", None)
    function = type(foreign).__name__ if code is None else code.co_qualname
    what, remedy = f"{function} of {_module(foreign)}", "Take it out"
    if _package(foreign) in _NAMED:
        what, remedy = f"{_NAMED[_package(foreign)]} ({what})", "Load the pipeline anew without it"
    return (
        f"T-GATE found a forward that is not its class's own: that of {_named(denoiser, module)} is {what}. "
        "If it is a cache (TeaCache and others), it keeps tensors of the whole batch or counts its calls, and "
        f"T-GATE halves the batch and leaves calls out. {remedy}; or, if it keeps nothing from one call to the next, "
        'say so, apply_tgate(pipe, ..., custom_forwards="gate"); or call remove_tgate(pipe).'
    )
