"""The plots of quality over cost, and the contact sheet."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

from .drawing import Table
from .methods import Entry
from .metrics import as_tensor, readable, right
from .prompts import scenes_of
from .store import write

# A colour and a marker for each method: what is plain in black and grey, what is ours in blue and orange.
LOOKS = {
    "baseline": ("*", "black"),
    "fewer-steps": ("o", "dimgrey"),
    "reference": (".", "darkgrey"),
    "auto": ("^", "navy"),
    "forecast": ("3", "blue"),
    "predict": ("P", "dodgerblue"),
    "tgate": ("s", "darkorange"),
    "tgate-v2": ("D", "goldenrod"),
    "deepcache-tgate": ("<", "teal"),
    "deepcache": ("v", "limegreen"),
    "deepcache-auto": ("4", "darkgreen"),
    "cutoff": ("x", "saddlebrown"),
    "tome": (">", "olive"),
    "taylorseer": ("1", "crimson"),
    "taylorseer-auto": ("2", "firebrick"),
    "first-block-cache": ("p", "darkviolet"),
    "first-block-cache-auto": ("H", "rebeccapurple"),
    "cache-dit": ("h", "hotpink"),
    "cache-dit-auto": ("8", "mediumvioletred"),
    "pyramid-attention-broadcast": ("d", "indigo"),
    "faster-cache": ("X", "salmon"),
    "mag-cache": ("+", "darkred"),
}
# A page shows a figure about 800 pixels wide, so that a point of type is 1.4 pixels.
WIDTH, DPI = 8, 100
PROMPTS = 5
# The columns of a sheet: the first six of these that ran.
SHEET = (
    "baseline",
    "fewer-steps",
    "forecast",
    "auto",
    "tgate",
    "deepcache",
    "deepcache-tgate",
    "taylorseer",
    "first-block-cache",
)
SHEET += ("predict", "tgate-v2", "cutoff", "cache-dit", "tome")
COLUMNS = 6
# Where plain runs place their times.
TIMES = {"offered": "times that diffusers offers", "by hand": "times chosen by hand"}


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
    figure.savefig(stream, dpi=DPI, format="png")
    plt.close(figure)
    write(file, stream.getvalue())


def steps_of_equal_cost(axis: Any, rows: list[dict[str, Any]], column: str, unit: float = 1) -> None:
    """A line for each number of steps of the plain pipeline: what lies on it costs as much."""
    plain = {row["own_steps"]: row[column] / unit for row in rows if row["method"] in ("baseline", "fewer-steps")}
    for steps, place in plain.items():
        axis.axvline(place, color="lightgrey", linewidth=0.8, zorder=0)
        top = axis.get_xaxis_transform()
        axis.text(place, 1.01, steps, transform=top, fontsize=7, color="dimgrey", ha="center", va="bottom")
    axis.set_title("as much as so many plain steps", fontsize=7, color="dimgrey", pad=14)


def mark(axis: Any, method: str, points: list[tuple[float, float]], labels: Iterable[Any] = ()) -> None:
    """The points of a method, with labels beside them."""
    marker, colour = LOOKS[method]
    size = 10 if marker in "*1" else 6
    axis.plot(*zip(*points, strict=True), label=method, linestyle="", marker=marker, color=colour, markersize=size)
    for point, label in zip(points, labels, strict=False):
        if label:
            place = {"xytext": (5, 4), "textcoords": "offset points"}
            axis.annotate(f"{label:g}", point, fontsize=7, color=colour, **place)


def panel(axis: Any, rows: list[dict[str, Any]], quality: str, label: str) -> None:
    """Speed-up against one quality."""
    shown = [row for row in rows if row["ratio"] and row[quality] is not None]
    for method in [method for method in LOOKS if any(row["method"] == method for row in shown)]:
        own = [row for row in shown if row["method"] == method]
        points = [(row["ratio"], row[quality]) for row in own]
        if len(own) > 1:
            axis.plot(*zip(*sorted(points), strict=True), color=LOOKS[method][1], linewidth=0.8, zorder=1)
        mark(axis, method, points, [row["gate"] or row["cache"] or row["tolerance"] for row in own])
    steps_of_equal_cost(axis, shown, "ratio")
    axis.set_xlabel("speed-up, median of pairs")
    axis.set_ylabel(label)


def panels(groups: dict[str, list[dict[str, Any]]]) -> tuple[Any, list[tuple[Any, Any, Any, list[dict[str, Any]]]]]:
    """A figure, and for each group of rows its part with two axes side by side."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(WIDTH, 4.6 * len(groups)), layout="constrained")
    found = []
    for part, (name, rows) in zip(figure.subfigures(len(groups), squeeze=False)[:, 0], groups.items(), strict=True):
        part.suptitle(name, fontsize=10)
        found.append((part, *part.subplots(1, 2), rows))
    return figure, found


def legend(part: Any, *axes: Any) -> None:
    """One legend for both axes, below them."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = [method for method in LOOKS if method in found]
    part.legend([found[name] for name in names], names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def pareto(tables: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Two panels a table: how right the pictures are, and how near to the baseline's."""
    figure, found = panels(tables)
    for part, left, right_hand, rows in found:
        known = any(row["accuracy"] is not None for row in rows)
        panel(left, rows, "accuracy" if known else "clip_score", "share of right pictures" if known else "CLIP score")
        panel(right_hand, rows, "ssim", "SSIM to the baseline")
        legend(part, left, right_hand)
    save(figure, file)


