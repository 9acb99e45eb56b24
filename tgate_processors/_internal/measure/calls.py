"""The calls of a pipeline that a measurement makes, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..api import remove_tgate
from ..install.pipeline import install, installed
from ..plan.schedule import TGateSchedule
from ..plan.validation import shown
from .cost import estimate_cost


def read_calls(prompts: Sequence[str | Mapping[str, Any]], call: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The arguments of each call: its own, and those that every call gets."""
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        raise TypeError(
            f"prompts={shown(prompts)} is of type {type(prompts).__name__}: pass a list, with a prompt for each call."
        )
    prompts = list(prompts)
    if not all(isinstance(each, (str, Mapping)) for each in prompts):
        raise TypeError(f"prompts={shown(prompts)}: pass a str, or a dict of the arguments, for each call.")
    if call is not None and not isinstance(call, Mapping):
        raise TypeError(f"call={shown(call)} is of type {type(call).__name__}: pass a dict of arguments.")
    if not prompts:
        raise ValueError(f"prompts={shown(prompts)} is empty: pass some prompts, with a call for each.")
    return [{**(call or {}), **({"prompt": each} if isinstance(each, str) else each)} for each in prompts]


@contextmanager
def restored(pipe: Any) -> Iterator[None]:
    """What was applied to the pipeline is applied again afterwards."""
    before = installed(pipe)
    try:
        yield
    finally:
        remove_tgate(pipe)
        if before is not None:
            install(pipe, before)


def half_cost(pipe: Any, call: Mapping[str, Any], steps: int, cross_attention: bool | None = None) -> float:
    """The MACs of a half step, as a share of those of a full step."""
    size = {name: call[name] for name in ("height", "width", "max_sequence_length", "num_frames") if call.get(name)}
    try:
        cost = estimate_cost(pipe, TGateSchedule(1), steps, cross_attention=cross_attention, **size)
    except (TypeError, ValueError):
        # Adapters, guiders and the like: at least one half is left out.
        return 0.5
    half = cost.without_cross_attention if cost.report.kept_layers else cost.full
    return half.total / (2 * cost.full.total)
