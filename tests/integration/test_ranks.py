"""Several processes with one denoiser: what one of them leaves out, the others leave out too, and draw the same."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import distributed

from tests.support.paths import ROOT
from tests.zoo.catalogue import BY_NAME
from tgate_processors import get_tgate_report
from tgate_processors._internal.run.ranks import agreement_of

pytest.importorskip("torch.distributed.fsdp")
ranks = pytest.importorskip("tests.support.ranks", reason="this torch cannot share out weights without a wrapper")
# Sums over parts are made in another order.
CLOSE = 1e-5


def launched(folder, processes, *command):
    """What each of some processes has found."""
    # Once in a while torch ends with a segmentation fault in gloo. What a check raises is no reason to start again.
    options = ["--standalone", "--max-restarts", "1", "--nproc-per-node", str(processes)]
    call = ["-m", "torch.distributed.run", *options, "-m", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *call], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes have found, in one launch for all tests of this module."""

    folder = tmp_path_factory.mktemp("ranks")
    both = launched(folder, 2, "tests.support.ranks", str(folder), *ranks.CHECKS)

    def of(name):
        if name not in ranks.CHECKS:
            pytest.skip("this diffusers cannot split this denoiser like this")
        pair = [each[name] for each in both]
        for each in pair:
            assert "error" not in each, each["error"]
        return pair

    return of


WAYS = ["ring-wan", "ring-qwen", "ulysses-wan", "ulysses-qwen", "tensor-flux", "mapped-wan"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_split_denoiser_draws_what_a_whole_one_does(way, found):
    for each in found(way):
        alone, split = each["levels"]
        assert set(split) == {"F", "H", "-"}
        assert split == alone
        assert max(each["plain"], each["gated"]) < CLOSE
        # Split before or after T-GATE is applied. A late gate changes nothing, and nothing stays after it: bit for bit.
        assert each["either_order"]
        assert each["late"]
        assert each["removed"]
        assert each["ranks"] == [1, 1 if way == "mapped-wan" else 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "wan"])
def test_processes_with_other_prompts_have_the_same_levels(name, found):
    first, second = found(f"sharded-{name}")
    # Each by itself has other levels. Together the larger error counts.
    assert first["levels"][0] != second["levels"][0]
    assert first["levels"][1] == second["levels"][1]
    for each in (first, second):
        assert each["ranks"] == [1, 2]
        # As one process draws with these levels, or without T-GATE.
        assert max(each["gated"], each["plain"]) < CLOSE
        assert each["late"]


@pytest.mark.slow
def test_processes_with_more_and_fewer_tokens_keep_the_same_layers(found):
    first, second = found("uneven-wan")
    # The smaller part of both layers would fit.
    assert first["bytes"] > second["bytes"]
    for each in (first, second):
        assert each["kept"] == [1, 1]
        assert each["ranks"] == [1, 2]
        assert each["gated"] < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_forward_that_splits_guidance_is_refused_in_its_first_step(name, found):
    for each in found(f"forward-{name}"):
        assert "got a batch of 2, both halves of guidance, and its attention layers got 1" in each["message"]
        assert each["ended"] == []
        assert each["removed"]
        # It can leave out whole steps. Convolutions round one row and two in other ways.
        assert each["levels"] == "FFF-F-FF"
        assert each["gated"] < 1e-4


@pytest.mark.slow
def test_a_loop_that_splits_guidance_is_refused_in_its_first_step(found):
    for each in found("loop-sd"):
        assert "got a batch of 1 for 1 latents" in each["message"]
        assert "each process computes one half of it (CFG parallelism)" in each["message"]
        assert each["ended"] == [0]
        assert each["removed"]


@pytest.mark.slow
def test_all_processes_of_a_mesh_agree(tmp_path):
    assert launched(tmp_path, 4, "tests.support.mesh", str(tmp_path)) == 4 * [[3.0, torch.inf, 4]]


@pytest.mark.parametrize("joined", [False, True], ids=["one", "joined"])
def test_a_process_with_a_denoiser_of_its_own_agrees_with_nobody(joined):
    if joined:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        case = BY_NAME["sd"]
        pipe = case.gate(case.build(), tolerance=torch.inf, max_memory="1MB")
        assert agreement_of([pipe.unet]) is None
        case.run(pipe)
        report = get_tgate_report(pipe)
        assert report.prediction_errors
        assert report.kept_layers
        assert report.ranks == 1
    finally:
        if joined:
            distributed.destroy_process_group()
