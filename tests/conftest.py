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


# Laws that are held for every family: CI has some rows of each law, and one for every family.
FAMILIES = {"test_families.py", "test_two_calls.py", "test_joint.py"}
FOR_CI = "test_full_steps_alone_change_no_bit"
# The dearest rows elsewhere, whose law CI proves for another pipeline.
DEAREST = {
    "test_applied_before_or_after_and_removed[sd-exchange_for_compiled-True]",
    "test_with_deepcache_as_far_as_that_compiles[compile_in_place]",
    "test_three_graphs_and_none_for_other_prompts_steps_and_scales[lora]",
    "test_three_graphs_and_none_for_other_prompts_steps_and_scales[sd]",
    "test_applied_before_or_after_and_removed[pixart_alpha-exchange_for_compiled-False]",
    "test_three_graphs_and_none_for_other_prompts_steps_and_scales[ip_adapter]",
    "test_three_graphs_and_none_for_other_prompts_steps_and_scales[sdxl]",
    "test_three_graphs_and_none_for_other_plans[sd-compile_in_place]",
    "test_a_short_run_gives_a_pipeline_that_draws[sd]",
    "test_a_denoiser_with_random_weights[2-sdxl]",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what CI need not repeat for every family."""
    for item in items:
        repeated = item.path.name in FAMILIES and getattr(item, "originalname", "") != FOR_CI
        if (repeated or item.name in DEAREST) and item.get_closest_marker("slow"):
            item.add_marker("thorough")


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection, which else looks at a million objects every few calls."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=rows(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every supported family in turn."""
    return request.param
