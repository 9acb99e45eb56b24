r"""
How near T-GATE comes to the speed-up that the arithmetic allows, and what it costs where it does nothing.

    python -m examples.benchmarks.speed --model sd15 --model pixart_alpha --size 256 --steps 10 --gate-step 4
    python -m examples.benchmarks.speed --model sdxl --size 1024 --batch-size 1 --batch-size 4 --device cuda \
        --dtype float16 --steps 25 --gate-step 10 --compile --output runs/speed

The denoisers have random weights. For trained ones, give the folder or the hub id of a pipeline. Each round runs the
pipeline's own denoising loop, from text embeddings to latents, three times: plain, with T-GATE, and plain without
guidance. Ratios are medians over the rounds.

The bound assumes that time is in proportion to MACs, but half a batch often takes more than half the time. The bound of
the forwards assumes that a half batch takes as long as a step of the plain pipeline without guidance, less
cross-attention.

The time of T-GATE's own code does not depend on the size of tensors, and is too short to be seen beside a large model's
arithmetic. So it is measured on a denoiser of the same layers made narrow: a plain step, and one whose gate lies beyond
the last step.
"""

import json
import logging
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch.profiler import ProfilerActivity, profile

from examples.benchmarks.cost_table import MODELS, load_denoiser
from examples.benchmarks.loading import check_device, check_dtype, load_pipeline
from examples.benchmarks.random_pipelines import denoiser_of, narrowed, random_inputs, random_pipeline
from examples.benchmarks.tables import print_table, write_table
from tgate_processors import (
    TGateAttnProcessor,
    TGateCallback,
    TGateCost,
    TGateSchedule,
    apply_tgate,
    estimate_cost,
    get_tgate_report,
    remove_tgate,
)

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
COLUMNS = {
    "model": "",
    "batch_size": "d",
    "compiled": "",
    "milliseconds_per_step": ".1f",
    "milliseconds_unguided": ".1f",
    "speedup": ".3f",
    "bound": ".3f",
    "ratio_to_bound": ".3f",
    "ratio_to_forwards": ".3f",
    "overhead_us_per_step": "+.0f",
    "overhead_us_per_layer": "+.1f",
    "overhead_percent": "+.3f",
    "peak_mb": ".1f",
    "peak_mb_gated": ".1f",
    "announced_mb": ".1f",
}


class Run:
    """Calls of one pipeline with the same arguments, plain and gated."""

    def __init__(self, pipe: Any, inputs: dict[str, Any], gate_step: int) -> None:
        self.pipe, self.inputs, self.gate_step = pipe, inputs, gate_step
        self.steps = inputs["num_inference_steps"]
        self.cuda = next(value for value in inputs.values() if isinstance(value, torch.Tensor)).is_cuda

    def set(self, mode: str) -> None:
        """Apply T-GATE, or remove it."""
        if mode in ("plain", "unguided"):
            remove_tgate(self.pipe)
        else:
            apply_tgate(self.pipe, self.gate_step if mode == "gated" else self.steps)

    def call(self, mode: str) -> None:
        """Draw, from the same noise every time."""
        guidance_scale = 1.0 if mode == "unguided" else 5.0
        self.pipe(**self.inputs, guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(0))

    def seconds(self, mode: str) -> float:
        """Time of a call."""
        self.set(mode)
        if self.cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            self.call(mode)
            events[1].record()
            torch.cuda.synchronize()
            return events[0].elapsed_time(events[1]) / 1000
        start = time.perf_counter()
        self.call(mode)
        return time.perf_counter() - start

    def warm_up(self, modes: list[str]) -> None:
        """Do what is done only once: the first of each kind of step, and compilation."""
        short = Run(self.pipe, {**self.inputs, "num_inference_steps": 3}, 2) if self.steps > 3 else self
        for mode in modes:
            short.seconds(mode)

    def peak_bytes(self, mode: str) -> int:
        """Most bytes that torch held at once during a call, beyond those that it held before."""
        self.set(mode)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.call(mode)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.call(mode)
        held = peak = 0
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak


def measure(run: Run, cost: TGateCost, rounds: int, console: Console, title: str) -> dict[str, Any]:
    """Time all kinds of calls, in an order that rotates from round to round."""
    modes = ["plain", "gated", "unguided"]
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    run.warm_up(modes)
    for number in track(range(rounds), title, console=console, transient=True):
        first = number % len(modes)
        for mode in modes[first:] + modes[:first]:
            seconds[mode].append(run.seconds(mode))
    steps, gate = run.steps, run.gate_step
    without_cross = cost.without_cross_attention.total / cost.full.total
    bounds = [
        steps * plain / (gate * plain + (steps - gate) * half * without_cross)
        for plain, half in zip(seconds["plain"], seconds["unguided"], strict=True)
    ]
    peaks = {mode: run.peak_bytes(mode) / 1e6 for mode in ("plain", "gated")}
    ratios = {mode: [a / b for a, b in zip(seconds["plain"], seconds[mode], strict=True)] for mode in modes}
    speedup = statistics.median(ratios["gated"])
    announced = get_tgate_report(run.pipe).peak_bytes / 1e6
    return {
        "seconds": seconds,
        "milliseconds_per_step": 1000 * statistics.median(seconds["plain"]) / steps,
        "milliseconds_unguided": 1000 * statistics.median(seconds["unguided"]) / steps,
        "speedup": speedup,
        "bound": cost.speedup_bound,
        "ratio_to_bound": speedup / cost.speedup_bound,
        "ratio_to_forwards": statistics.median(a / b for a, b in zip(ratios["gated"], bounds, strict=True)),
        "peak_mb": peaks["plain"],
        "peak_mb_gated": peaks["gated"],
        "announced_mb": announced,
    }


