"""
Pictures with and without T-GATE: prompts and seeds side by side, and what each cost.

    python examples/quickstart.py                                   # the small pipeline of this repository
    python examples/quickstart.py --model stabilityai/stable-diffusion-xl-base-1.0 --device cuda --variant fp16
    python examples/quickstart.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --device cuda --dtype bfloat16 --seeds 1
"""

import inspect
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.loading import MODELS, check_device, check_dtype, load_pipeline
from benchmarks.pairs import METHODS, Pair, check_output, decibels, draw_sheet
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from tgate_processors import TGateSchedule, apply_tgate, get_tgate_report, remove_tgate

MODEL = MODELS / "emoji-sd3"
PROMPTS = [
    "a photo of a red fox in fresh snow, morning light",
    "a watercolour of a harbour at dawn with small fishing boats",
    "an astronaut riding a horse on the moon",
    "a bowl of lemons beside a blue glass vase on a wooden table",
]
SCENES = [
    "a large red circle at the top left, on a white background",
    "a small yellow triangle in the centre, on a black background",
    "a large blue square at the bottom right, on a grey background",
    "a small red circle to the left of a large green square, on a black background",
]
CLIPS = [
    "a large red circle moves from the top left to the centre, on a white background",
    "a small blue square stays in the centre, on a grey background",
    "a large yellow triangle moves from the bottom right to the top right, on a black background",
]
EMOJI = [
    "red apple on a pink background, Noto style",
    "smiling face with halo on a black background, Twemoji style",
    "lady beetle on a yellow background, Noto style",
    "watermelon on a white background, Twemoji style",
]
# What the small pipelines of this repository were trained to draw, and how they are called.
TESTBEDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "shapes-sd": (SCENES, {"guidance_scale": 3.0}),
    "shapes-pixart": (SCENES, {"guidance_scale": 3.0, "max_sequence_length": 24}),
    "shapes-wan": (
        CLIPS,
        {"guidance_scale": 3.0, "max_sequence_length": 24, "height": 32, "width": 32, "num_frames": 5},
    ),
    "emoji-sd": (EMOJI, {"guidance_scale": 5.0}),
    "emoji-sd3": (EMOJI, {"guidance_scale": 5.0, "max_sequence_length": 20}),
}


def gate(value: str) -> int | float | str:
    """The gate as it is given."""
    if value == "auto" or set(value) <= set("FH-"):
        return value
    try:
        number = float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a number of steps, a share of them, 'auto' or a plan") from None
    return int(number) if number.is_integer() else number


@contextmanager
def warned_once() -> Iterator[None]:
    """Within it every warning is shown once, not once per picture."""
    first: dict[str, logging.LogRecord] = {}

    def is_new(record: logging.LogRecord) -> bool:
        return first.setdefault(record.getMessage(), record) is record

    places = [logging.getLogger("tgate_processors"), *logging.getLogger("diffusers").handlers]
    for place in places:
        place.addFilter(is_new)
    try:
        yield
    finally:
        for place in places:
            place.removeFilter(is_new)


def macs(pipe: Any, call: dict[str, Any]) -> float:
    """Multiply-accumulates of the denoiser's Linear and Conv layers in one call."""
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    with FlopCounterMode(display=False) as counter:
        pipe(**call)
    counts = counter.get_flop_counts()[type(denoiser).__name__]
    # Attention products are left out: torch counts them on some devices only.
    return sum(flops for operation, flops in counts.items() if "attention" not in str(operation)) / 2


def timed(pipe: Any, call: dict[str, Any]) -> tuple[float, list[Any]]:
    """Seconds and frames of one call."""
    wait = torch.cuda.synchronize if pipe.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    output = pipe(**call)
    wait()
    seconds = time.perf_counter() - start
    return seconds, list(output.frames[0]) if hasattr(output, "frames") else [output.images[0]]


def tables(pairs: list[Pair], gmacs: tuple[float, float]) -> tuple[Table, Table]:
    """What the pictures cost in the middle, and each pair by itself."""
    report = pairs[0].report
    costs = Table(title=f"{len(pairs)} pairs, {report.num_inference_steps} steps")
    for heading in ("", "seconds", "speed-up", "GMACs", "MiB cached"):
        costs.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    speed_ups = (1.0, statistics.median(pair.speed_up for pair in pairs))
    cached = (0, max(pair.report.peak_bytes for pair in pairs))
    for index, method in enumerate(METHODS):
        seconds = statistics.median(pair.seconds[index] for pair in pairs)
        figures = (f"{seconds:.3f}", f"{speed_ups[index]:.2f}", f"{gmacs[index]:.2f}", f"{cached[index] / 2**20:.1f}")
        costs.add_row(method, *figures)
    single = Table()
    for heading in ("prompt", "seed", "plan", "speed-up", "PSNR"):
        single.add_column(heading, justify="left" if heading == "plan" else "right", overflow="fold")
    for pair in pairs:
        figures = (f"{pair.speed_up:.2f}", decibels(pair.psnr))
        single.add_row(str(pair.number), str(pair.seed), pair.report.levels, *figures)
    return costs, single


