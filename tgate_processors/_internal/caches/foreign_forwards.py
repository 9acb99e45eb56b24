"""A `forward` that is not its class's own, or that keeps tensors of the batch: refused by name."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from ..plan.validation import is_choice, unlike
from .forward_origin import KNOWN_PACKAGES, foreign_of, foreign_of_class, module_of, owner_of, package_of

CustomForwards = Literal["gate"]

# Packages without a way back, by the name of what they do.
_PACKAGE_NAMES = {"para_attn": "ParaAttention"}
# Packages whose classes keep nothing of a batch, and what every module has.
_STATELESS_PACKAGES = KNOWN_PACKAGES | {"transformers"}
_MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))


class ForeignForwards:
    """
    The `forward` of each module of a pipeline's denoisers, checked for caches that T-GATE does not support.

    A cache cannot be told from a user's class before it runs, but a cache keeps a tensor of the batch.

    Args:
        denoisers (`Sequence` of `torch.nn.Module`): The denoisers, and what the pipeline calls before them.
        custom_forwards (`str`, *optional*): `"gate"` where the user says that none of them keeps anything.
    """

    def __init__(self, denoisers: Sequence[torch.nn.Module], custom_forwards: CustomForwards | None = None) -> None:
        self._denoisers = () if custom_forwards else tuple(denoisers)
        self._custom_modules: list[tuple[torch.nn.Module, torch.nn.Module]] = []
        self._known_tensors: set[int] = set()

    def check(self) -> None:
        """
        Refuse modules with another `forward` than their class was made with.

        Raises:
            ValueError: If there is one that is not known to keep nothing. The message names it and says what to do.
        """
        self._custom_modules = []
        classes: dict[type, bool] = {}
        for denoiser in self._denoisers:
            for module in denoiser.modules():
                foreign, kind = None, type(module)
                if kind not in classes:
                    classes[kind] = _package_of(kind) not in _STATELESS_PACKAGES
                    foreign = foreign_of_class(kind)
                if foreign is None and "forward" in vars(module):
                    foreign = foreign_of(module, denoiser)
                if foreign is not None:
                    raise ValueError(_foreign_forward_message(denoiser, module, foreign))
                if classes[kind]:
                    self._custom_modules.append((denoiser, module))

    def begin_loop(self) -> None:
        """A loop begins: check again, as the call itself may have changed a `forward`."""
        self.check()
        self._known_tensors = {id(tensor) for _, module in self._custom_modules for _, tensor in _held_tensors(module)}

    def after_forward(self, rows: int) -> None:
        """
        A forward of the whole batch has ended: refuse modules that keep a tensor of it.

        Args:
            rows (`int`): The samples of the batch.

        Raises:
            ValueError: If a class that is not diffusers' keeps a tensor of it.
        """
        for denoiser, module in self._custom_modules:
            for name, tensor in _held_tensors(module):
                if id(tensor) not in self._known_tensors and tensor.dim() > 2 and len(tensor) == rows:
                    raise ValueError(_cached_tensor_message(denoiser, module, name, tensor))


def validate_custom_forwards(custom_forwards: CustomForwards | None) -> CustomForwards | None:
    """Validate `custom_forwards`."""
    if not is_choice("custom_forwards", custom_forwards, "gate"):
        raise ValueError(unlike("custom_forwards", '"gate" or None', custom_forwards))
    return custom_forwards


def _package_of(kind: type) -> str:
    """The package that defines the `forward` of a class."""
    return owner_of(kind).__module__.split(".")[0]


def _held_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that the `forward` of a module can reach, and its names for them."""
    forward: Any = type(module).forward
    found = {**vars(type(module)), **vars(module)}
    while (code := getattr(forward, "__code__", None)) is not None:
        found.update(zip(code.co_freevars, map(_cell_contents, forward.__closure__ or ()), strict=True))
        found.update({name: forward.__globals__[name] for name in code.co_names if name in forward.__globals__})
        forward = getattr(forward, "__wrapped__", None)
    for name, value in found.items():
        if name not in _MODULE_ATTRIBUTES:
            yield from ((name, tensor) for tensor in _tensors_in(value))


def _cell_contents(cell: Any) -> Any:
    """The value in a cell of a closure, if there is one yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _tensors_in(value: Any, depth: int = 2) -> Iterator[torch.Tensor]:
    """The tensors in a value, in containers of it, and in plain objects."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, (type, types.ModuleType, types.FunctionType, torch.nn.Module)):
        inner = value.values() if isinstance(value, dict) else value
        if not isinstance(value, (dict, list, tuple)):
            inner = vars(value).values() if hasattr(value, "__dict__") else ()
        for each in list(inner):
            yield from _tensors_in(each, depth - 1)


def _name_of(denoiser: torch.nn.Module, module: torch.nn.Module) -> str:
    """What errors call a module."""
    name = next(name for name, each in denoiser.named_modules() if each is module)
    # `torch.compile(pipe.unet)` wraps the module.
    name = name.removeprefix("_orig_mod").removeprefix(".")
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _cached_tensor_message(denoiser: torch.nn.Module, module: torch.nn.Module, name: str, tensor: torch.Tensor) -> str:
    """The error for a module that keeps a tensor of the batch: what it keeps, and what to do."""
    home = owner_of(type(module)).__module__
    return (
        f"T-GATE found that the forward of {_name_of(denoiser, module)}, which is of {home}, "
        f"keeps a tensor of the whole batch, {name} of shape {tuple(tensor.shape)}, as a cache does, and T-GATE halves "
        "the batch and leaves calls out. Take it out; or, if that is not used again in the next call, say so, "
        'apply_tgate(pipe, ..., custom_forwards="gate"); or call remove_tgate(pipe).'
    )


def _foreign_forward_message(denoiser: torch.nn.Module, module: torch.nn.Module, foreign: Any) -> str:
    """The error for a `forward` that is not its class's own: where it comes from, and what to do."""
    code = getattr(foreign, "__code__", None)
    function = type(foreign).__name__ if code is None else code.co_qualname
    what, remedy = f"{function} of {module_of(foreign)}", "Take it out"
    if package_of(foreign) in _PACKAGE_NAMES:
        what, remedy = f"{_PACKAGE_NAMES[package_of(foreign)]} ({what})", "Load the pipeline anew without it"
    return (
        f"T-GATE found a forward that is not its class's own: that of {_name_of(denoiser, module)} is {what}. "
        "If it is a cache (TeaCache and others), it keeps tensors of the whole batch or counts its calls, and "
        f"T-GATE halves the batch and leaves calls out. {remedy}; or, if it keeps nothing from one call to the next, "
        'say so, apply_tgate(pipe, ..., custom_forwards="gate"); or call remove_tgate(pipe).'
    )
