"""
Pictures with and without T-GATE: prompts and seeds side by side, and what each cost.

    python examples/quickstart.py                                   # the small pipeline of this repository
    python examples/quickstart.py --model stabilityai/stable-diffusion-xl-base-1.0 --device cuda --variant fp16
"""

import inspect
import math
import statistics
import textwrap
import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import torch
import typer
from benchmarks.loading import MODELS, check_device, check_dtype, load_pipeline
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from tgate_processors import TGateSchedule, apply_tgate, get_tgate_report, remove_tgate

MODEL = MODELS / "shapes-sd"
PROMPTS = [
    "a large red circle at the top left, on a white background",
    "a small yellow triangle in the centre, on a black background",
    "a large blue square at the bottom right, on a grey background",
    "a small red circle to the left of a large green square, on a black background",
]
METHODS = ("without T-GATE", "with T-GATE")


def gate(value: str) -> int | float | str:
    """The gate as it is given."""
    if value == "auto":
        return value
    try:
        number = float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a number of steps, a share of them or 'auto'") from None
    return int(number) if number.is_integer() else number


def macs(pipe: Any, call: dict[str, Any]) -> float:
    """Multiply-accumulates of the denoiser's Linear and Conv layers in one call."""
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    with FlopCounterMode(display=False) as counter:
        pipe(**call)
    counts = counter.get_flop_counts()[type(denoiser).__name__]
    # Attention products are left out: torch counts them on some devices only.
    return sum(flops for operation, flops in counts.items() if "attention" not in str(operation)) / 2


def timed(pipe: Any, call: dict[str, Any]) -> tuple[float, Any]:
    """Seconds and picture of one call."""
    wait = torch.cuda.synchronize if pipe.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    image = pipe(**call).images[0]
    wait()
    return time.perf_counter() - start, image


def psnr(one: Any, other: Any) -> float:
    """How near two pictures are to each other, in decibels; infinitely near if they are the same."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other)
    mean = float(np.square(difference).mean())
    return 10 * math.log10(255**2 / mean) if mean else math.inf


def draw(rows: dict[str, list[Any]], output: Path) -> None:
    """One row a prompt, a column for every seed and method."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = len(next(iter(rows.values())))
    figure = plt.figure(figsize=(2.2 * columns, 2.6 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), squeeze=False)[:, 0]
    for part, (prompt, images) in zip(parts, rows.items(), strict=True):
        part.suptitle(textwrap.fill(prompt, 35 * columns), fontsize=10)
        for column, (axis, image) in enumerate(zip(part.subplots(1, columns), images, strict=True)):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(f"seed {column // 2}, {METHODS[column % 2]}", fontsize=8)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def main(
    model: Annotated[str, typer.Option(help="Hub id or folder of a text-to-image pipeline.")] = str(MODEL),
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt; can be given several times.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each prompt.")] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance_scale: Annotated[float | None, typer.Option(help="The pipeline's own default if not given.")] = None,
    gate_step: Annotated[
        Any, typer.Option(parser=gate, metavar="GATE", help="Number of steps, a share of them below 1, or 'auto'.")
    ] = "auto",
    guidance: Annotated[str | None, typer.Option(help="After the gate: drop or predict. 'auto' predicts.")] = None,
    cfg_interval: Annotated[int | None, typer.Option(help="With 'predict', steps between full steps.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="With 'auto', the accepted error.")] = None,
    sp_interval: int = 1,
    fi_interval: int = 1,
    warm_up: int = 0,
    height: int | None = None,
    width: int | None = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    output: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("quickstart.png"),
) -> None:
    """Make pictures with and without T-GATE and show them side by side."""
    check_device(device)
    dtype = check_dtype(dtype or ("float32" if device == "cpu" else "float16"))
    pipe = load_pipeline(model, device, dtype, variant)
    prompts = prompt or PROMPTS
    settings = {
        "gate_step": gate_step,
        "guidance": guidance,
        "cfg_interval": cfg_interval,
        "tolerance": tolerance,
        "sp_interval": sp_interval,
        "fi_interval": fi_interval,
        "warm_up": warm_up,
    }
    options = {"guidance_scale": guidance_scale, "height": height, "width": width}
    if guidance_scale is None and Path(model).resolve().parent == MODEL.resolve().parent:
        options["guidance_scale"] = 3.0
    if "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
        # The size that a model was trained with is one of its bins, or has none.
        options["use_resolution_binning"] = not (height is None and width is None)
    common = {"num_inference_steps": steps, **{name: value for name, value in options.items() if value is not None}}

    def call(text: str, seed: int) -> dict[str, Any]:
        return {"prompt": text, "generator": torch.Generator(device).manual_seed(seed), **common}

    try:
        schedule = TGateSchedule(**settings)
        apply_tgate(pipe, schedule)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    # The first calls warm up and count.
    gated_macs = macs(pipe, call(prompts[0], 0))
    report = get_tgate_report(pipe)
    baseline_macs = macs(remove_tgate(pipe), call(prompts[0], 0))

    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    rows: dict[str, list[Any]] = {text: [] for text in prompts}
    for text, seed in track([(text, seed) for text in rows for seed in range(seeds)], description="Pictures"):
        for method, switch in zip(METHODS, (remove_tgate, lambda p: apply_tgate(p, schedule)), strict=True):
            duration, image = timed(switch(pipe), call(text, seed))
            seconds[method].append(duration)
            rows[text].append(image)
    draw(rows, output)

    ratios = [plain / gated for plain, gated in zip(seconds[METHODS[0]], seconds[METHODS[1]], strict=True)]
    distances = [psnr(*pair) for images in rows.values() for pair in zip(images[::2], images[1::2], strict=True)]
    table = Table(title=f"{len(ratios)} pictures, {report.num_inference_steps} steps: {report.levels}")
    for heading in ("", "seconds", "speed-up", "forwards", "GMACs", "MiB held"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    full, half, forecast = report.full_batch_forwards, report.half_batch_forwards, report.forecast_forwards
    for method, ratio, forwards, count, held in (
        (METHODS[0], 1, f"{full + half + forecast}", baseline_macs, 0),
        (METHODS[1], statistics.median(ratios), f"{full} + {half} half", gated_macs, report.peak_bytes),
    ):
        figures = (f"{statistics.median(seconds[method]):.3f}", f"{ratio:.2f}", forwards)
        table.add_row(method, *figures, f"{count / 1e9:.2f}", f"{held / 2**20:.1f}")
    console = Console(highlight=False)
    console.print(table)
    middle, farthest = statistics.median(distances), min(distances)
    for line in (
        "All figures are for one picture. Seconds are medians, and the speed-up is the median of the pairs.",
        "Of the steps F computes both halves of guidance, H one of them, and - none: it is forecast.",
        "GMACs are those of the denoiser's Linear and Conv layers; MiB held is what T-GATE keeps during the run.",
        f"Pictures with T-GATE beside those without: PSNR {middle:.1f} dB (median), {farthest:.1f} dB (farthest).",
        f"{device}, {dtype}, torch {torch.__version__}",
        f"Pictures: {output.resolve()}",
    ):
        console.print(line, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