def arguments(pipe: Any, model: str, prompts: list[str] | None, given: dict[str, Any]) -> tuple[list[str], dict]:
    """The prompts, and what else every call is given."""
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" not in parameters or "output_type" not in parameters:
        raise typer.BadParameter(f"{type(pipe).__name__} does not draw from a prompt alone")
    is_ours = Path(model).resolve().parent == MODELS.resolve()
    if is_ours:
        torch.set_num_threads(1)  # their tensors are so small that threads would mostly wait for each other
    own, call = TESTBEDS.get(Path(model).resolve().name, (PROMPTS, {})) if is_ours else (PROMPTS, {})
    call = {**call, **{name: value for name, value in given.items() if value is not None}}
    if unknown := call.keys() - parameters.keys():
        raise typer.BadParameter(f"{type(pipe).__name__} has no {', '.join(sorted(unknown))}")
    call["output_type"] = "pil"
    if "use_resolution_binning" in parameters:
        # The size that a model was trained with is one of its bins, or has none.
        call["use_resolution_binning"] = not (call.get("height") is None and call.get("width") is None)
    if "clean_caption" in parameters:
        # It needs two more packages, and prompts are clean here.
        call["clean_caption"] = False
    return prompts or own, call


def compare(
    pipe: Any, settings: dict[str, Any], prompts: list[str], seeds: int, common: dict[str, Any], folder: Path
) -> tuple[list[Pair], tuple[float, float]]:
    """Every prompt and seed without T-GATE and with it, and the GMACs of the first."""

    def call(text: str, seed: int) -> dict[str, Any]:
        return {"prompt": text, "generator": torch.Generator(pipe.device).manual_seed(seed), **common}

    try:
        schedule = TGateSchedule(**settings)
        # The first calls warm up and count.
        gated = macs(apply_tgate(pipe, schedule), call(prompts[0], 0))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    plain = macs(remove_tgate(pipe), call(prompts[0], 0))
    pairs = []
    wanted = [(number, text, seed) for number, text in enumerate(prompts, 1) for seed in range(seeds)]
    for number, text, seed in track(wanted, description="Pictures"):
        both = timed(remove_tgate(pipe), call(text, seed)), timed(apply_tgate(pipe, schedule), call(text, seed))
        pairs.append(Pair(number, text, seed, *zip(*both, strict=True), get_tgate_report(pipe)))
        pairs[-1].save(folder)
    return pairs, (plain / 1e9, gated / 1e9)


def main(
    model: Annotated[str, typer.Option(help="Hub id or folder of a text-to-image or text-to-video pipeline.")] = str(
        MODEL
    ),
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt; can be given several times.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each prompt.")] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance_scale: Annotated[float | None, typer.Option(help="The pipeline's own default if not given.")] = None,
    gate_step: Annotated[
        Any,
        typer.Option(parser=gate, metavar="GATE", help="'auto', steps, a share of them, or a plan such as FFFF-F--FH."),
    ] = "auto",
    guidance: Annotated[str | None, typer.Option(help="After the gate: drop or predict. 'auto' predicts.")] = None,
    cfg_interval: Annotated[int | None, typer.Option(help="With 'predict', steps between full steps.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="With 'auto', the accepted error.")] = None,
    sp_interval: int = 1,
    fi_interval: int = 1,
    warm_up: int = 0,
    height: int | None = None,
    width: int | None = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a clip.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    output: Annotated[
        Path, typer.Option(help="The sheet. Single pictures and clips go into a folder of the same name.")
    ] = Path("quickstart.png"),
) -> None:
    """Make pictures with and without T-GATE and show them side by side."""
    check_device(device)
    dtype = check_dtype(dtype or ("float32" if device == "cpu" else "float16"))
    folder = check_output(output)
    pipe = load_pipeline(model, device, dtype, variant)
    given = {"guidance_scale": guidance_scale, "height": height, "width": width, "num_frames": num_frames}
    prompts, common = arguments(pipe, model, prompt, {"num_inference_steps": steps, **given})
    settings = {
        "gate_step": gate_step,
        "guidance": guidance,
        "cfg_interval": cfg_interval,
        "tolerance": tolerance,
        "sp_interval": sp_interval,
        "fi_interval": fi_interval,
        "warm_up": warm_up,
    }
    with warned_once():
        pairs, gmacs = compare(pipe, settings, prompts, seeds, common, folder)
    draw_sheet(pairs, output)

    console = Console(highlight=False)
    for table in tables(pairs, gmacs):
        console.print(table)
    distances = [pair.psnr for pair in pairs]
    middle, worst = decibels(statistics.median(distances)), decibels(min(distances))
    close = middle if middle == worst == "identical" else f"{middle} median, {worst} worst"
    for line in (
        "Figures are per picture. Seconds and speed-up are medians over all pairs.",
        "GMACs are those of the denoiser's Linear and Conv layers in the first pair.",
        "Plan: F full step, H half of guidance predicted, - forecast without calling the denoiser.",
        f"PSNR of T-GATE pictures against plain ones: {close}.",
        f"The first picture:\n{pairs[0].report}",
        f"{device}, {dtype}, torch {torch.__version__}",
        f"Sheet: {output.resolve()}",
        f"Single {'pictures' if len(pairs[0].pictures[0]) == 1 else 'clips'}: {folder.resolve()}",
    ):
        console.print(line, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
