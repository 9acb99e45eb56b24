"""What each of two processes draws on weights that they share: `torchrun --nproc-per-node 2 -m tests.support.ranks`."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.zoo.catalogue import BY_NAME
from tgate_processors import get_tgate_report


def levels_of(case, pipe, prompt):
    """The levels of a call, and what it draws."""
    drawn = case.run(pipe, [prompt], num_inference_steps=10)
    return get_tgate_report(pipe).levels, drawn


def main(name: str, folder: str) -> None:
    """Draw another prompt in each process, on a denoiser whose weights are shared out among them."""
    rank = int(os.environ["RANK"])
    init_process_group("gloo", timeout=timedelta(seconds=60))
    case = BY_NAME[name]
    pipe = case.build()
    # A tolerance with which the two prompts have other levels.
    for tolerance in (each / 20 for each in range(4, 80)):
        (own, alone), (other, _) = (
            levels_of(case, case.gate(pipe, tolerance=tolerance), each) for each in (rank, 1 - rank)
        )
        if own != other:
            break
    for denoiser in case.denoisers(pipe).values():
        fully_shard(denoiser, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    together, drawn = levels_of(case, pipe, rank)
    found = {"alone": own, "together": together, "same": own == together and torch.equal(drawn, alone)}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
