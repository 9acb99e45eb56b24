"""Room for the graphs of a compiled denoiser: T-GATE makes several of each that it has without."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .schedule import Action

# Each kind of attention computes, stores or reuses.
_GRAPHS_FOR_EACH = len(Action) ** 2
_lock = threading.Lock()
_raised_to: int | None = None


@contextmanager
def room_for_graphs() -> Iterator[None]:
    """
    Let a denoiser have as many forms (widths, batch sizes) compiled as it may have without T-GATE.

    Beyond `torch._dynamo.config.recompile_limit` graphs of one function the compiler gives up, and with
    `fullgraph=True` it raises. The repeated blocks of SD-1.5 come to 9 graphs with T-GATE, where 8 are allowed.
    """
    global _raised_to
    # Anyone who compiles has loaded it; nobody else should wait for the import.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        yield
        return
    config = dynamo.config
    with _lock:
        before = config.recompile_limit
        # Older versions of torch have one limit for all threads, so a call may find it raised by another one.
        raising = before != _raised_to
        if raising:
            _raised_to = config.recompile_limit = before * _GRAPHS_FOR_EACH
    try:
        yield
    finally:
        if raising:
            with _lock:
                config.recompile_limit = before
                _raised_to = None
