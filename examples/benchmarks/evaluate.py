"""
Quality and speed of T-GATE and other methods, side by side: models, methods and settings interleaved in one run.

    python -m examples.benchmarks.evaluate --output runs/evaluation
    python -m examples.benchmarks.evaluate --model examples/models/shapes-pixart --steps 50 --scheduler euler \
        --output runs/euler
    accelerate launch --num-processes 8 -m examples.benchmarks.evaluate \
        --model stabilityai/stable-diffusion-xl-base-1.0 --captions captions_val2014.json --count 10000 --real val2014 \
        --device cuda --dtype float16 --output runs/sdxl

If a run is interrupted, start it again with the same arguments: it resumes where it stopped.
"""

import hashlib
import itertools
import json
import os
import platform
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.benchmarks.evaluation.drawing import Drawing, Table, denoiser_of
from examples.benchmarks.evaluation.methods import CHOICES, Settings, entries
from examples.benchmarks.evaluation.metrics import Extras
from examples.benchmarks.evaluation.plots import against_reference, contact_sheet, pareto
from examples.benchmarks.evaluation.prompts import DOMAINS, read_captions
from examples.benchmarks.evaluation.report import (
    COLUMNS,
    cell,
    compare_with_caches,
    compare_with_fewer_steps,
    filled,
    markdown,
    notes,
    rows_of,
    write_csv,
)
from examples.benchmarks.evaluation.store import claim, clear_parts, write, write_json
from examples.benchmarks.loading import MODELS, check_device, check_dtype, load_pipeline, one_of
from examples.benchmarks.tables import print_table
from examples.testbeds.shapes.evaluation import call_options, draws_videos
from examples.testbeds.shapes.tokens import LENGTH

MODEL = MODELS / "shapes-sd"
SCHEDULERS = {
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
}
# For models that predict the velocity of a flow.
FLOW_SCHEDULERS = {
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "torchmetrics", "DeepCache", "tomesd", "cache-dit")


def load(model: str, scheduler: str, device: torch.device, dtype: str) -> Any:
    """The pipeline with the named scheduler."""
    pipe = load_pipeline(model, device, dtype)
    config = pipe.scheduler.config
    if config.get("prediction_type") != "flow_prediction":
        pipe.scheduler = SCHEDULERS[scheduler].from_config(config)
    elif scheduler in FLOW_SCHEDULERS:
        pipe.scheduler = FLOW_SCHEDULERS[scheduler].from_config(config, shift=config["flow_shift"])
    else:
        raise typer.BadParameter(
            f"scheduler={scheduler!r} does not step along the straight lines that {model!r} was trained on: "
            f"pass one of {', '.join(FLOW_SCHEDULERS)}"
        )
    return pipe


def call_for(pipe: Any, guidance_scale: float | None) -> dict[str, Any]:
    """The arguments of every call."""
    call = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if draws_videos(pipe):
        # Only the testbed's captions are so short, and only its clips.
        if pipe.tokenizer.model_max_length != LENGTH:
            raise typer.BadParameter("clips are those of the testbed: pass --model examples/models/shapes-wan")
        return call | call_options(pipe)
    # The testbeds are smaller than any size that PixArt's pipelines know.
    small = denoiser_of(pipe).config.sample_size * pipe.vae_scale_factor <= 64
    return call | (call_options(pipe) if small else {})


def hardware(device: torch.device) -> str:
    """What the seconds were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except ImportError:
        return None


def tables_of(
    models: list[str],
    schedulers: list[str],
    steps: list[int],
    methods: list[str],
    settings: Settings,
    reference: int | None,
    output: Path,
) -> list[Table]:
    """A table for each model, scheduler and number of steps. Gates are those of 25 steps."""
    tables = []
    for name, scheduler, number in itertools.product(models, schedulers, dict.fromkeys(steps)):
        gates, tuned = (
            tuple(dict.fromkeys(max(1, round(gate * number / 25)) for gate in given))
            for given in (settings.gates, settings.tuned)
        )
        rows = tuple(entries(methods, number, replace(settings, gates=gates, tuned=tuned), reference))
        tables.append(Table(name, scheduler, number, rows, output / Path(name).name / f"{scheduler}-{number}"))
    return tables


def draw_all(tables: list[Table], texts: list[str], state: Any, console: Console, settings: dict[str, Any]) -> None:
    """Draw what is lacking: this process takes every N-th block."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for table in tables:
            drawing = Drawing(table, texts, settings["batch_size"], settings["seed"])
            own = [block for block in drawing.blocks if block % state.num_processes == state.process_index]
            task = progress.add_task(table.name, total=len(own) * len(table.entries))
            if any(drawing.pending(block) for block in own):
                pipe = load(table.model, table.scheduler, state.device, settings["dtype"])
                drawing.prepare(pipe, call_for(pipe, settings["guidance_scale"]))
            for place, block in enumerate(own):
                for _ in drawing.block(block):
                    progress.advance(task)
                progress.update(task, completed=(place + 1) * len(table.entries))


