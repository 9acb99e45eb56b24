import gc
import logging
import os

import pytest
import torch

from tests.pipelines import CASES, Case, rows

os.environ["HF_HUB_OFFLINE"] = "1"
logging.getLogger("diffusers").setLevel(logging.ERROR)
# One thread a worker: the tensors are tiny, and sums are then always made in the same order.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection, which else looks at a million objects every few calls."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=rows(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every supported family in turn."""
    return request.param
