"""Pictures and timings on disk: each file is there whole or not at all."""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from PIL import Image


def write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all; processes that write the same file do not meet."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def write_json(file: Path, content: Any) -> None:
    """Likewise, as JSON."""
    write(file, (json.dumps(content, indent=2) + "\n").encode())


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or refuse one that has pictures of other settings: the two would be mixed."""
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"output={str(output)!r} is a file: pass a folder")
    file = output / "settings.json"
    if file.exists():
        earlier = json.loads(file.read_text())
        for name, value in settings.items():
            if earlier.get(name) != value:
                raise typer.BadParameter(
                    f"{name}={value!r}, but the run in {str(output)!r} has {earlier.get(name)!r}: "
                    "pass the same to resume it, or another --output"
                )


def clear_parts(folder: Path) -> None:
    """Remove what a killed run left half written."""
    for part in folder.rglob("*.part"):
        part.unlink()


class Shelf:
    """
    What one row of a table has made: `pictures/00012.png`, a line of timing for each block, and `probe.json`.

    A block is done when its timing is there, which is written after its pictures.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.pictures = folder / "pictures"
        self.timings = folder / "timings"

    def make(self) -> None:
        """Make the folders."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.timings.mkdir(parents=True, exist_ok=True)

    def picture(self, index: int) -> Path:
        """Where the picture of a prompt is."""
        return self.pictures / f"{index:05}.png"

    def done(self, block: int) -> bool:
        """Whether a block is done, in whatever session."""
        return any(self.timings.glob(f"{block:05}-*.json"))

    def add(self, block: int, session: str, indices: Iterable[int], images: list[Image.Image], line: Any) -> None:
        """Keep a block. What another session has drawn stays: then only the time is new."""
        for index, image in zip(indices, images, strict=True):
            if not self.picture(index).exists():
                stream = io.BytesIO()
                image.save(stream, format="PNG")
                write(self.picture(index), stream.getvalue())
        write_json(self.timings / f"{block:05}-{session}.json", line)

    def lines(self) -> dict[tuple[int, str], dict[str, Any]]:
        """All timings, by block and session."""
        found = {}
        for file in sorted(self.timings.glob("*.json")):
            block, session = file.stem.split("-", 1)
            found[int(block), session] = json.loads(file.read_text())
        return found

    def complete(self, count: int) -> bool:
        """Whether every prompt has its picture."""
        return all(self.picture(index).exists() for index in range(count))

    def images(self, indices: Iterable[int]) -> list[Image.Image]:
        """Some pictures."""
        return [Image.open(self.picture(index)).convert("RGB") for index in indices]

    @property
    def probe(self) -> dict[str, Any]:
        """What the first call said: MACs of a picture, or why the method does not run here."""
        file = self.folder / "probe.json"
        return json.loads(file.read_text()) if file.exists() else {}