def over_macs(axis: Any, rows: list[dict[str, Any]], quality: str, label: str) -> None:
    """One quality over what a picture takes, with the front of each method; the baseline is one of the plain runs."""
    shown = [row for row in rows if row["macs"] and row[quality] is not None and row["method"] != "reference"]
    kinds = [("fewer-steps" if row["method"] == "baseline" else row["method"]) for row in shown]
    for kind in [method for method in LOOKS if method in kinds]:
        own = [row for row, of in zip(shown, kinds, strict=True) if of == kind]
        places = sorted((row["macs"] / 1e9, row[quality]) for row in own)
        line = front([(-x, y) for x, y in places])
        axis.plot([-x for x, _ in line], [y for _, y in line], color=LOOKS[kind][1], linewidth=0.8, zorder=1)
        mark(axis, kind, places)
    steps_of_equal_cost(axis, shown, "macs", 1e9)
    axis.set_xlabel("GMACs a picture")
    axis.set_ylabel(label)


def against_reference(groups: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Two panels for each model and scheduler: nearness to the reference, and rightness, over what a picture takes."""
    figure, found = panels(groups)
    for part, left, right_hand, rows in found:
        over_macs(left, rows, "psnr_reference", "PSNR to the picture of many steps")
        over_macs(right_hand, rows, "accuracy", "share of right pictures")
        legend(part, left, right_hand)
    save(figure, file)


def over_cost(fronts: Any, compared: Any, file: Path) -> None:
    """Distance over cost: the best plain runs as a line for each kind of spacing, and T-GATE's with their steps."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    for (kind, own), style in zip(fronts.groupby("kind", sort=False), ("-o", ":."), strict=False):
        axis.plot(own.cost, own.psnr, style, color="dimgrey", markersize=5, label=f"best plain run, {TIMES[kind]}")
    gated = compared[compared.method == "tgate"]
    for (run, own), marker in zip(gated.groupby("run", sort=False), "^sDvP<Xph", strict=False):
        (line,) = axis.plot(own.cost, own.psnr, linestyle="", marker=marker, markersize=7, label=f"T-GATE, {run}")
        for place in own.itertuples():
            where = {"xytext": (5, -9), "textcoords": "offset points"}
            axis.annotate(place.steps, (place.cost, place.psnr), fontsize=7, color=line.get_color(), **where)
    axis.set_xlabel("cost of a picture, in full steps (beside the points of T-GATE: steps of the run)")
    axis.set_ylabel("PSNR to the converged picture, dB")
    axis.grid(color="lightgrey", linewidth=0.5)
    axis.legend(fontsize=8, frameon=False)
    save(figure, file)


def chosen_for_sheet(ran: list[Entry]) -> list[Entry]:
    """One row of the table for each method, the middle one of its settings, and no more than a page shows."""
    own = ([entry for entry in ran if entry.method == method] for method in SHEET)
    return [entries[len(entries) // 2] for entries in own if entries][:COLUMNS]


def contact_sheet(table: Table, captions: list[str], file: Path) -> None:
    """A row a prompt, a column for each method; a red frame where the scorer finds that a picture is wrong."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    number = min(PROMPTS, len(captions))
    chosen = [place * len(captions) // number for place in range(number)]
    ran = chosen_for_sheet([entry for entry in table.entries if table.shelf(entry).complete(len(captions))])
    scenes = scenes_of([captions[index] for index in chosen])
    # In inches: a picture, the prompt above it, and the titles above all.
    side, line, head = WIDTH / COLUMNS * 0.94, 0.3, 0.85
    height = number * (side + line) + head - line
    figure, axes = plt.subplots(number, COLUMNS, figsize=(WIDTH, height), squeeze=False)
    figure.subplots_adjust(0.01, 0.1 / height, 0.99, 1 - head / height + 0.1 / height, 0.06, line / side)
    for axis in axes[:, len(ran) :].flat:
        axis.set_axis_off()
    for place, (row, index) in enumerate(zip(axes, chosen, strict=True)):
        row[0].annotate(captions[index], (0, 1), (0, 4), "axes fraction", "offset points", fontsize=9)
        for axis, entry in zip(row, ran, strict=False):
            images = table.shelf(entry).images([index])
            picture = as_tensor(images)
            wrong = readable(picture, scenes) and not right(picture, [scenes[place]])[0]
            axis.imshow(images[0], interpolation="nearest" if images[0].height < 100 else None)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="red" if wrong else "lightgrey", linewidth=4 if wrong else 1)
    for axis, entry in zip(axes[0], ran, strict=False):
        middle = {"fontsize": 8, "fontweight": "bold", "ha": "center"}
        axis.annotate(entry.name, (0.5, 1), (0, 20), "axes fraction", "offset points", **middle)
    frames = "; in red frames: not what the prompt says" if scenes else ""
    figure.text(0.5, 1 - 0.2 / height, f"{table.name}{frames}", fontsize=10, ha="center")
    save(figure, file)
