"""
How often a pipeline trained by train_shapes.py draws what the prompt says, on prompts never seen in training.

    python -m examples.testbeds.score_shapes
    python -m examples.testbeds.score_shapes --model examples/models/shapes-pixart \
        --scheduler EulerDiscreteScheduler --steps 50
    python -m examples.testbeds.score_shapes --model examples/models/shapes-wan
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.benchmarks.loading import MODELS, check_device, load_pipeline
from examples.benchmarks.tables import check_output, print_table, write_table
from examples.testbeds.shapes.clips import strips
from examples.testbeds.shapes.evaluation import draws_videos, held_out, pictures_of, scores_of, shares
from examples.testbeds.shapes.scorer import Score

TEXT, BORDER = 40, 3


def load(model: str, scheduler: str | None, device: str) -> Any:
    """The pipeline, in float32, with another scheduler if one is named."""
    check_device(device)
    pipe = load_pipeline(model, device, "float32")
    if scheduler is not None:
        kind = getattr(diffusers, scheduler, None)
        if not hasattr(kind, "from_config"):
            raise typer.BadParameter(
                f"scheduler={scheduler!r} is not in diffusers: pass a class such as 'EulerDiscreteScheduler'"
            )
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


def wrapped(text: str, width: int, font: ImageFont.ImageFont) -> str:
    """The text in lines no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def sheet(pictures: np.ndarray, scenes: list[Any], scores: list[Score], columns: int, scale: int = 3) -> Image.Image:
    """Pictures over their prompts; a red frame where the scorer finds them wrong."""
    rows = -(-len(scenes) // columns)
    tall, wide = (scale * side for side in pictures.shape[1:3])
    width, height = wide + 2 * BORDER + 10, tall + 2 * BORDER + TEXT
    paper = Image.new("RGB", (columns * width, rows * height), "white")
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(8)
    for i, (picture, scene, one) in enumerate(zip(pictures, scenes, scores, strict=True)):
        left, top = i % columns * width + 5, i // columns * height + 3
        frame = (left, top, left + wide + 2 * BORDER - 1, top + tall + 2 * BORDER - 1)
        pen.rectangle(frame, fill="lightgrey" if one.right else "red")
        tile = Image.fromarray((picture * 255).round().astype(np.uint8)).resize((wide, tall), Image.Resampling.NEAREST)
        paper.paste(tile, (left + BORDER, top + BORDER))
        pen.text((left, frame[3] + 1), wrapped(scene.caption, width - 6, font), fill="black", font=font, spacing=0)
    return paper


def progress_on(console: Console) -> Progress:
    """A bar that counts pictures and tells the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A batch may take longer than the 30 seconds that rich measures speed over by default.
    return Progress(*columns, console=console, transient=True, speed_estimate_period=3600)


def main(
    model: Annotated[str, typer.Option(help="Folder of a pipeline trained by train_shapes.py.")] = str(
        MODELS / "shapes-sd"
    ),
    one_object: Annotated[
        int, typer.Option(min=0, max=64, help="Captions with one object, or at rest; two pictures each.")
    ] = 64,
    two_objects: Annotated[int, typer.Option(min=0, max=1083, help="Captions with two objects, or that move.")] = 436,
    guidance_scale: Annotated[list[float] | None, typer.Option(help="Can be given several times.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    scheduler: Annotated[
        str | None, typer.Option(help="A scheduler class of diffusers; the pipeline's own if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cuda" if torch.cuda.is_available() else "cpu",
    sheet_file: Annotated[Path | None, typer.Option("--sheet", help="Where a sheet of 40 pictures goes.")] = None,
    output: Annotated[Path | None, typer.Option(help="A file for the table, .csv or .md.")] = None,
) -> None:
    """Score a pipeline's pictures of held-out prompts."""
    check_output(output)
    pipe = load(model, scheduler, device)
    videos = draws_videos(pipe)
    scenes = held_out("wan" if videos else "sd", one_object, two_objects)
    # The easier captions are few: each gets a second picture.
    scenes = scenes[:one_object] + scenes
    guidance_scales = guidance_scale or [1.0, 2.0, 3.0, 4.5]
    title = f"{len(set(scenes))} prompts, {len(scenes)} pictures, {steps} steps, {type(pipe.scheduler).__name__}"
    console, rows = Console(), []
    with progress_on(console) as progress:
        task = progress.add_task("Pictures", total=len(guidance_scales) * len(scenes))
        options = {"num_inference_steps": steps, "batch_size": batch_size, "advance": partial(progress.advance, task)}
        for guidance in guidance_scales:
            pictures = pictures_of(pipe, scenes, guidance_scale=guidance, **options)
            scores = scores_of(pictures, scenes)
            parts = shares(scenes, scores)
            rows.append([f"{guidance:g}", *(f"{share:.1%}" for share in parts.values())])
    headings = ["guidance", *parts]
    print_table(console, title, headings, rows)
    if output is not None:
        write_table(output, headings, rows)
    if sheet_file is not None:
        # The last guidance scale, and prompts of both kinds.
        few, many, columns, scale = (3, 12, 3, 2) if videos else (10, 30, 8, 3)
        chosen = [*range(0, 2 * one_object, 12)][:few] + [*range(2 * one_object, len(scenes), 14)][:many]
        shown = strips(pictures[chosen]) if videos else pictures[chosen]
        sheet(shown, [scenes[i] for i in chosen], [scores[i] for i in chosen], columns, scale).save(sheet_file)


if __name__ == "__main__":
    typer.run(main)
