"""What each of two processes finds: `torchrun --nproc-per-node 2 -m tests.support.ranks FOLDER CHECK...`."""

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.custom_loops import Loop, built
from tests.support.states import check_restored, snapshot
from tests.zoo.catalogue import BY_NAME
from tgate_processors import get_tgate_report, is_tgate_applied, remove_tgate

STEPS = 8
# With this, random weights have full, half and forecast steps.
TOLERANCE = 2.0
# diffusers can split a denoiser over processes by a plan that the denoiser has.
CAN_SPLIT = hasattr(diffusers, "ContextParallelConfig")
CAN_SPLIT_WEIGHTS = hasattr(diffusers, "TensorParallelConfig")


def enable_cpu() -> None:
    """Let diffusers split denoisers over CPUs, which it has not been written for."""
    if CAN_SPLIT:
        from diffusers.hooks import context_parallel
        from diffusers.models import attention_dispatch

        torch.accelerator.device_count = lambda: 1
        own = attention_dispatch._native_attention_forward_op
        attention_dispatch._native_attention_forward_op = functools.partial(attention_with_sums, own)
        context_parallel._all_gather_anything = gather_uneven
    if CAN_SPLIT_WEIGHTS:
        from diffusers.hooks import tensor_parallel

        tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)


def attention_with_sums(own, ctx, query, key, value, *args, scale=None, return_lse=False, **more):
    """Attention on CPUs; ring attention needs the logarithms of the sums of its weights too."""
    # Positional in diffusers: mask, dropout, causal, scale, grouped queries, sums.
    if not (return_lse or (len(args) > 5 and args[5])):
        return own(ctx, query, key, value, *args, **more)
    assert args[0] is None
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), value), weights.logsumexp(-1).transpose(1, 2)


def gather_uneven(tensor: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """Gather parts of several sizes; gloo wants them to be of one."""
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, tensor, group=group)
    return torch.cat(found, dim)


def drawn(case: Any, pipe: Any, **call: Any) -> tuple[torch.Tensor, Any]:
    """What a call draws, and its report."""
    picture = case.run(pipe, **{"num_inference_steps": STEPS, **call})
    return picture, get_tgate_report(pipe) if is_tgate_applied(pipe) else None


def farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two pictures."""
    return (a - b).abs().max().item()


def even(case: Any) -> dict[str, Any]:
    """Texts of four tokens, which two processes can share."""
    texts = {name: given for name, given in case.inputs([0]).items() if "prompt_embeds" in name and given.dim() > 1}
    return {
        name: torch.ones_like(given[:, :4]) if "mask" in name else given[:, :4].clone()
        for name, given in texts.items()
        if "pooled" not in name
    }


def compare(case: Any, pipe: Any, split_denoiser: Callable[[Any], Any], **call: Any) -> dict[str, Any]:
    """A pipeline whose denoiser is split, beside one that is not."""
    case.gate(pipe, tolerance=TOLERANCE)
    split_denoiser(getattr(pipe, case.denoiser))
    gated_before, _ = drawn(case, pipe, **call)
    remove_tgate(pipe)
    one = case.build()
    plain, _ = drawn(case, one, **call)
    gated, report = drawn(case, case.gate(one, tolerance=TOLERANCE), **call)
    split, _ = drawn(case, pipe, **call)
    before = snapshot(pipe, case)
    gated_split, split_report = drawn(case, case.gate(pipe, tolerance=TOLERANCE), **call)
    late, _ = drawn(case, case.gate(pipe, STEPS), **call)
    remove_tgate(pipe)
    check_restored(before, snapshot(pipe, case), case)
    return {
        "plain": farthest(plain, split),
        "gated": farthest(gated, gated_split),
        "levels": [report.levels, split_report.levels],
        "ranks": [report.ranks, split_report.ranks],
        "either_order": torch.equal(gated_before, gated_split),
        "late": torch.equal(late, split),
        "removed": torch.equal(drawn(case, pipe, **call)[0], split),
    }


def parallel(name: str, config: str, **degrees: int) -> dict[str, Any]:
    """The tokens or the weights of a denoiser are shared by a config of diffusers'."""
    case = BY_NAME[name]
    return compare(
        case,
        case.build(),
        lambda denoiser: denoiser.enable_parallelism(config=getattr(diffusers, config)(**degrees)),
        **even(case),
    )


def mapped(name: str) -> dict[str, Any]:
    """Each process has all of the weights, where a map says."""
    case = BY_NAME[name]
    place = functools.partial(accelerate.dispatch_model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)
    return compare(case, case.build(), place)


