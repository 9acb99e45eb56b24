"""What the pictures and timings say: rows, JSON, CSV, Markdown."""

import csv
import io
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.testbeds.shapes.scorer import features

from .drawing import Table
from .methods import Entry
from .metrics import Extras, as_tensor, drawn, finite, frames_of, frechet, mean_of_finite, psnr, readable, right, ssim
from .prompts import scenes_of
from .store import Shelf, write

# Pictures read at a time.
PART = 16

COLUMNS = {
    "seconds": "s/picture",
    "ratio": "ratio",
    "macs": "GMACs",
    "peak_bytes": "peak MiB",
    "accuracy": "right, %",
    "clip_score": "CLIP score",
    "frechet_real": "Fréchet real",
    "frechet_baseline": "Fréchet baseline",
    "fid_real": "FID real",
    "fid_baseline": "FID baseline",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "frechet_reference": "Fréchet reference",
    "psnr_reference": "PSNR reference",
    "ahead": "ahead, dB",
    "ahead_of_cache": "ahead of the cache, dB",
    "lpips": "LPIPS",
}
UNITS = {"macs": 1e9, "peak_bytes": 2**20, "accuracy": 0.01}
FORMS = {
    "frechet_real": ".3f",
    "frechet_baseline": ".3f",
    "frechet_reference": ".3f",
    "ahead": "+.2f",
    "ahead_of_cache": "+.2f",
    "seconds": ".3f",
    "ratio": ".2f",
    "macs": ".2f",
    "peak_bytes": ".0f",
    "accuracy": ".1f",
    "ssim": ".3f",
}


def times(shelf: Shelf, baseline: Shelf) -> dict[str, float | None]:
    """Seconds a picture, and the median of the pairs' ratios: same block, same process."""
    lines, others = shelf.lines(), baseline.lines()
    each = {key: line["seconds"] / line["pictures"] for key, line in lines.items()}
    ratios = [others[key]["seconds"] / line["seconds"] for key, line in lines.items() if key in others]
    peaks = [line["peak_bytes"] for line in lines.values() if "peak_bytes" in line]
    return {
        "seconds": statistics.median(each.values()),
        "ratio": statistics.median(ratios) if ratios else None,
        "peak_bytes": max(peaks, default=None),
    }


def macs(shelf: Shelf) -> float | None:
    """MACs of a picture: of the first one, or the mean where every block decides for itself which steps are full."""
    probe = shelf.probe
    # Blocks that another session has timed again are the same.
    blocks = {block: line for (block, _), line in shelf.lines().items()}.values()
    counted = [line["macs"] / line["pictures"] for line in blocks if "macs" in line]
    if counted:
        return statistics.mean(counted)
    if "full" not in probe:
        return probe.get("macs")
    each = [line["full_steps"] * probe["full"] + line["half_steps"] * probe["half"] for line in blocks]
    return statistics.mean(each) if each else None