def report(tables: list[Table], captions: list[str], seed: int, real: Path | None, output: Path, **about: Any) -> Any:
    """Measure, and write JSON, CSV, Markdown, the plot and the sheets."""
    device = about.pop("device")
    extras = Extras(device.type)
    found = {table.name: rows_of(table, captions, seed, real, extras) for table in tables}
    groups: dict[str, list[dict[str, Any]]] = {}
    for table in tables:
        groups.setdefault(f"{Path(table.model).name}, {table.scheduler}", []).extend(found[table.name])
    for group in groups.values():
        compare_with_fewer_steps(group)
        compare_with_caches(group)
    rows = [row for part in found.values() for row in part]
    remarks = notes(rows, device, real, extras)
    versions = {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}}
    write_json(output / "results.json", about | {"versions": versions, "notes": remarks, "rows": rows})
    write_csv(rows, output / "results.csv")
    text = "".join(f"## {name}\n\n{markdown(part)}\n" for name, part in found.items())
    write(output / "results.md", (text + "".join(f"- {remark}\n" for remark in remarks)).encode())
    pareto(found, output / "pareto.png")
    if any(table.reference for table in tables):
        against_reference(groups, output / "reference.png")
    for number, table in enumerate(tables):
        contact_sheet(table, captions, output / f"sheet-{number}.png")
    return found, remarks


def show(console: Console, found: dict[str, list[dict[str, Any]]], remarks: list[str]) -> None:
    """Print the tables."""
    for name, rows in found.items():
        columns = filled(rows)
        lines = [[row["row"], *(cell(row, column) for column in columns)] for row in rows]
        print_table(console, name, ["", *(COLUMNS[column] for column in columns)], lines)
    for remark in remarks:
        console.print(remark, soft_wrap=True, highlight=False, markup=False)


def main(
    output: Annotated[Path, typer.Option(help="Folder for pictures, timings and results.")],
    model: Annotated[list[str] | None, typer.Option(help="Hub id or folder; can be given several times.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(CHOICES)}; all if not given.")] = None,
    scheduler: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(SCHEDULERS)}.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Can be given several times; 25 if not given.")] = None,
    gate_step: Annotated[list[int] | None, typer.Option(min=1, help="Of 25 steps; in proportion for others.")] = None,
    tuned_gate: Annotated[
        list[int] | None, typer.Option(min=1, help="The same for T-GATE v2 and for DeepCache with T-GATE.")
    ] = None,
    cfg_interval: Annotated[list[int] | None, typer.Option(min=1, help="Of 'predict'; 3 if not given.")] = None,
    tolerance: Annotated[
        list[float] | None, typer.Option(min=0, help="Of 'auto', 0.6 if not given, and of 'forecast', 0.2.")
    ] = None,
    cache_interval: Annotated[
        list[int] | None, typer.Option(min=1, help="Of DeepCache and TaylorSeer; 3 if not given.")
    ] = None,
    cache_threshold: Annotated[
        list[float] | None, typer.Option(min=0, help="Of First Block Cache and cache-dit; 0.1 and 0.08 if not given.")
    ] = None,
    reference_steps: Annotated[
        int | None, typer.Option(min=1, help="Also compare every method with the plain picture of this many steps.")
    ] = None,
    captions: Annotated[str, typer.Option(help="'shapes', 'clips', a COCO captions file, or a text file.")] = "shapes",
    count: Annotated[int, typer.Option(min=2, help="Number of captions.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a block.")] = 32,
    real: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Real pictures of one size, for FID.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="3 for 'shapes' and 'clips', else the pipeline's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture number i has seed + i.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Draw with every method, measure, and write tables and plots."""
    methods = one_of("method", list(dict.fromkeys(method or CHOICES)), CHOICES)
    schedulers = one_of("scheduler", scheduler or ["dpm"], SCHEDULERS)
    one_of("device", [device], ("cpu", "cuda"))
    check_device(device)
    check_dtype(dtype)
    if guidance_scale is None and captions in DOMAINS:
        guidance_scale = 3.0
    texts = read_captions(captions, count)
    settings = {"captions": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16], "count": count, "seed": seed}
    settings |= {"batch_size": batch_size, "guidance_scale": guidance_scale, "dtype": dtype}
    # Processes that finish early wait at the end, for as long as the others take.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    claim(output, settings)
    state.wait_for_everyone()
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        clear_parts(output)
        write_json(output / "settings.json", settings)
    state.wait_for_everyone()

    models = list(dict.fromkeys(model or [str(MODEL)]))
    chosen = Settings(
        tuple(gate_step or [3, 5, 8, 10, 15]),
        tuple(tuned_gate or [10]),
        tuple(cfg_interval or [3]),
        tuple(tolerance or ()),
        tuple(cache_interval or [0]),
        tuple(cache_threshold or [0.0]),
    )
    tables = tables_of(models, schedulers, steps or [25], methods, chosen, reference_steps, output)
    console = Console(quiet=not state.is_main_process)
    draw_all(tables, texts, state, console, settings)
    state.wait_for_everyone()
    if state.is_main_process:
        about = {"settings": settings, "hardware": hardware(state.device), "processes": state.num_processes}
        found, remarks = report(tables, texts, seed, real, output, device=state.device, **about)
        show(console, found, remarks)
        console.print(f"Results: {(output / 'results.json').resolve()}", soft_wrap=True)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
