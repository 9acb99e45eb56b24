"""What four processes, two by two, agree on: `torchrun --nproc-per-node 4 -m tests.support.mesh FOLDER`."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tgate_processors._internal.run.ranks import agreement_of


def main(folder: str) -> None:
    """Agree on a number of which each process has another one, and on one that is no number in the first process."""
    distributed.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank = distributed.get_rank()
    layer = torch.nn.Linear(4, 4)
    # Copies of weights in one dimension, parts of them in the other.
    fully_shard(layer, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))
    agree = agreement_of([layer])
    agreed = agree(torch.tensor([float(rank), 0.0 if rank else torch.nan]))
    Path(folder, f"{rank}.json").write_text(json.dumps([*agreed.tolist(), agree.ranks]))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
