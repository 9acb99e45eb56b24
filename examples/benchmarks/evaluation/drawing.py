"""The run: every block by all methods before the next, so that what disturbs the machine disturbs them alike."""

import contextlib
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor

from examples.testbeds.shapes.clips import strips
from examples.testbeds.shapes.evaluation import draws_videos
from tgate_processors import TGateSchedule, estimate_cost, get_tgate_report

from .macs import counted_layers
from .methods import COUNTED, DECIDING, METHODS, Entry, unsuited
from .store import Shelf, write_json


@dataclass(frozen=True)
class Table:
    """One model with one scheduler and one number of steps, and its rows."""

    model: str
    scheduler: str
    steps: int
    entries: tuple[Entry, ...]
    folder: Path

    @property
    def name(self) -> str:
        """In titles."""
        return f"{Path(self.model).name}, {self.scheduler}, {self.steps} steps"

    def shelf(self, entry: Entry) -> Shelf:
        """Where a row keeps what it makes. Tables of one model and scheduler share the reference."""
        if entry.method == "reference":
            return Shelf(self.folder.parent / f"{self.scheduler}-reference-{entry.steps}")
        return Shelf(self.folder / entry.name)

    @property
    def reference(self) -> Entry | None:
        """The row that the others are compared with, besides the baseline."""
        return self.entries[-1] if self.entries[-1].method == "reference" else None


class Drawing:
    """Draws the captions of one table with one pipeline, in fixed blocks."""

    def __init__(self, table: Table, captions: list[str], batch_size: int, seed: int):
        self.table, self.captions, self.batch_size, self.seed = table, captions, batch_size, seed
        self.pipe: Any = None
        self.call: dict[str, Any] = {}
        # Times are compared within one process only.
        self.session = uuid.uuid4().hex[:12]
        self.failed: set[Entry] = set()
        self.levels = ""

    @property
    def blocks(self) -> range:
        """All blocks; which prompts are in one depends on nothing but the batch size."""
        return range(-(-len(self.captions) // self.batch_size))

    def indices(self, block: int) -> range:
        """The prompts of a block."""
        start = block * self.batch_size
        return range(start, min(start + self.batch_size, len(self.captions)))

    def pending(self, block: int) -> list[Entry]:
        """What a block lacks, in an order that turns from block to block; the baseline is timed with the others."""
        runs = [entry for entry in self.table.entries if entry not in self.failed]
        lacking = [entry for entry in runs if not self.table.shelf(entry).done(block)]
        if lacking and runs[0] not in lacking:
            lacking.insert(0, runs[0])
        turn = block % len(lacking) if lacking else 0
        return lacking[turn:] + lacking[:turn]

    def draw(self, entry: Entry, indices: Iterable[int]) -> list[Any]:
        """The pictures of some prompts; each has its own seed."""
        numbers = [torch.Generator("cpu").manual_seed(self.seed + index) for index in indices]
        prompts = [self.captions[index] for index in indices]
        with METHODS[entry.method](self.pipe, entry) as options:
            call = {"generator": numbers, "num_inference_steps": entry.steps, **self.call, **options}
            made = self.pipe(prompts, **call)
            images = strips(made.frames) if draws_videos(self.pipe) else made.images
            # These decide by what it draws.
            self.levels = get_tgate_report(self.pipe).levels if entry.method in DECIDING else ""
        return images

    def prepare(self, pipe: Any, call: dict[str, Any]) -> None:
        """Take a pipeline and draw a picture by every method, untimed: that shows MACs, and what does not run here."""
        self.pipe, self.call = pipe, call
        for entry in self.table.entries:
            shelf = self.table.shelf(entry)
            shelf.make()
            reason = unsuited(entry.method, self.pipe)
            try:
                if reason is None:
                    probe = self.count(entry)
            # The row of a method that fails shows the reason.
            except Exception as error:
                if entry.method in ("baseline", "fewer-steps"):
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if reason is not None:
                self.failed.add(entry)
            write_json(shelf.folder / "probe.json", probe if reason is None else {"error": reason})

    def count(self, entry: Entry) -> dict[str, Any]:
        """MACs of the first picture; where T-GATE decides, those of a full and of a half step."""
        if entry.method in DECIDING and not self.counts(entry):
            tokens = self.call.get("max_sequence_length")
            cost = estimate_cost(self.pipe, TGateSchedule(1), entry.steps, max_sequence_length=tokens)
            return {"full": 2 * cost.full.layers, "half": cost.without_cross_attention.layers}
        numbers = torch.Generator("cpu").manual_seed(self.seed)
        with METHODS[entry.method](self.pipe, entry) as options, counted_layers(denoiser_of(self.pipe)) as total:
            self.pipe(self.captions[:1], generator=numbers, num_inference_steps=entry.steps, **self.call, **options)
        return {"macs": total[0]}

    def counts(self, entry: Entry) -> bool:
        """Whether what a row takes differs from picture to picture, and has to be counted."""
        return entry.method in COUNTED or (entry.method in DECIDING and draws_videos(self.pipe))

    def block(self, block: int) -> Iterator[Entry]:
        """Draw what a block lacks, row by row."""
        for entry in self.pending(block):
            indices = self.indices(block)
            counts = counted_layers(denoiser_of(self.pipe)) if self.counts(entry) else contextlib.nullcontext()
            with counts as total, measured(self.pipe.device) as line:
                images = self.draw(entry, indices)
            if total is not None:
                line["macs"] = total[0]
            line |= {"pictures": len(images), "steps": entry.steps, "full_steps": self.levels.count("F")}
            line["half_steps"] = self.levels.count("H")
            if isinstance(images, np.ndarray):
                images = VaeImageProcessor.numpy_to_pil(images)
            self.table.shelf(entry).add(block, self.session, indices, images, line)
            yield entry


def denoiser_of(pipe: Any) -> Any:
    """The UNet or transformer."""
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds, and on CUDA the peak of the allocated memory."""
    line: dict[str, Any] = {}
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    yield line
    if on_cuda:
        torch.cuda.synchronize(device)
        line["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    line["seconds"] = time.perf_counter() - start
