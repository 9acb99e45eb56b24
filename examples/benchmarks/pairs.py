"""Two pictures of one prompt and seed, without T-GATE and with it: how close they are, and where they are saved."""

import math
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from diffusers.utils import export_to_gif
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tgate_processors import TGateReport

METHODS = ("without T-GATE", "with T-GATE")


def psnr(one: Any, other: Any) -> float:
    """How close two pictures or clips are, in decibels; infinitely close if they are the same."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other)
    mean = float(np.square(difference).mean())
    return 10 * math.log10(255**2 / mean) if mean else math.inf


def decibels(value: float) -> str:
    """A distance to be read."""
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


@dataclass
class Pair:
    """What was drawn without T-GATE and with it. A clip has several frames, a picture one."""

    number: int
    prompt: str
    seed: int
    seconds: tuple[float, float]
    pictures: tuple[list[Any], list[Any]]
    report: TGateReport

    @property
    def speed_up(self) -> float:
        """How many times faster T-GATE was."""
        return self.seconds[0] / self.seconds[1]

    @property
    def psnr(self) -> float:
        """How close the two are, in decibels."""
        return psnr(*([np.asarray(frame) for frame in frames] for frames in self.pictures))

    def save(self, folder: Path) -> None:
        """Save both at full size."""
        folder.mkdir(exist_ok=True)
        for method, frames in zip(METHODS, self.pictures, strict=True):
            name = f"prompt {self.number}, seed {self.seed}, {method}".replace(", ", "-").replace(" ", "-")
            if len(frames) == 1:
                frames[0].save(folder / f"{name}.png")
            else:
                export_to_gif(frames, str(folder / f"{name}.gif"), fps=16 if len(frames) > 16 else 4)


def check_output(sheet: Path) -> Path:
    """The folder for single pictures, beside the sheet, once it is known that all of them can be written."""
    known = FigureCanvasAgg(Figure()).get_supported_filetypes()
    if sheet.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"Cannot write {sheet.name!r}: its name must end in .png or another type of picture")
    folder = sheet.with_suffix("")
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        for place in (sheet.parent, folder) if folder.exists() else (sheet.parent,):
            with tempfile.TemporaryFile(dir=place):
                pass
        if sheet.exists():
            with sheet.open("ab"):
                pass
    except OSError as error:
        raise typer.BadParameter(f"Cannot write to {sheet}: {error.strerror}") from error
    return folder


def draw_sheet(pairs: list[Pair], sheet: Path) -> None:
    """One row per prompt, a column for every seed and method; of clips the frame in the middle."""
    rows: dict[int, list[Pair]] = {}
    for pair in pairs:
        rows.setdefault(pair.number, []).append(pair)
    columns = 2 * len(rows[pairs[0].number])
    width, height = pairs[0].pictures[0][0].size
    titles = [textwrap.wrap(row[0].prompt, 17 * columns) for row in rows.values()]
    inches = [2.2 * height / width + 0.3 + 0.2 * len(title) for title in titles]
    figure = Figure(figsize=(2.2 * columns, sum(inches)), layout="constrained")
    parts = figure.subfigures(len(rows), squeeze=False, height_ratios=inches)[:, 0]
    for part, title, row in zip(parts, titles, rows.values(), strict=True):
        part.suptitle("\n".join(title), fontsize=10)
        cells = [(pair.seed, *cell) for pair in row for cell in zip(METHODS, pair.pictures, strict=True)]
        for axis, (seed, method, frames) in zip(part.subplots(1, columns), cells, strict=True):
            axis.imshow(frames[len(frames) // 2])
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"seed {seed}, {method}", fontsize=8)
    figure.savefig(sheet, dpi=100)
