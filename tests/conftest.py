import gc
import logging
import os
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("tests.support")

from tests.zoo.case import Case, rows  # noqa: E402
from tests.zoo.core import CASES  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
# Tests count the warnings of T-GATE; what these say depends on which test loads a module first.
for library in ("diffusers", "transformers"):
    logging.getLogger(library).setLevel(logging.ERROR)
# Else it is as quiet as diffusers.
logging.getLogger("tgate_processors").setLevel(logging.WARNING)
# One thread a worker: the tensors are tiny, and sums are then always made in the same order.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection, which else looks at a million objects every few calls."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _as_loud_as_before() -> Iterator[None]:
    """Undo what a script that a test has run says of the loggers."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "tgate_processors")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(params=rows(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every supported family in turn."""
    return request.param
