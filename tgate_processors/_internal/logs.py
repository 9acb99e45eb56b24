"""The logger of the library, which is as quiet as diffusers."""

from __future__ import annotations

import logging

from diffusers.utils.logging import get_verbosity

# Under the name that users know, and not under that of each module: a filter sees only what its own logger is given.
logger = logging.getLogger("tgate_processors")


def _as_loud_as_diffusers(record: logging.LogRecord) -> bool:
    """Whether diffusers would log this, unless our logger has a level or a handler of its own."""
    return bool(logger.level or logger.handlers) or record.levelno >= get_verbosity()


logger.addFilter(_as_loud_as_diffusers)
