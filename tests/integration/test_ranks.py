"""Two processes that share the weights of a denoiser: a call that one of them leaves out, the other leaves out too."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

fsdp = pytest.importorskip("torch.distributed.fsdp")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="this torch cannot share out weights without a wrapper")
@pytest.mark.parametrize("name", ["sd", "wan"])
def test_processes_with_other_prompts_have_the_same_levels(name, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.support.ranks"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, name, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    # Each by itself has other levels. Together the larger error counts.
    assert first["alone"] != second["alone"]
    assert first["together"] == second["together"]
    for each in (first, second):
        assert each["same"] is (each["alone"] == each["together"])
