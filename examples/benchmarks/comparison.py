"""
The picture in the README: some prompts without T-GATE, with it, and with T-GATE as published. Same seeds, a row each.

    python -m examples.benchmarks.comparison --output docs/images/comparison.png
"""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DPMSolverMultistepScheduler
from matplotlib.figure import Figure

from examples.benchmarks.loading import MODELS, load_pipeline
from tgate_processors import apply_tgate, remove_tgate

MODEL = MODELS / "emoji-sd"
ROWS: dict[str, dict[str, Any] | None] = {
    "without\nT-GATE": None,
    "apply_tgate(pipe)": {},
    "as published,\ngate_step=8": {"gate_step": 8},
}
# Some that the model draws well, of those that training has not seen.
PROMPTS = [
    "peach on a gray background, Noto style",
    "chicken on a green background, Twemoji style",
    "green heart on a purple background, Noto style",
    "grinning face with smiling eyes on a green background, Noto style",
    "carrot on a yellow background, Noto style",
    "butterfly on a green background, Twemoji style",
]
# Inches at 100 dots each: the width of a README.
SIDE = 1.3


def draw(pipe: Any, seed: int, prompt: str, steps: int) -> np.ndarray:
    """One picture, as numbers from 0 to 1."""
    call = {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "np"}
    picture: np.ndarray = pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]
    return picture


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
        found[name] = np.stack([draw(pipe, seed, prompt, steps) for seed, prompt in enumerate(PROMPTS)])
    return found


def main(
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("comparison.png"),
    steps: Annotated[int, typer.Option(min=1)] = 25,
) -> None:
    """Draw the prompts with every method."""
    figure = Figure(figsize=((len(PROMPTS) + 0.6) * SIDE, (len(ROWS) + 0.6) * SIDE), layout="constrained")
    axes = figure.subplots(len(ROWS), len(PROMPTS))
    for line, (name, pictures) in zip(axes, drawn(steps).items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="bicubic")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)
    for axis, prompt in zip(axes[0], PROMPTS, strict=True):
        axis.set_title("\n".join(textwrap.wrap(prompt, 22)), fontsize=8)
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    typer.run(main)
