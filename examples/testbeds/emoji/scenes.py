"""A glyph in a style on a background: its captions and its picture."""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .glyphs import SIDE, STYLES, Glyph

BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (160, 160, 160),
    "black": (24, 24, 28),
    "pink": (255, 170, 190),
    "yellow": (250, 225, 120),
    "green": (120, 190, 120),
    "blue": (110, 170, 235),
    "purple": (150, 110, 190),
}
# One in so many is held out of training; each glyph is seen in both styles, but not on every background.
HIDDEN = 8


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `number` is the glyph's."""

    number: int
    glyph: Glyph
    style: str
    background: str

    def called(self, name: str) -> str:
        """A caption with one of the glyph's names."""
        return f"{name} on a {self.background} background, {self.style} style"

    @property
    def caption(self) -> str:
        """The caption with the glyph's full name."""
        return self.called(self.glyph.name)

    @property
    def captions(self) -> list[str]:
        """All captions, the full name's first."""
        return [self.called(name) for name in (self.glyph.name, *self.glyph.others)]

    @property
    def held_out(self) -> bool:
        """Whether training does not see it."""
        return hashlib.sha256(self.caption.encode()).digest()[0] % HIDDEN == 0


def all_scenes(glyphs: list[Glyph]) -> list[Scene]:
    """Each glyph in each style on each background."""
    return [
        Scene(number, glyph, style, background)
        for (number, glyph), style, background in itertools.product(enumerate(glyphs), STYLES, BACKGROUNDS)
    ]


def draw(scene: Scene, glyphs: dict[str, np.ndarray], numbers: torch.Generator) -> np.ndarray:
    """A picture, 64 x 64 x 3 bytes: the glyph a little smaller than its own size and not always in the middle."""
    size, right, down = torch.rand(3, generator=numbers).tolist()
    side = 56 + int(size * 5)
    left, top = (int(place * (SIDE - side + 1)) for place in (right, down))
    # Larger shifts would blur what there is little time to learn.
    middle = (SIDE - side) // 2
    left, top = (min(max(place, middle - 1), middle + 1) for place in (left, top))
    glyph = Image.fromarray(glyphs[scene.style][scene.number]).resize((side, side), Image.Resampling.LANCZOS)
    paper = Image.new("RGBA", (SIDE, SIDE), (*BACKGROUNDS[scene.background], 255))
    paper.alpha_composite(glyph, (left, top))
    return np.asarray(paper.convert("RGB"))
