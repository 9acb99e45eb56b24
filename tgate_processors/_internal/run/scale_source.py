"""Where a loop of diffusers reads its guidance scale: found in its bytecode, as no pipeline reports it."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from typing import Any


def uses_given_scale(pipeline_class: Any) -> bool:
    """Whether a loop of diffusers guides with the scale in its arguments, and not with that of the pipeline."""
    # Inside our own call, and those of others.
    calls = [inspect.unwrap(vars(base)["__call__"]) for base in pipeline_class.__mro__ if "__call__" in vars(base)]
    codes = [call.__code__ for call in calls if call.__globals__["__name__"].split(".")[0] == "diffusers"]
    return bool(codes) and _ends_with_variable(codes[0])


@functools.cache
def _ends_with_variable(code: types.CodeType) -> bool:
    """Whether the last that reads `guidance_scale`, which is the arithmetic of guidance, reads a variable."""
    kinds = [
        step.opname
        for step in dis.get_instructions(code)
        # Two variables may be loaded at once.
        if step.opname.startswith("LOAD_") and "guidance_scale" in (step.argval, *_several(step.argval))
    ]
    return bool(kinds) and not kinds[-1].startswith("LOAD_ATTR")


def _several(names: Any) -> tuple[Any, ...]:
    """The names in an instruction with more than one operand."""
    return names if isinstance(names, tuple) else ()