def sharded(name: str) -> dict[str, Any]:
    """Another prompt in each process, on weights that are shared out by torch."""
    rank = int(os.environ["RANK"])
    case = BY_NAME[name]
    pipe = case.build()

    def run(prompt, *args, **settings):
        picture = case.run(case.gate(pipe, *args, **settings), [prompt], num_inference_steps=10)
        return picture, get_tgate_report(pipe)

    def plain():
        return case.run(remove_tgate(pipe), [rank], num_inference_steps=10)

    # A tolerance with which the two prompts have other levels.
    for tolerance in (each / 20 for each in range(4, 40)):
        (_, own), (_, other) = (run(each, tolerance=tolerance) for each in (rank, 1 - rank))
        if own.levels != other.levels:
            break
    for denoiser in case.denoisers(pipe).values():
        fully_shard(denoiser, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    picture, together = run(rank, tolerance=tolerance)
    late, _ = run(rank, 10)
    before = plain()
    # Alone, with the levels that were agreed on.
    pipe = case.build()
    alone, _ = run(rank, together.levels)
    return {
        "levels": [own.levels, together.levels],
        "ranks": [own.ranks, together.ranks],
        "gated": farthest(picture, alone),
        "late": torch.equal(late, before),
        "plain": farthest(before, plain()),
    }


def uneven() -> dict[str, Any]:
    """Five tokens in one process and four in the other, and memory for two layers of four."""
    case = BY_NAME["wan"]
    call = {"height": 48, "width": 48, "num_frames": 1, **even(case)}
    pipe = case.build()
    denoiser = pipe.transformer
    a_token = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim * 4
    denoiser.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
    picture, report = drawn(case, case.gate(pipe, 3, max_memory=8 * a_token), **call)
    alone, own = drawn(case, case.gate(case.build(), 3, max_memory=9 * a_token), **call)
    return {
        "kept": [own.kept_layers, report.kept_layers],
        "bytes": report.peak_bytes,
        "ranks": [own.ranks, report.ranks],
        "gated": farthest(picture, alone),
    }


def refusal(case: Any, pipe: Any, **settings: Any) -> dict[str, Any]:
    """Why a pipeline is refused whose halves of guidance two processes compute, after which steps, and what stays."""
    before = case.run(pipe)
    ended: list[int] = []
    message = ""

    def count(pipe, step, timestep, tensors):
        ended.append(step)
        return {}

    try:
        case.run(case.gate(pipe, **settings), callback_on_step_end=count)
    except ValueError as error:
        message = str(error)
    after = case.run(remove_tgate(pipe))
    return {"message": message, "ended": ended, "removed": torch.equal(before, after)}


def gather(part: torch.Tensor) -> list[torch.Tensor]:
    """The parts of both processes."""
    parts = [torch.empty_like(part) for _ in range(2)]
    distributed.all_gather(parts, part.contiguous())
    return parts


def split_forward(name: str) -> dict[str, Any]:
    """The denoiser has another `forward`, which gives each process one row of the batch."""
    case = BY_NAME[name]
    one, pipe = case.build(), case.build()
    denoiser = getattr(pipe, case.denoiser)
    own, rank = denoiser.forward, distributed.get_rank()

    def forward(*args, return_dict=True, **kwargs):
        def part(value):
            is_batch = isinstance(value, torch.Tensor) and value.dim() and len(value) == 2
            return value.chunk(2)[rank] if is_batch else value

        output = own(*map(part, args), **{key: part(value) for key, value in kwargs.items()}, return_dict=False)
        return (torch.cat(gather(output[0])),)

    denoiser.forward = forward
    found = refusal(case, pipe, custom_forwards="gate")
    # Whole steps can be left out.
    plan = {"gate_step": "FFF-F-FF"}
    alone, _ = drawn(case, case.gate(one, **plan))
    together, report = drawn(case, case.gate(pipe, custom_forwards="gate", **plan))
    return {**found, "levels": report.levels, "gated": farthest(alone, together)}


class Halves(Loop):
    """A loop in which each process computes one half of guidance."""

    def predict(self, i, x, t, texts, pooled, scale):
        u, c = gather(self.denoise(x, t, texts[distributed.get_rank()], pooled))
        return u + scale * (c - u)


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "sharded-sd": lambda: sharded("sd"),
    "sharded-wan": lambda: sharded("wan"),
    "mapped-wan": lambda: mapped("wan"),
    "forward-sd": lambda: split_forward("sd"),
    "forward-sd3": lambda: split_forward("sd3"),
    "loop-sd": lambda: refusal(BY_NAME["sd"], built("sd", Halves)),
}
if CAN_SPLIT:
    CHECKS |= {
        "ring-wan": lambda: parallel("wan", "ContextParallelConfig", ring_degree=2),
        "ring-qwen": lambda: parallel("qwen", "ContextParallelConfig", ring_degree=2),
        "ulysses-wan": lambda: parallel("wan", "ContextParallelConfig", ulysses_degree=2),
        "ulysses-qwen": lambda: parallel("qwen", "ContextParallelConfig", ulysses_degree=2),
        "uneven-wan": uneven,
    }
if CAN_SPLIT_WEIGHTS:
    CHECKS["tensor-flux"] = lambda: parallel("flux", "TensorParallelConfig", tp_degree=2)

# The last word is the pipeline.
CHECKS = {name: check for name, check in CHECKS.items() if BY_NAME[name.rpartition("-")[2]].is_there}


def main(folder: str, *names: str) -> None:
    """Run these checks one after the other, and write what they find, or why they fail."""
    distributed.init_process_group("gloo", timeout=timedelta(minutes=10))
    enable_cpu()
    found = {}
    for name in names:
        try:
            found[name] = CHECKS[name]()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
