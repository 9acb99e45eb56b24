import gc
import logging
import os

import pytest
import torch

from tests.pipelines import CASES, Case

os.environ["HF_HUB_OFFLINE"] = "1"
logging.getLogger("diffusers").setLevel(logging.ERROR)
# One thread a worker: the tensors are tiny, and sums are then always made in the same order.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection, which else looks at a million objects every few calls."""
    gc.collect()
    gc.freeze()


# A single ControlNet stands for these.
SLOW = {"sd_multi_controlnet_img2img", "sdxl_controlnet", "sdxl_controlnet_inpaint"}
PARAMS = [pytest.param(case, marks=[pytest.mark.slow] if case.name in SLOW else []) for case in CASES]


@pytest.fixture(params=PARAMS, ids=[case.name for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    """Every supported family in turn."""
    return request.param