def overhead_us_per_step(described: Any, size: int, rounds: int, device: torch.device) -> float:
    """The time of T-GATE's code in a step with a late gate, measured on the same layers made narrow."""
    pipe = random_pipeline(narrowed(described), device, torch.float32)
    run = Run(pipe, random_inputs(pipe, 1, size, 10), 1)
    modes = ["plain", "late"]
    run.warm_up(modes)
    differences = []
    for number in range(rounds):
        taken = {mode: run.seconds(mode) for mode in (modes if number % 2 else modes[::-1])}
        differences.append((taken["late"] - taken["plain"]) / run.steps)
    return 1e6 * statistics.median(differences)


def microseconds_per_layer(calls: int = 20000) -> float:
    """The time that a gated processor adds to the one behind it."""

    class Nothing:
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None) -> Any:
            return hidden_states

    plain, layer, tensor = Nothing(), torch.nn.Module(), torch.zeros(1)
    callback = TGateCallback(TGateSchedule(10))
    gated = TGateAttnProcessor(plain, callback.state)
    taken: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(5):
        for index, processor in enumerate((plain, gated)):
            start = time.perf_counter()
            for _ in range(calls):
                processor(layer, tensor, encoder_hidden_states=tensor)
            taken[index].append((time.perf_counter() - start) / calls * 1e6)
    return min(taken[1]) - min(taken[0])


def hardware(device: torch.device) -> str:
    """What the seconds are measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"


def main(
    model: Annotated[
        list[str], typer.Option(help=f"One of {', '.join(MODELS)}, a denoiser's config.json, or a pipeline.")
    ] = ["sd15"],  # noqa: B006
    size: Annotated[int, typer.Option(min=16, help="Height and width in pixels.")] = 256,
    steps: Annotated[int, typer.Option(min=2)] = 10,
    gate_step: Annotated[int, typer.Option(min=1)] = 4,
    batch_size: Annotated[list[int], typer.Option(min=1)] = [1],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    narrow_rounds: Annotated[int, typer.Option(min=1, help="Rounds with narrow layers, for the overhead.")] = 60,
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the denoiser in place.")] = False,
    mode: Annotated[str, typer.Option(help="The mode to compile in.")] = "default",
    output: Annotated[Path | None, typer.Option(help="A folder for speed.json and speed.md.")] = None,
) -> None:
    """Measure."""
    check_dtype(dtype)
    check_device(device)
    if gate_step >= steps:
        raise typer.BadParameter(f"gate_step={gate_step} is not before the last of {steps} steps: pass a smaller one")
    # The gate beyond the last step, of which T-GATE warns, is what the overhead is measured with.
    logging.getLogger("tgate_processors").setLevel(logging.ERROR)
    console, place = Console(), torch.device(device)
    rows = []
    for name in model:
        if name in MODELS or name.endswith(".json"):
            pipe = random_pipeline(load_denoiser(name), place, getattr(torch, dtype))
        else:
            pipe = load_pipeline(name, place, dtype)
        denoiser = denoiser_of(pipe)
        overhead = overhead_us_per_step(denoiser, 64, narrow_rounds, place)
        if compile:
            denoiser.compile(fullgraph=True, mode=mode)
        for batch in batch_size:
            run = Run(pipe, random_inputs(pipe, batch, size, steps), gate_step)
            cost = estimate_cost(pipe, TGateSchedule(gate_step), steps, height=size, width=size, batch_size=batch)
            row = {"model": name, "batch_size": batch, "compiled": mode if compile else "no"}
            row |= measure(run, cost, rounds, console, f"{name}, batch of {batch}")
            row["overhead_us_per_step"] = overhead
            row["overhead_us_per_layer"] = overhead / len(denoiser.attn_processors)
            row["overhead_percent"] = overhead / row["milliseconds_per_step"] / 10
            rows.append(row)
    about = {
        "size": size,
        "steps": steps,
        "gate_step": gate_step,
        "rounds": rounds,
        "dtype": dtype,
        "hardware": hardware(place),
        "versions": {package: version(package) for package in PACKAGES},
        "microseconds_per_layer": microseconds_per_layer(),
    }
    report(rows, about, console, output)


def report(rows: list[dict[str, Any]], about: dict[str, Any], console: Console, output: Path | None) -> None:
    """Print, and write JSON and Markdown."""
    shown = [[format(row[column], form) for column, form in COLUMNS.items()] for row in rows]
    names = [column.replace("_", " ") for column in COLUMNS]
    # A line for each figure: the names are wide, but for those of the rows, which the first two lines have.
    headings = ["", *(f"{number}." for number in range(1, len(rows) + 1))]
    print_table(console, "", headings, [list(line) for line in zip(names, *shown, strict=True)])
    for name, value in about.items():
        console.print(f"{name.replace('_', ' ')}: {value}", highlight=False)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "speed.json").write_text(json.dumps({"rows": rows, **about}, indent=2))
        write_table(output / "speed.md", names, shown)


if __name__ == "__main__":
    typer.run(main)
