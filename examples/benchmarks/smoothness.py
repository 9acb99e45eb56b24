"""
How wrong forecasts and predicted guidance would have been in runs of full steps: the smaller, the smoother a model.

    python -m examples.benchmarks.smoothness --model examples/models/shapes-wan --prompts clips
    python -m examples.benchmarks.smoothness --model examples/models/emoji-sd --guidance-scale 5 \
        --prompts examples/models/emoji-sd/captions.txt
"""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from rich.console import Console

from examples.benchmarks.evaluation.prompts import read_captions
from examples.benchmarks.evaluation.solvers import own_spacing, scheduler_for
from examples.benchmarks.loading import MODELS, load_pipeline
from examples.benchmarks.tables import print_table
from examples.testbeds.shapes.evaluation import call_options
from tgate_processors import apply_tgate, get_tgate_report

# Every error is above it, so every step is full, and measured.
NO_TOLERANCE = 1e-12
PARTS = 3


def main(
    model: Annotated[str, typer.Option(help="A testbed.")] = str(MODELS / "shapes-sd"),
    prompts: Annotated[str, typer.Option(help="'shapes', 'clips', or a text file with a caption a line.")] = "shapes",
    guidance_scale: Annotated[float, typer.Option()] = 5.0,
    captions: Annotated[int, typer.Option(min=2)] = 16,
    steps: Annotated[int, typer.Option(min=9)] = 25,
) -> None:
    """Print the mean errors in each third of the steps, relative to the guided output."""
    pipe = load_pipeline(model, "cpu", "float32")
    config = pipe.scheduler.config
    pipe.scheduler = scheduler_for(config, "dpm-2", own_spacing(config))
    apply_tgate(pipe, tolerance=NO_TOLERANCE)
    call = call_options(pipe) | {
        "guidance_scale": guidance_scale,
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, caption in enumerate(read_captions(prompts, captions)):
        pipe(caption, generator=torch.Generator().manual_seed(number), **call)
        report = get_tgate_report(pipe)
        for name, errors in (("forecast", report.forecast_errors), ("guidance", report.prediction_errors)):
            for step, error in errors:
                found[name][step * PARTS // steps].append(error)
    headings = ["error of", "first third", "second", "last"]
    rows = [[name, *(f"{mean(parts[part]):.3f}" for part in range(PARTS))] for name, parts in found.items()]
    title = f"{Path(model).name}, guidance scale {guidance_scale:g}, {steps} steps, {captions} captions"
    print_table(Console(), title, headings, rows)


if __name__ == "__main__":
    typer.run(main)
