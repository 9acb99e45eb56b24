"""Validation of settings: of the right type and in range, or an error that names them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal

Auto = Literal["auto"]

DEFAULT_TOLERANCE = 0.6


def checked_gate_step(value: object) -> int | float | Auto:
    """Validate `gate_step`."""
    if isinstance(value, str) and value == "auto":
        return "auto"
    remedy = (
        "give a number of steps (an int of at least 1), a share of the steps (a float between 0 and 1), or "
        '"auto" to have the run decide'
    )
    share = _as_float(value)
    if share is None:
        return checked_int("gate_step", value, 1, remedy)
    if not 0.0 < share < 1.0:
        raise ValueError(f"gate_step={value!r} is not a share of the steps: {remedy}.")
    return share


def checked_tolerance(value: object) -> float:
    """Validate `tolerance`."""
    if value is None:
        return DEFAULT_TOLERANCE
    remedy = "give the relative error to accept, a number of at least 0 such as 0.6"
    if isinstance(value, (str, bytes)) or _is_no_number(value) or not hasattr(value, "__float__"):
        raise TypeError(f"tolerance={value!r} is of type {type(value).__name__}: {remedy}.")
    tolerance = float(value)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={value!r} is out of range: {remedy}.")
    return tolerance


def _as_float(value: object) -> float | None:
    """A number whose type is not an integer type: a float (numpy's and torch's too) or a fraction."""
    if isinstance(value, (str, bytes)) or _is_no_number(value):
        return None
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return float(value) if hasattr(value, "__float__") else None
    return None


def _is_no_number(value: object) -> bool:
    """Whether a value is a bool or an array, which Python would accept as a number."""
    return isinstance(value, bool) or bool(getattr(value, "ndim", 0)) or "bool" in str(getattr(value, "dtype", ""))


def checked_int(name: str, value: object, least: int, remedy: str | None = None) -> int:
    """Validate an integer setting."""
    remedy = remedy or f"give an int of at least {least}"
    if _is_no_number(value):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}: {remedy}.")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}: {remedy}.") from None
    if number < least:
        raise ValueError(f"{name}={value!r} is too small: {remedy}.")
    return number


def check_switch(name: str, value: object) -> None:
    """Refuse anything but `True`, `False` and `None`."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}: give True or False, or leave it out.")


def checked_names(name: str, value: object) -> tuple[str, ...] | None:
    """Validate a setting that is a sequence of names."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}: give a tuple of names, or leave it out.")
    return tuple(value)
