"""The yardstick's cells: a solver, a spacing, a number of steps and a method, drawn once and kept as JSON."""

import ast
import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from examples.testbeds.shapes.clips import strips
from examples.testbeds.shapes.evaluation import call_options, draws_videos
from tgate_processors import TGateSchedule, apply_tgate, estimate_cost, get_tgate_report, remove_tgate

from .metrics import psnr, right
from .prompts import scenes_of
from .rivals import in_place_of_forward
from .solvers import kind_of, own_spacing, scheduler_for
from .store import write, write_json


@dataclass(frozen=True)
class Cell:
    """One way to draw the captions. The setting of T-GATE is arguments, of a rival a number."""

    solver: str
    spacing: str
    steps: int
    method: str = "plain"
    setting: str = ""

    @property
    def name(self) -> str:
        """A name that is a file's too."""
        return "-".join(str(part) for part in vars(self).values() if part != "")


def arguments(setting: str) -> dict[str, Any]:
    """The arguments of `TGateSchedule` and `apply_tgate` in `tolerance=0.3,guidance=predict`."""
    found = {}
    for part in filter(None, setting.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[name] = value
    return found


@contextlib.contextmanager
def at_work(pipe: Any, cell: Cell) -> Iterator[Any]:
    """The method of a cell for one call; what it yields gives the report after that."""
    if cell.method == "tgate":
        others = arguments(cell.setting)
        names = [field.name for field in dataclasses.fields(TGateSchedule) if field.name in others]
        apply_tgate(pipe, TGateSchedule(**{name: others.pop(name) for name in names}), **others)
        try:
            yield lambda: get_tgate_report(pipe)
        finally:
            remove_tgate(pipe)
    elif cell.method == "plain":
        yield lambda: SimpleNamespace(full_batch_forwards=cell.steps)
    else:
        with in_place_of_forward(pipe, cell.method, float(cell.setting), cell.steps) as rival:
            yield lambda: rival


def counts_of(report: Any, rows: int, saved: float) -> dict[str, float]:
    """
    The forwards of a call, and what they cost in full steps.

    `rows` are those of a full step for one picture, and `saved` is the share of a row's MACs that cross-attention
    takes: forwards of one row that reused it did without.
    """
    names = ("full_batch", "half_batch", "forecast")
    full, half, forecast = (getattr(report, f"{name}_forwards", 0) for name in names)
    reused = getattr(report, "cross_attention_reused", 0)
    return {"full": full, "half": half, "forecast": forecast, "cost": full + (half - reused * saved) / rows}


class Bench:
    """A testbed with captions, and the pictures of many steps that all cells are compared with."""

    def __init__(self, pipe: Any, captions: list[str], guidance_scale: float, seed: int, folder: Path):
        self.pipe, self.captions, self.seed, self.folder = pipe, captions, seed, folder
        self.config = pipe.scheduler.config
        self.scenes = scenes_of(captions)
        self.call = call_options(pipe) | {"guidance_scale": guidance_scale, "output_type": "np"}
        self.rows = 2 if guidance_scale > 1 else 1
        sizes = {name: self.call.get(name) for name in ("max_sequence_length", "height", "width", "num_frames")}
        cost = estimate_cost(pipe, TGateSchedule(1), 2, **sizes)
        self.saved = 1 - cost.without_cross_attention.layers / cost.full.layers
        self.reference: torch.Tensor | None = None

    def draw(self, cell: Cell, indices: list[int]) -> tuple[torch.Tensor, dict[str, float]]:
        """The pictures of some captions in one batch, and what each of them took."""
        self.pipe.scheduler = scheduler_for(self.config, cell.solver, cell.spacing)
        numbers = [torch.Generator().manual_seed(self.seed + index) for index in indices]
        prompts = [self.captions[index] for index in indices]
        with at_work(self.pipe, cell) as report:
            call = self.call | {"generator": numbers, "num_inference_steps": cell.steps}
            made = self.pipe(prompts, **call)
            counts = counts_of(report(), self.rows, self.saved)
        images = torch.from_numpy(strips(made.frames) if draws_videos(self.pipe) else made.images).permute(0, 3, 1, 2)
        # A solver that has left its ground gives no numbers, which is a black picture.
        return images.float().nan_to_num(0.0), counts

    def refer(self, steps: int, batch_size: int) -> None:
        """Draw the pictures of many steps, or read them."""
        file = self.folder / "reference.npy"
        if not file.exists():
            cell = Cell("unipc", own_spacing(self.config), steps)
            parts = [self.draw(cell, part)[0] for part in batches(range(len(self.captions)), batch_size)]
            stream = io.BytesIO()
            np.save(stream, torch.cat(parts).numpy())
            write(file, stream.getvalue())
        self.reference = torch.from_numpy(np.load(file))

    def measure(self, cell: Cell, indices: range, batch_size: int, folder: str = "cells") -> dict[str, Any]:
        """What a cell gives, figures by caption; a plain run that diffusers cannot do has its reason instead."""
        file = self.folder / folder / f"{cell.name}.json"
        if not file.exists():
            try:
                found = self.figures(cell, indices, batch_size)
            except Exception as error:
                if cell.method != "plain":
                    raise
                found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, vars(cell) | {"kind": kind_of(cell.spacing)} | found)
        return json.loads(file.read_text())

    def figures(self, cell: Cell, indices: range, batch_size: int) -> dict[str, list[float]]:
        """Distance to the reference, rightness and cost, by caption."""
        found: dict[str, list[float]] = {}
        for part in batches(indices, batch_size):
            images, counts = self.draw(cell, part)
            own = {name: [value] * len(part) for name, value in counts.items()}
            own["psnr"] = psnr(images, self.reference[part]).tolist()
            scenes = [self.scenes[index] for index in part] if self.scenes else None
            # Nothing reads the pictures of other captions.
            own["right"] = [float(one) for one in right(images, scenes)] if scenes else [math.nan] * len(part)
            for name, values in own.items():
                found.setdefault(name, []).extend(values)
        return found


def batches(indices: range, size: int) -> list[list[int]]:
    """Some captions in parts."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
