"""A gated denoiser compiles without a graph break, into one graph for each action."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.pipelines import BY_NAME
from tgate_processors import apply_tgate, remove_tgate

NAMES = ["sd", "sdxl", "pixart_alpha", "lcm_sdxl"]


@pytest.fixture(autouse=True)
def _no_graphs():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_in_place_compilation_makes_a_graph_for_compute_store_and_reuse(name):
    case = BY_NAME[name]
    pipe = case.build()
    expected = case.run(apply_tgate(pipe, 3))
    counter = CompileCounter()
    getattr(pipe, case.denoiser).compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(case.run(pipe), expected)
    assert counter.frame_count == 3
    torch.testing.assert_close(case.run(pipe), expected)
    case.run(pipe, [1], num_inference_steps=9)
    assert counter.frame_count == 3


@pytest.mark.parametrize(
    ("name", "compile_first"), [("sd", True), ("sdxl", False), ("pixart_alpha", True), ("pixart_alpha", False)]
)
def test_a_compiled_denoiser_in_the_place_of_the_plain_one(name, compile_first):
    case = BY_NAME[name]
    pipe = case.build()
    baseline = case.run(pipe)
    expected = case.run(apply_tgate(pipe, 3))
    remove_tgate(pipe)
    counter = CompileCounter()
    if not compile_first:
        apply_tgate(pipe, 3)
    setattr(pipe, case.denoiser, torch.compile(getattr(pipe, case.denoiser), fullgraph=True, backend=counter))
    if compile_first:
        apply_tgate(pipe, 3)
    for _ in range(2):
        torch.testing.assert_close(case.run(pipe), expected)
        assert counter.frame_count == 3
    remove_tgate(pipe)
    torch.testing.assert_close(case.run(pipe), baseline)
