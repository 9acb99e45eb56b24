"""Validation of settings: of the right type and in range, or an error that names them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal

Auto = Literal["auto"]

# What numpy's types stand for: complex numbers, times, texts and objects are not numbers of steps.
_NON_NUMERIC_KINDS = "cmMSUO"
_MAX_SHOWN_LENGTH = 200
# Beyond what anyone means, and within what torch counts with.
_MAX_INT = 2**31 - 1


def validate_gate_step(value: object, name: str = "gate_step") -> int | float | Auto:
    """Validate `gate_step`, or what stands for a schedule under another name."""
    hint = (
        "give a number of steps (an int of at least 1), a share of the steps (a float between 0 and 1), "
        '"auto" to have the run decide, or a letter for each step such as "FFFF-F--FH"'
    )
    if isinstance(value, str):
        if value == "auto":
            return "auto"
        raise ValueError(f"{name}={shown(value)} is unknown: {hint}.")
    share = _as_float(value) if as_int(value) is None else None
    if share is None:
        return validate_int(name, value, 1, hint)
    if not 0.0 < share < 1.0:
        raise ValueError(f"{name}={shown(value)} is not a share of the steps: {hint}.")
    return share


def validate_tolerance(value: object, name: str = "tolerance", *, default: float = 0.2) -> float:
    """Validate `tolerance`."""
    if value is None:
        return default
    hint = f"give the relative error to accept, a number of at least 0 such as {default}"
    tolerance = _as_float(value)
    if tolerance is None:
        raise TypeError(f"{name}={shown(value)} is of type {type(value).__name__}: {hint}.")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"{name}={shown(value)} is out of range: {hint}.")
    return tolerance


def is_plan(value: object) -> bool:
    """Whether something is a plan of levels: a text of their letters alone."""
    return isinstance(value, str) and bool(value) and set(value) <= set("FH-")


def validate_guidance_scale(value: object) -> float | None:
    """Validate `guidance_scale`, where it is not a tensor."""
    if value is None:
        return None
    hint = "give a number, a tensor, or None for no guidance"
    scale = _as_float(value)
    if scale is None:
        raise TypeError(f"guidance_scale={shown(value)} is of type {type(value).__name__}: {hint}.")
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale={shown(value)} is out of range: {hint}.")
    return scale


def validate_levels(value: object) -> None:
    """Validate `levels`."""
    hint = 'give a letter for each step, "F" for full, "H" for half and "-" for forecast, such as "FFFF-F--FH"'
    if not isinstance(value, str):
        raise TypeError(f"levels={shown(value)} is of type {type(value).__name__}: {hint}.")
    unknown = next((letter for letter in value if letter not in "FH-"), None)
    if unknown is not None or not value:
        raise ValueError(f"levels={shown(value)} has {f'the letter {unknown!r}' if unknown else 'no steps'}: {hint}.")
    if value[0] != "F":
        raise ValueError(f'levels={shown(value)} has to begin with a full step, "F": nothing is known before it.')


def _as_float(value: object) -> float | None:
    """A number as a float: infinite if it is too large for one, `None` if it is not a number."""
    if _is_bool_or_array(value) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return math.nan
    except Exception:
        # Other libraries raise what they like, for a tensor without a value say.
        return None


def as_int(value: object) -> int | None:
    """A number of an integer type, numpy's and torch's too."""
    if _is_bool_or_array(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:
        return None


def _is_bool_or_array(value: object) -> bool:
    """Whether a value is a bool, a text, a type or an array, which Python may accept as a number."""
    dtype = getattr(value, "dtype", "")
    other = getattr(dtype, "kind", " ") in _NON_NUMERIC_KINDS or any(word in str(dtype) for word in ("bool", "complex"))
    return isinstance(value, (bool, str, bytes, type)) or bool(getattr(value, "ndim", 0)) or other


def validate_int(name: str, value: object, minimum: int, hint: str | None = None, maximum: int = _MAX_INT) -> int:
    """Validate an integer setting."""
    hint = hint or f"give an int of at least {minimum}"
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name}={shown(value)} is of type {type(value).__name__}: {hint}.")
    if number < minimum:
        raise ValueError(f"{name}={shown(value)} is too small: {hint}.")
    if number > maximum:
        raise ValueError(f"{name}={shown(value)} is too large: {hint}, and of at most {maximum}.")
    return number


def is_choice(name: str, value: object, *choices: str) -> bool:
    """Whether a setting is one of these choices or left out; raises `TypeError` where it is not a string."""
    if value is None:
        return True
    if not isinstance(value, str):
        hint = " or ".join(f'"{choice}"' for choice in choices)
        raise TypeError(f"{name}={shown(value)} is of type {type(value).__name__}: give {hint}.")
    return value in choices


def validate_switch(name: str, value: object) -> None:
    """Refuse anything but `True`, `False` and `None`."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(
            f"{name}={shown(value)} is of type {type(value).__name__}: give True or False, or leave it out."
        )


def shown(value: object) -> str:
    """A value as it is written in a message, of any size."""
    try:
        text = repr(value)
    except Exception:
        # An int of more digits than Python writes out.
        return "..."
    return text if len(text) <= _MAX_SHOWN_LENGTH else f"{text[:_MAX_SHOWN_LENGTH]}..."


def validate_names(name: str, value: object) -> tuple[str, ...] | None:
    """Validate a setting that is a sequence of names."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise TypeError(
            f"{name}={shown(value)} is of type {type(value).__name__}: give a tuple of names, or leave it out."
        )
    return tuple(value)
