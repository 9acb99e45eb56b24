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


# Files of many families, and laws that say nothing of a family by itself: the default tests have some rows of each.
FAMILIES = {"test_families.py", "test_two_calls.py", "test_joint.py"}
REPEATED = {
    "test_a_batch_of_two_prompts_equals_two_singles",
    "test_a_call_without_guidance_is_the_plain_one_and_says_so",
    "test_a_layer_that_attends_to_the_text_and_keeps_nothing_is_named",
    "test_a_run_that_breaks_leaves_nothing",
    "test_after_the_gate_the_denoiser_gives_what_it_gives_with_what_is_kept_in_the_place_of_cross_attention",
    "test_full_steps_alone_change_no_bit",
    "test_guidance_alone_runs_every_layer_on_one_half",
    "test_the_halves_of_a_half_step_differ_by_the_prediction",
    "test_the_scheduler_gets_the_guidance_that_is_computed_or_predicted",
    "test_the_second_call_of_a_half_step_gives_the_first_and_the_prediction",
    "test_without_guidance_nothing_is_averaged_or_halved",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what CI need not repeat for every family."""
    for item in items:
        repeated = item.path.name in FAMILIES and getattr(item, "originalname", "") in REPEATED
        if repeated and item.get_closest_marker("slow"):
            item.add_marker("thorough")


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection, which else looks at a million objects every few calls."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=rows(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every supported family in turn."""
    return request.param
