"""Room for the graphs of a compiled denoiser: T-GATE makes several of each that it has without."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from typing import Any

from ..denoiser.lock import exclusively
from ..plan.step_plan import Action

# Each kind of attention computes, stores or reuses.
_GRAPHS_PER_FUNCTION = len(Action) ** 2
_open: set[RaisedRecompileLimit] = set()
_graphs_left = 0


class _Limit:
    """
    A limit as its user has set it, and as T-GATE has.

    It is set from what is known and not by steps, so an interrupt leaves nothing that adds up.
    """

    def __init__(self) -> None:
        self._user_limit = 0
        self._set_by_us: tuple[int, ...] = ()

    def value_for(self, now: int) -> int:
        """The value that the limit has to have, where it is `now`."""
        if now not in self._set_by_us:
            self._user_limit = now
        limit = self._user_limit * (_GRAPHS_PER_FUNCTION if _open else 1) + _graphs_left
        self._set_by_us = (now, limit)
        return limit


# That for all threads, and those that threads have for themselves in newer versions of torch.
_limits: defaultdict[int | None, _Limit] = defaultdict(_Limit)


class RaisedRecompileLimit:
    """
    For one call, let a denoiser have as many forms (widths, batch sizes) compiled as it may have without T-GATE.

    Beyond `torch._dynamo.config.recompile_limit` graphs of one function the compiler gives up, and with
    `fullgraph=True` it raises. The repeated blocks of SD-1.5 come to 9 graphs with T-GATE, where 8 are allowed.

    The graphs stay, for the next gated call, and count in calls without T-GATE too. So the limit stays higher by them.
    """

    def __init__(self) -> None:
        # It is loaded where anything is compiled; others should not wait for the import.
        self._dynamo: Any = sys.modules.get("torch._dynamo")
        self._before: dict[int, int] = {}

    def open(self) -> None:
        """The call starts."""
        if self._dynamo is None:
            return
        self._before = _graphs(self._dynamo)
        _open.add(self)
        exclusively(self._set_limits)

    def close(self) -> None:
        """The call has ended. May come twice."""
        global _graphs_left
        if self._dynamo is None:
            return
        # Not where an interrupt has come before `open`: which graphs there were is not known then.
        if self in _open:
            made = (count for code, count in _graphs(self._dynamo).items() if count > self._before.get(code, 0))
            _graphs_left = max(_graphs_left, *made, 0)
        _open.discard(self)
        exclusively(self._set_limits)

    def _set_limits(self) -> None:
        """Set the limits by what is open and what is kept."""
        _set_limits(self._dynamo.config)


def restore_recompile_limit() -> None:
    """Restore the limit, if all graphs are gone (`torch._dynamo.reset()`)."""
    global _graphs_left
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and _graphs_left and not _open and not any(_graphs(dynamo).values()):
        _graphs_left = 0
        exclusively(lambda: _set_limits(dynamo.config))


def _set_limits(config: Any) -> None:
    """Set the limit for all threads, and that which this thread has for itself."""
    entry: Any = getattr(config, "_config", {}).get("recompile_limit")
    if isinstance(getattr(entry, "default", None), int):
        entry.default = _limits[None].value_for(entry.default)
        if config.recompile_limit == entry.default:
            return
    config.recompile_limit = _limits[threading.get_ident()].value_for(config.recompile_limit)


def _graphs(dynamo: Any) -> dict[int, int]:
    """How many graphs each compiled function has, as far as this torch reports it."""
    try:
        codes = [code for seen in dynamo.convert_frame.input_codes.seen if (code := seen()) is not None]
        return {id(code): len(dynamo.eval_frame._debug_get_cache_entry_list(code)) for code in codes}
    except AttributeError:
        return {}
