"""
The picture in the README: some prompts without T-GATE, with it, and with T-GATE as published. Same seeds, a row each.

    python -m examples.benchmarks.comparison --output docs/images/comparison.png
"""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from diffusers import DPMSolverMultistepScheduler
from matplotlib.figure import Figure

from examples.benchmarks.loading import MODELS, load_pipeline
from examples.testbeds.shapes.evaluation import held_out_scenes, pictures_of
from tgate_processors import apply_tgate, remove_tgate

MODEL = MODELS / "shapes-pixart"
ROWS: dict[str, dict[str, Any] | None] = {
    "without\nT-GATE": None,
    "apply_tgate(pipe)": {},
    "as published,\ngate_step=8": {"gate_step": 8},
}
# Scenes at equal distances, so that they are of several kinds.
SCENES = held_out_scenes(14, 70)[5::14]
# Inches at 100 dots each: the width of a README.
SIDE = 1.3


def drawn(steps: int) -> dict[str, np.ndarray]:
    """The pictures of every row."""
    pipe = load_pipeline(str(MODEL), "cpu", "float32")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for name, settings in ROWS.items():
        remove_tgate(pipe)
        if settings is not None:
            apply_tgate(pipe, **settings)
        found[name] = pictures_of(pipe, SCENES, batch_size=1, num_inference_steps=steps, guidance_scale=3.0)
    return found


def main(
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("comparison.png"),
    steps: Annotated[int, typer.Option(min=1)] = 25,
) -> None:
    """Draw the prompts with every method."""
    figure = Figure(figsize=((len(SCENES) + 0.6) * SIDE, (len(ROWS) + 0.6) * SIDE), layout="constrained")
    axes = figure.subplots(len(ROWS), len(SCENES))
    for line, (name, pictures) in zip(axes, drawn(steps).items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)
    for axis, scene in zip(axes[0], SCENES, strict=True):
        axis.set_title("\n".join(textwrap.wrap(scene.caption, 22)), fontsize=8)
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    typer.run(main)
