"""The Pareto plot and the contact sheet."""

import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from PIL import Image

from .drawing import Table
from .methods import METHODS
from .store import write

MARKS = dict(zip(("baseline", "fewer-steps", "cutoff", "tgate", "tgate-v2"), "*oxsD", strict=True))


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points with none to their right that is higher: no other is faster and better."""
    best, found = float("-inf"), []
    for point in sorted(points, reverse=True):
        if point[1] > best:
            best = point[1]
            found.append(point)
    return found


def save(figure: Any, file: Path) -> None:
    """Write a figure whole or not at all."""
    from matplotlib import pyplot as plt

    stream = io.BytesIO()
    figure.savefig(stream, dpi=80, format="png")
    plt.close(figure)
    write(file, stream.getvalue())


def panel(axis: Any, rows: list[dict[str, Any]], quality: str, label: str) -> None:
    """Speed-up against one quality."""
    shown = [row for row in rows if row["ratio"] and row[quality] is not None]
    for method in dict.fromkeys(row["method"] for row in shown):
        own = [row for row in shown if row["method"] == method]
        places = [row["ratio"] for row in own], [row[quality] for row in own]
        look = {"marker": MARKS.get(method, "^"), "color": f"C{list(METHODS).index(method) % 10}"}
        axis.plot(*places, label=method, linestyle=":" if len(own) > 1 else "", **look)
        for row in own:
            if row["gate"]:
                axis.annotate(row["gate"], (row["ratio"], row[quality]), fontsize=6)
    line = front([(row["ratio"], row[quality]) for row in shown])
    axis.plot(*zip(*line, strict=True) if line else ((), ()), color="lightgrey", zorder=0)
    axis.set_xlabel("speed-up, median of pairs")
    axis.set_ylabel(label)


def panels(groups: dict[str, list[dict[str, Any]]]) -> tuple[Any, list[tuple[Any, Any, list[dict[str, Any]]]]]:
    """A figure, and for each group of rows two axes side by side."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(10, 4 * len(groups)), layout="constrained")
    found = []
    for part, (name, rows) in zip(figure.subfigures(len(groups), squeeze=False)[:, 0], groups.items(), strict=True):
        part.suptitle(name, fontsize=10)
        found.append((*part.subplots(1, 2), rows))
    return figure, found


def pareto(tables: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Two panels a table: how right the pictures are, and how near to the baseline's."""
    figure, found = panels(tables)
    for left, right, rows in found:
        known = any(row["accuracy"] is not None for row in rows)
        panel(left, rows, "accuracy" if known else "clip_score", "share of right pictures" if known else "CLIP score")
        panel(right, rows, "ssim", "SSIM to the baseline")
        right.legend(fontsize=7)
    save(figure, file)


def over_macs(axis: Any, rows: list[dict[str, Any]], quality: str, label: str) -> None:
    """One quality over what a picture takes, with the front of each method; the baseline is one of the plain runs."""
    shown = [row for row in rows if row["macs"] and row[quality] is not None and row["method"] != "reference"]
    kinds = [("fewer-steps" if row["method"] == "baseline" else row["method"]) for row in shown]
    for kind in dict.fromkeys(kinds):
        own = [row for row, of in zip(shown, kinds, strict=True) if of == kind]
        places = sorted((row["macs"] / 1e9, row[quality]) for row in own)
        look = {"marker": MARKS.get(kind, "^"), "color": f"C{list(METHODS).index(kind) % 10}"}
        line = front([(-x, y) for x, y in places])
        axis.plot([-x for x, _ in line], [y for _, y in line], color=look["color"], linewidth=0.8)
        axis.plot(*zip(*places, strict=True), label=kind, linestyle="", markersize=4, **look)
    axis.set_xlabel("GMACs a picture")
    axis.set_ylabel(label)


def against_reference(groups: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Two panels for each model and scheduler: nearness to the reference, and rightness, over what a picture takes."""
    figure, found = panels(groups)
    for left, right, rows in found:
        over_macs(left, rows, "psnr_reference", "PSNR to the picture of many steps")
        over_macs(right, rows, "accuracy", "share of right pictures")
        left.legend(fontsize=7)
    save(figure, file)


def contact_sheet(table: Table, captions: list[str], file: Path, prompts: int = 6, side: int = 96) -> None:
    """A row a prompt, a column for every method that ran."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [number * len(captions) // prompts for number in range(prompts)] if len(captions) > prompts else None
    chosen = chosen or list(range(len(captions)))
    ran = [entry for entry in table.entries if table.shelf(entry).complete(len(captions))]
    figure, axes = plt.subplots(
        len(chosen), len(ran), figsize=(0.95 * len(ran) + 1.8, 1.15 * len(chosen)), squeeze=False, layout="constrained"
    )
    for line, index in zip(axes, chosen, strict=True):
        for axis, entry in zip(line, ran, strict=True):
            image = Image.open(table.shelf(entry).picture(index))
            axis.imshow(image.resize((side, side), Image.Resampling.NEAREST if image.width < side else None))
            axis.set_xticks([])
            axis.set_yticks([])
            if index == chosen[0]:
                axis.set_title(entry.name.replace("-", "\n", 1), fontsize=6)
        line[0].set_ylabel(textwrap.fill(captions[index], 26), fontsize=5, rotation=0, ha="right", va="center")
    figure.suptitle(table.name, fontsize=8)
    save(figure, file)
