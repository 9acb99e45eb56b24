"""Two vendors' emoji glyphs with their names, read from the npm packages that carry them."""

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 64
VERSION = "16.0.0"
# Style in captions: the vendor in the package's name. Noto is under Apache 2.0, Twemoji under CC BY 4.0.
STYLES = {"Noto": "google", "Twemoji": "twitter"}
KINDS = (
    "food-fruit",
    "food-vegetable",
    "food-sweet",
    "animal-bird",
    "animal-bug",
    "animal-marine",
    "animal-reptile",
    "plant-flower",
    "face-smiling",
    "heart",
)


@dataclass(frozen=True)
class Glyph:
    """What one emoji is called, and the kind of thing that it is."""

    name: str
    # Shorter names, which the packages use as keywords.
    others: tuple[str, ...]
    kind: str
    file: str


def package(style: str, folder: Path) -> Path:
    """The archive of a vendor's package, fetched by npm if it is not in the folder."""
    name = f"emoji-datasource-{STYLES[style]}"
    file = folder / f"{name}-{VERSION}.tgz"
    if not file.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(
                f"{file} is not there and npm is not installed: install npm, or get {name}@{VERSION} another way"
            )
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [npm, "pack", "--silent", "--pack-destination", str(folder.resolve()), f"{name}@{VERSION}"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return file


def listed(entry: dict[str, Any]) -> bool:
    """Whether the testbed has this emoji: of one of the kinds, and drawn by both vendors."""
    return entry["subcategory"] in KINDS and all(entry[f"has_img_{vendor}"] for vendor in STYLES.values())


def spoken(name: str) -> str:
    """A name as a caption has it."""
    return name.lower().replace("_", " ").replace("-", " ")


def glyph(entry: dict[str, Any]) -> Glyph:
    """From an entry of the packages' list."""
    name = spoken(entry["name"])
    others = tuple(other for other in map(spoken, entry["short_names"]) if other != name)
    return Glyph(name, others, entry["subcategory"], entry["image"])


@cache
def read(folder: Path) -> tuple[list[Glyph], dict[str, np.ndarray]]:
    """The glyphs, and their pictures in each style: N x 64 x 64 x 4 bytes, with transparency."""
    pictures = {}
    for style, vendor in STYLES.items():
        found = {}
        with tarfile.open(package(style, folder)) as archive:
            for member in archive:
                if member.name == "package/emoji.json":
                    entries = json.load(archive.extractfile(member))
                elif member.name.startswith(f"package/img/{vendor}/64/"):
                    found[member.name.rpartition("/")[2]] = archive.extractfile(member).read()
        # Both packages have the same list.
        glyphs = [glyph(entry) for entry in sorted(entries, key=lambda entry: entry["unified"]) if listed(entry)]
        images = [Image.open(io.BytesIO(found[one.file])).convert("RGBA") for one in glyphs]
        pictures[style] = np.stack([np.asarray(image) for image in images])
    return glyphs, pictures
