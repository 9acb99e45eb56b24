"""The generated class of a gated pipeline: what others set on it, or delete, is set on the class that it wraps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Attributes of the generated class: the class that it wraps, and the call of that one without wrappers.
WRAPPED_CLASS = "_tgate_base"
_ORIGINAL_CALL = "_tgate_plain"


class ClassProxy(type):
    """
    The metaclass of a class that wraps another one.

    cache-dit wraps the call of a pipeline's class, by way of `type(pipe)`. What it sets there is set on the wrapped
    class, so it does not matter which of the two is installed, or removed, first.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        # Others may restore our call, which they have found there. Set on the wrapped class, it would call itself.
        gated = name == "__call__" and value is vars(cls)[name]
        setattr(vars(cls)[WRAPPED_CLASS], name, vars(cls)[_ORIGINAL_CALL] if gated else value)

    def __delattr__(cls, name: str) -> None:
        delattr(vars(cls)[WRAPPED_CLASS], name)


def make_proxy_class(base: Any, body: dict[str, Any]) -> Any:
    """Make a class that wraps another one, under the same name."""
    kind = type(ClassProxy.__name__, (ClassProxy,) if type(base) is type else (ClassProxy, type(base)), {})
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return kind(base.__name__, (base,), {**body, **names, WRAPPED_CLASS: base, _ORIGINAL_CALL: unwrapped_call(base)})


def is_proxy_class(pipeline_class: type) -> bool:
    """Whether a class wraps another one by way of `make_proxy_class`, or derives from such a class."""
    return hasattr(pipeline_class, WRAPPED_CLASS)


def wrapped_class_of(pipeline_class: type) -> Any:
    """The class that a class wraps; the class itself if it wraps none."""
    return vars(pipeline_class).get(WRAPPED_CLASS, pipeline_class)


def unwrapped_call(base: Any) -> Callable[..., Any]:
    """The call of a pipeline's class without cache-dit's wrapper."""
    call: Callable[..., Any] = getattr(base, "_original_call", base.__call__)
    return call


def current_call(base: Any, gated: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a pipeline's class with its present wrappers."""
    call: Callable[..., Any] = base.__call__
    return plain if call is gated else call


def restore_class(pipeline_class: Any) -> Any:
    """The wrapped class, prepared so that a later removal of cache-dit restores its call and not ours."""
    base = wrapped_class_of(pipeline_class)
    if base is not pipeline_class and vars(base).get("_original_call") is vars(pipeline_class)["__call__"]:
        base._original_call = vars(pipeline_class)[_ORIGINAL_CALL]
    return base
