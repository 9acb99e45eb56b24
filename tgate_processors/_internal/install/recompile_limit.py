"""Room for the graphs of a compiled denoiser: T-GATE makes several of each that it has without."""

from __future__ import annotations

import sys
import threading
from typing import Any

from ..plan.schedule import Action

# Each kind of attention computes, stores or reuses.
_GRAPHS_FOR_EACH = len(Action) ** 2
_lock = threading.RLock()
_calls = 0
_users = 0
_kept_for = 0
_left = 0


class RaisedRecompileLimit:
    """
    For one call, let a denoiser have as many forms (widths, batch sizes) compiled as it may have without T-GATE.

    Beyond `torch._dynamo.config.recompile_limit` graphs of one function the compiler gives up, and with
    `fullgraph=True` it raises. The repeated blocks of SD-1.5 come to 9 graphs with T-GATE, where 8 are allowed.

    The graphs stay, for the next gated call, and count in calls without T-GATE too. So the limit stays higher by them.
    """

    def __init__(self) -> None:
        # Anyone who compiles has loaded it; nobody else should wait for the import.
        self._dynamo: Any = sys.modules.get("torch._dynamo")
        self._more = self._users = 0
        self._before: dict[int, int] = {}

    def open(self) -> None:
        """The call starts."""
        global _calls, _users
        if self._dynamo is None:
            return
        config = self._dynamo.config
        with _lock:
            if not _calls:
                _users = config.recompile_limit
            self._before = _graphs(self._dynamo)
            self._users, self._more = _users, (_GRAPHS_FOR_EACH - 1) * _users
            _calls += 1
            _raise_limit(config, self._more, self._users)

    def close(self) -> None:
        """The call has ended. May come twice."""
        global _calls, _kept_for, _left
        if not self._more:
            return
        with _lock:
            more, self._more = self._more, 0
            _calls -= 1
            made = (count for code, count in _graphs(self._dynamo).items() if count > self._before.get(code, 0))
            kept_for = max(_kept_for, *made, 0)
            _raise_limit(self._dynamo.config, kept_for - _kept_for - more, self._users)
            _kept_for, _left = kept_for, self._dynamo.config.recompile_limit


def give_back_room() -> None:
    """Put the limit back, if all graphs have gone (`torch._dynamo.reset()`)."""
    global _kept_for
    dynamo = sys.modules.get("torch._dynamo")
    with _lock:
        if dynamo is not None and _kept_for and not _calls and not any(_graphs(dynamo).values()):
            limit = dynamo.config.recompile_limit
            # Another one has been set since, and stays.
            _raise_limit(dynamo.config, -_kept_for, 1 if limit == _left else limit)
            _kept_for = 0


def _raise_limit(config: Any, more: int, least: int) -> None:
    """Raise the limit, or lower it again: by steps, so calls that overlap end in any order."""
    before = config.recompile_limit
    # What is set is a thread's own in newer versions of torch; what nobody has set is for all. Siblings of the
    # pipeline may run in other threads.
    entry: Any = getattr(config, "_config", {}).get("recompile_limit")
    if isinstance(getattr(entry, "default", None), int):
        entry.default += more
    if config.recompile_limit == before:
        config.recompile_limit = max(before + more, least)


def _graphs(dynamo: Any) -> dict[int, int]:
    """How many graphs each compiled function has, as far as this torch tells."""
    try:
        codes = [code for seen in dynamo.convert_frame.input_codes.seen if (code := seen()) is not None]
        return {id(code): len(dynamo.eval_frame._debug_get_cache_entry_list(code)) for code in codes}
    except AttributeError:
        return {}
