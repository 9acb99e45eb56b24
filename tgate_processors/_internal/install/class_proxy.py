"""The generated class of a gated pipeline: what others set on it, or delete, is set on the class that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# In the generated class of a pipeline with T-GATE: its class before, and the call of that one as nobody has wrapped it.
BASE = "_tgate_base"
_PLAIN = "_tgate_plain"


class ClassProxy(type):
    """
    A class that stands for another one.

    cache-dit wraps the call of a pipeline's class, by way of `type(pipe)`. What it sets there reaches the class before,
    so that it does not matter which of the two came first, or which of them goes first.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        # Our call in the place of the one before would be a loop: whoever gives it back has found it there.
        gated = name == "__call__" and value is vars(cls)[name]
        setattr(vars(cls)[BASE], name, vars(cls)[_PLAIN] if gated else value)

    def __delattr__(cls, name: str) -> None:
        delattr(vars(cls)[BASE], name)


def front(base: Any, body: dict[str, Any]) -> Any:
    """Make a class in front of another one, under the same name."""
    kind = type(ClassProxy.__name__, (ClassProxy,) if type(base) is type else (ClassProxy, type(base)), {})
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return kind(base.__name__, (base,), {**body, **names, BASE: base, _PLAIN: plain_call(base)})


def is_front(pipeline_class: type) -> bool:
    """Whether a class stands in front of another one, or somebody has put one on top of such a class."""
    return hasattr(pipeline_class, BASE)


def base_of(pipeline_class: type) -> Any:
    """The class that a class stands in front of; itself if it does not."""
    return vars(pipeline_class).get(BASE, pipeline_class)


def plain_call(base: Any) -> Callable[..., Any]:
    """The call of a pipeline's class, as it is without cache-dit."""
    call: Callable[..., Any] = getattr(base, "_original_call", base.__call__)
    return call


def call_now(base: Any, gated: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a pipeline's class, with whatever is wrapped around it now."""
    call: Callable[..., Any] = base.__call__
    return plain if call is gated else call


def give_back(pipeline_class: Any) -> Any:
    """The class before, in which a later removal of cache-dit finds its own call and not ours."""
    base = base_of(pipeline_class)
    if base is not pipeline_class and vars(base).get("_original_call") is vars(pipeline_class)["__call__"]:
        base._original_call = vars(pipeline_class)[_PLAIN]
    return base
