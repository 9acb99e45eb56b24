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
# An error of 1 is as large as the output itself. A tolerance above 2 is nearly always meant in per cent.
MAX_TOLERANCE = 2.0
_LETTERS = "The letters are F (full), H (half) and - (forecast)"


def validate_gate_step(value: object, name: str = "gate_step", *also: str) -> int | float | Auto:
    """Validate `gate_step`, or what stands for a schedule under another name."""
    if isinstance(value, str) and value == "auto":
        return "auto"
    kinds = ['"auto"', "a number of steps", "a share of them between 0 and 1", 'a plan such as "FFFF-F--FH"', *also]
    wanted = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    if isinstance(value, str):
        raise ValueError(f"{unlike(name, wanted, value)} {_remedy_for_text(value)}")
    share = _as_float(value) if as_int(value) is None else None
    if share is None:
        return validate_int(name, value, 1, wanted)
    if not 0.0 < share < 1.0:
        steps = f" For a number of steps, write {int(share)}." if 1 <= share <= _MAX_INT and share % 1 == 0 else ""
        raise ValueError(f"{unlike(name, wanted, value)}{steps}")
    return share


def _remedy_for_text(value: str) -> str:
    """What to write in place of a text that is no `gate_step`."""
    meant = next((text for text in (value.lower(), value.upper()) if text == "auto" or is_plan(text)), None)
    if meant is not None:
        return f'Write "{meant}".'
    return f"Write {value} without quotes." if value.isdecimal() else f"{_LETTERS}."


def validate_tolerance(value: object, name: str = "tolerance", *, default: float = 0.2) -> float:
    """Validate `tolerance`."""
    if value is None:
        return default
    wanted = f"a relative error between 0 and {MAX_TOLERANCE:g} such as {default}, or math.inf to accept any"
    tolerance = _as_float(value)
    if tolerance is None:
        raise TypeError(unlike(name, wanted, value, of_type=True))
    if not 0 <= tolerance <= MAX_TOLERANCE and not (tolerance == math.inf and value == math.inf):
        percent = f" For {tolerance:g} %, write {tolerance / 100:g}." if MAX_TOLERANCE < tolerance <= 100 else ""
        raise ValueError(f"{unlike(name, wanted, value)}{percent}")
    return tolerance


def is_plan(value: object) -> bool:
    """Whether something is a plan of levels: a text of their letters alone."""
    return isinstance(value, str) and bool(value) and set(value) <= set("FH-")


def validate_guidance_scale(value: object) -> float | None:
    """Validate `guidance_scale`, where it is not a tensor."""
    if value is None:
        return None
    return validate_float("guidance_scale", value, "a number, a tensor or None for no guidance")


def validate_float(name: str, value: object, wanted: str, minimum: float = -math.inf) -> float:
    """Validate a finite number."""
    number = _as_float(value)
    if number is None:
        raise TypeError(unlike(name, wanted, value, of_type=True))
    if not (math.isfinite(number) and number >= minimum):
        raise ValueError(unlike(name, wanted, value))
    return number


def validate_levels(value: object) -> None:
    """Validate `levels`."""
    wanted = 'a letter for each step such as "FFFF-F--FH"'
    if not isinstance(value, str):
        raise TypeError(unlike("levels", wanted, value, of_type=True))
    if not is_plan(value):
        raise ValueError(f"{unlike('levels', wanted, value)} {_LETTERS}.")
    if value[0] != "F":
        raise ValueError(
            f"{unlike('levels', 'a plan that begins with a full step, F', value)} Nothing is known before it to "
            "predict from."
        )


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
    except MemoryError:
        raise
    except Exception:
        # Other libraries raise what they like, for a tensor without a value say.
        return None


def as_int(value: object) -> int | None:
    """A number of an integer type, numpy's and torch's too."""
    if _is_bool_or_array(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except MemoryError:
        raise
    except Exception:
        return None


def _is_bool_or_array(value: object) -> bool:
    """Whether a value is a bool, a text, a type or an array, which Python may accept as a number."""
    dtype = getattr(value, "dtype", "")
    other = getattr(dtype, "kind", " ") in _NON_NUMERIC_KINDS or any(word in str(dtype) for word in ("bool", "complex"))
    return isinstance(value, (bool, str, bytes, type)) or bool(getattr(value, "ndim", 0)) or other


def validate_int(name: str, value: object, minimum: int, wanted: str | None = None, maximum: int = _MAX_INT) -> int:
    """Validate an integer setting."""
    wanted = wanted or f"an int of at least {minimum}"
    number = as_int(value)
    if number is None:
        raise TypeError(unlike(name, wanted, value, of_type=True))
    if number < minimum:
        raise ValueError(unlike(name, wanted, value))
    if number > maximum:
        raise ValueError(unlike(name, f"{wanted} and at most {maximum}", value))
    return number


def is_choice(name: str, value: object, *choices: str) -> bool:
    """Whether a setting is one of these choices or left out; raises `TypeError` where it is not a string."""
    if value is None:
        return True
    if not isinstance(value, str):
        raise TypeError(unlike(name, " or ".join(f'"{choice}"' for choice in choices), value, of_type=True))
    return value in choices


def validate_switch(name: str, value: object) -> None:
    """Refuse anything but `True`, `False` and `None`."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(unlike(name, "True or False", value, of_type=True))


def unlike(name: str, wanted: str, value: object, *, of_type: bool = False) -> str:
    """The message for a setting that is not what it must be."""
    kind = f" of type {type(value).__name__}" if of_type else ""
    return f"`{name}` must be {wanted}, got {shown(value)}{kind}."


def shown(value: object) -> str:
    """A value as it is written in a message, of any size."""
    try:
        text = repr(value)
    except MemoryError:
        raise
    except Exception:
        # An int of more digits than Python writes out.
        return "..."
    return text if len(text) <= _MAX_SHOWN_LENGTH else f"{text[:_MAX_SHOWN_LENGTH]}..."


def validate_names(name: str, value: object) -> tuple[str, ...] | None:
    """Validate a setting that is a sequence of names."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise TypeError(unlike(name, "a tuple of names", value, of_type=True))
    return tuple(value)