class Row:
    """What the pictures of one row say, read part by part: ten thousand large ones do not fit into memory."""

    def __init__(self, table: Table, entry: Entry, captions: list[str]):
        self.shelf, self.baseline = table.shelf(entry), table.shelf(table.entries[0])
        self.reference = table.shelf(table.reference) if table.reference else None
        self.captions = captions
        self.parts = [range(len(captions))[start : start + PART] for start in range(0, len(captions), PART)]
        first = as_tensor(self.shelf.images([0]))
        scenes = scenes_of(captions)
        self.scenes = scenes if readable(first, scenes) else None

    def pairs(self, other: Shelf | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The pictures and the baseline's, or another row's."""
        for part in self.parts:
            yield as_tensor(self.shelf.images(part)), as_tensor((other or self.baseline).images(part))

    def described(self) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """The pictures and their captions."""
        for part in self.parts:
            yield as_tensor(self.shelf.images(part)), [self.captions[index] for index in part]

    def scored(self, real: torch.Tensor) -> dict[str, Any]:
        """What the scorer of the testbeds sees: `real` are the features of real pictures."""
        images, others = (torch.cat(each) for each in zip(*self.pairs(), strict=True))
        own = features(frames_of(images))
        return {
            "accuracy": statistics.mean(right(images, self.scenes)),
            "frechet_real": frechet(own, real),
            "frechet_baseline": frechet(own, features(frames_of(others))),
        }

    def converged(self) -> dict[str, Any]:
        """How near the pictures are to those of many steps."""
        pairs = list(self.pairs(self.reference))
        found = {"psnr_reference": mean_of_finite(torch.cat([psnr(*pair) for pair in pairs]))}
        if self.scenes:
            images, others = (torch.cat(each) for each in zip(*pairs, strict=True))
            found["frechet_reference"] = frechet(features(frames_of(images)), features(frames_of(others)))
        return found

    def compared(self) -> dict[str, Any]:
        """How near the pictures are to the baseline's."""
        peaks, likeness = zip(*((psnr(*pair), ssim(*pair)) for pair in self.pairs()), strict=True)
        return {"psnr": mean_of_finite(torch.cat(peaks)), "ssim": float(torch.cat(likeness).mean())}


def measure_row(
    table: Table, entry: Entry, captions: list[str], seed: int, real: Path | None, extras: Extras
) -> dict[str, Any]:
    """All columns of one row."""
    row = Row(table, entry, captions)
    found: dict[str, Any] = times(row.shelf, row.baseline) | {"pictures": len(captions)}
    found["macs"] = macs(row.shelf)
    if row.scenes:
        found |= row.scored(features(frames_of(drawn(row.scenes, seed))))
    else:
        found["clip_score"] = extras.clip_score(row.described)
    found["fid_real"] = extras.fid(row.shelf.pictures, real)
    if table.reference not in (None, entry) and row.reference.complete(len(captions)):
        found |= row.converged()
    if entry == table.entries[0]:
        # Its distance to itself says nothing.
        found["frechet_baseline"] = None
    else:
        found |= row.compared()
        found["lpips"] = extras.lpips(row.pairs)
        found["fid_baseline"] = extras.fid(row.shelf.pictures, row.baseline.pictures)
    return {name: finite(value) for name, value in found.items()}


def rows_of(table: Table, captions: list[str], seed: int, real: Path | None, extras: Extras) -> list[dict[str, Any]]:
    """The rows of a table; a method that does not run here has its reason in place of numbers."""
    rows = []
    for entry in table.entries:
        shelf = table.shelf(entry)
        row: dict[str, Any] = {"model": table.model, "scheduler": table.scheduler, "steps": table.steps}
        row |= {"row": entry.name, "method": entry.method, "own_steps": entry.steps, "gate": entry.gate or None}
        row |= {"interval": entry.interval or None, "tolerance": entry.tolerance or None, "cache": entry.cache or None}
        row |= {"pictures": 0, **dict.fromkeys(COLUMNS), "error": shelf.probe.get("error")}
        if shelf.complete(len(captions)):
            row |= measure_row(table, entry, captions, seed, real, extras)
        rows.append(row)
    return rows


def compare_with_fewer_steps(rows: list[dict[str, Any]]) -> None:
    """
    How many decibels nearer to the reference a row is than the plain pipeline with as many MACs, between two of whose
    numbers of steps it lies. Rows of one model and scheduler with all their numbers of steps go in together.
    """
    plain = [row for row in rows if row["method"] in ("baseline", "fewer-steps")]
    for row in rows:
        row["ahead"] = _ahead(row, plain)


def compare_with_caches(rows: list[dict[str, Any]]) -> None:
    """The same for a cache together with T-GATE, against that cache alone, between two of its settings."""
    for row in rows:
        if row["method"].endswith("-auto"):
            alone = row["method"].removesuffix("-auto")
            row["ahead_of_cache"] = _ahead(row, [other for other in rows if other["method"] in (alone, "baseline")])


def _ahead(row: dict[str, Any], others: list[dict[str, Any]]) -> float | None:
    """Decibels that a row is nearer to the reference than others with as many MACs."""
    points = sorted({other["macs"]: other["psnr_reference"] for other in others if other["psnr_reference"]}.items())
    if row["psnr_reference"] is None or len(points) < 2 or not points[0][0] <= row["macs"] <= points[-1][0]:
        return None
    return float(row["psnr_reference"] - np.interp(row["macs"], *zip(*points, strict=True)))


def notes(rows: list[dict[str, Any]], device: torch.device, real: Path | None, extras: Extras) -> list[str]:
    """Why columns and rows are empty."""
    found = sorted(extras.notes.values())
    if device.type != "cuda":
        found.append("Peak memory was not measured: torch counts it on CUDA only.")
    if real is None:
        found.append("FID against real pictures was not measured: pass their folder with --real.")
    if any(row["accuracy"] is None and not row["error"] for row in rows):
        found.append("The share of right pictures is known only for pictures and captions of the testbeds.")
    errors = {f"{row['row']} ({row['model']}): {row['error']}" for row in rows if row["error"]}
    return found + sorted(errors)


def cell(row: dict[str, Any], name: str) -> str:
    """A figure in print."""
    value = row[name]
    return "" if value is None else f"{value / UNITS.get(name, 1):{FORMS.get(name, '.2f')}}"


def filled(rows: list[dict[str, Any]]) -> list[str]:
    """The columns that are not empty."""
    return [name for name in COLUMNS if any(row[name] is not None for row in rows)]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table for a page."""
    names = filled(rows)
    lines = ["| | " + " | ".join(COLUMNS[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        if not row["error"]:
            lines.append(f"| `{row['row']}` | " + " | ".join(cell(row, name) for name in names) + " |")
    return "\n".join(lines) + "\n"


def write_csv(rows: list[dict[str, Any]], file: Path) -> None:
    """All figures in full."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write(file, stream.getvalue().encode())
