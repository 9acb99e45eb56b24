"""The domain: scenes of one or two shapes, their captions, their pictures and the split into training and held-out."""

import functools
import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

SIDE = 32
# Pixels a side of the square that a mask is drawn in; its middle is the corner between the four middle pixels.
MASK = 16

COLOURS = {"red": (0.87, 0.1, 0.1), "green": (0.1, 0.65, 0.2), "blue": (0.15, 0.25, 0.9), "yellow": (1.0, 0.9, 0.1)}
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "grey": (0.5, 0.5, 0.5)}
SIZES = {"small": 4.5, "large": 7.0}
SHAPES = ("circle", "square", "triangle")
PLACES = {
    "in the centre": (16, 16),
    "at the top left": (9, 9),
    "at the top right": (23, 9),
    "at the bottom left": (9, 23),
    "at the bottom right": (23, 23),
}
# Where the first and the second object are: x and y of the centres.
RELATIONS = {
    "to the left of": ((8, 16), (24, 16)),
    "to the right of": ((24, 16), (8, 16)),
    "above": ((16, 8), (16, 24)),
    "below": ((16, 24), (16, 8)),
}


@dataclass(frozen=True)
class Thing:
    """An object in a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


def hidden(caption: str) -> bool:
    """Whether training must not see this caption: a fifth of all, by a hash, so that it never changes."""
    return hashlib.sha256(caption.encode()).digest()[0] % 5 == 0


@dataclass(frozen=True)
class Scene:
    """One object at a place, or two with a relation."""

    things: tuple[Thing, ...]
    where: str
    background: str

    @property
    def caption(self) -> str:
        """What the picture shows, in words."""
        first, *rest = map(str, self.things)
        return " ".join((first, self.where, *rest)) + f", on a {self.background} background"

    @property
    def centres(self) -> tuple[tuple[int, int], ...]:
        """X and y of the objects, where nothing moves them."""
        return RELATIONS[self.where] if len(self.things) == 2 else (PLACES[self.where],)

    @property
    def easy(self) -> bool:
        """Whether there is but one object."""
        return len(self.things) == 1

    @property
    def held_out(self) -> bool:
        """Whether training must not see it."""
        return hidden(self.caption)


THINGS = tuple(itertools.starmap(Thing, itertools.product(SIZES, COLOURS, SHAPES)))


@functools.cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene: those with one object, then those with two. Two objects never have the same colour."""
    one = [Scene((thing,), where, ground) for thing in THINGS for where in PLACES for ground in BACKGROUNDS]
    two = [
        Scene((first, second), where, ground)
        for first, second in itertools.product(THINGS, THINGS)
        if first.colour != second.colour
        for where in RELATIONS
        for ground in BACKGROUNDS
    ]
    return (*one, *two)


@functools.cache
def mask(shape: str, size: str, shift_x: float = 0.0, shift_y: float = 0.0) -> torch.Tensor:
    """How much of each pixel of a `MASK` x `MASK` square the shape covers."""
    fine = (torch.arange(MASK * 8) + 0.5) / 8 - MASK / 2
    y, x = torch.meshgrid(fine - shift_y, fine - shift_x, indexing="ij")
    radius = SIZES[size]
    inside = {
        "circle": x**2 + y**2 <= radius**2,
        "square": (x.abs() <= radius) & (y.abs() <= radius),
        # The top is at -radius; each side leaves the middle line by half of the way down.
        "triangle": (y <= radius) & (x.abs() <= (y + radius) / 2),
    }[shape]
    return inside.float().reshape(MASK, 8, MASK, 8).mean((1, 3))


def moved(scene: Scene, generator: torch.Generator) -> list[tuple[int, int]]:
    """The centres, each moved by a pixel or two."""
    reach = torch.tensor([1, 1])
    if len(scene.things) == 2:
        # Across the line that joins the two there is more room.
        reach = torch.tensor([2, 1] if scene.where in ("above", "below") else [1, 2])
    moves = (torch.rand(len(scene.things), 2, generator=generator) * (2 * reach + 1)).long() - reach
    return [(x + int(dx), y + int(dy)) for (x, y), (dx, dy) in zip(scene.centres, moves, strict=True)]


def painted(background: str, things: Iterable[tuple[Thing, tuple[float, float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture, 3 x `SIDE` x `SIDE` from 0 to 1, and for each of its pixels what is there, as a class of `CLASSES`."""
    # Masks may reach over the edge, so there is a margin until the end.
    margin = MASK // 2
    side = SIDE + 2 * margin
    picture = torch.tensor(BACKGROUNDS[background])[:, None, None].repeat(1, side, side)
    classes = torch.full((side, side), CLASSES.index(background))
    for thing, (x, y) in things:
        column, row = int(x), int(y)
        area = (slice(row, row + MASK), slice(column, column + MASK))
        cover = mask(thing.shape, thing.size, x - column, y - row)
        colour = torch.tensor(COLOURS[thing.colour])[:, None, None]
        picture[:, *area] += cover * (colour - picture[:, *area])
        classes[area] = torch.where(cover > 0.5, CLASSES.index(thing), classes[area])
    inside = slice(margin, margin + SIDE)
    return picture[:, inside, inside], classes[inside, inside]


def draw(scene: Scene, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture and its classes."""
    return painted(scene.background, zip(scene.things, moved(scene, generator), strict=True))


CLASSES: tuple[str | Thing, ...] = (*BACKGROUNDS, *THINGS)
