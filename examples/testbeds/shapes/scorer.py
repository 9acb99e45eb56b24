"""Reads a scene back from its picture, by its palette and its masks: nothing here is learned."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, conv2d

from .scenes import BACKGROUNDS, COLOURS, MASK, PLACES, SHAPES, SIDE, SIZES, Scene, Thing, mask

# Pixels of one colour that make an object; what is smaller is a smudge.
LEAST_COVER = 12.0
# Squared difference to the best mask, as a share of that mask: an object that fits no better has no shape.
WORST_FIT = 0.3
# Distance to the nearest background colour beyond which a background has no name.
WORST_GROUND = 0.25


@dataclass(frozen=True)
class Reading:
    """What a picture shows: objects with the x and y of their centres, and the background, "" where it has no name."""

    objects: tuple[tuple[Thing, tuple[float, float]], ...]
    background: str


@dataclass(frozen=True)
class Score:
    """Whether a picture shows the scene of its caption, in all and in parts."""

    layout: bool
    shapes: bool
    sizes: bool
    colours: bool

    @property
    def right(self) -> bool:
        """Whether everything is right."""
        return self.layout and self.shapes and self.sizes and self.colours


@functools.cache
def masks() -> tuple[list[tuple[str, str, float, float]], torch.Tensor]:
    """Every shape and size at four positions within a pixel, and their masks."""
    keys = list(itertools.product(SHAPES, SIZES, (0.0, 0.5), (0.0, 0.5)))
    return keys, torch.stack([mask(*key) for key in keys])


def as_tensor(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Pictures as `output_type="np"` gives them, or N x 3 x 32 x 32, as the latter."""
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, SIDE, SIDE):
        raise ValueError(
            f"pictures of shape {tuple(pictures.shape)} cannot be read: pass N x 3 x {SIDE} x {SIDE} as a tensor or "
            f"N x {SIDE} x {SIDE} x 3 as an array, from 0 to 1"
        )
    return pictures.float()


def covers(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of each pixel each object colour covers, N x colours x 32 x 32, and the colours of the backgrounds."""
    edge = torch.ones(SIDE, SIDE, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    ground = pictures[:, :, edge].median(dim=-1).values
    palette = torch.tensor(list(COLOURS.values()))
    # On the way from the background to a colour, the distance left is the share that is still background.
    distance = (pictures[:, None] - palette[None, :, :, None, None]).norm(dim=2)
    whole = (ground[:, None] - palette[None]).norm(dim=-1)[:, :, None, None]
    share = (1 - distance / whole.clamp(min=1e-3)).clamp(min=0)
    best = share == share.amax(dim=1, keepdim=True)
    # Faint shares are grain in the background, of which there is much.
    return torch.where(best & (share > 0.25), share, 0.0), ground


def read(pictures: np.ndarray | torch.Tensor) -> list[Reading]:
    """The scenes that pictures from 0 to 1 show."""
    cover, ground = covers(as_tensor(pictures))
    keys, templates = masks()
    count, colours = cover.shape[:2]
    flat = cover.reshape(count * colours, 1, SIDE, SIDE)
    # Squared difference of the whole cover to each mask at each place, by the binomial formula.
    product = conv2d(flat, templates[:, None], padding=MASK // 2)
    weight = (templates**2).sum((1, 2))
    misfit = (flat**2).sum((1, 2, 3))[:, None, None, None] + (weight[:, None, None] - 2 * product)
    fit, place = (misfit / weight[:, None, None]).flatten(2).min(-1)
    fit, choice = fit.reshape(count, colours, -1).min(-1)
    place = place.reshape(count, colours, -1).gather(-1, choice[..., None])[..., 0]
    mass = (cover * (cover > 0.5)).sum((2, 3))
    names, rows = list(COLOURS), SIDE + 1

    readings = []
    for i in range(count):
        objects = []
        for j in range(colours):
            if mass[i, j] < LEAST_COVER:
                continue
            shape, size, shift_x, shift_y = keys[int(choice[i, j])]
            y, x = divmod(int(place[i, j]), rows)
            named = float(fit[i, j]) <= WORST_FIT
            thing = Thing(size if named else "", names[j], shape if named else "")
            objects.append((thing, (x + shift_x, y + shift_y)))
        distances = {name: (ground[i] - torch.tensor(value)).norm() for name, value in BACKGROUNDS.items()}
        nearest = min(distances, key=distances.__getitem__)
        readings.append(Reading(tuple(objects), nearest if distances[nearest] < WORST_GROUND else ""))
    return readings


def layout_of(centres: list[tuple[float, float]]) -> str:
    """The name of the place of one centre, or of the relation of the first to the second; "" where there is none."""
    if len(centres) == 1:
        ((x, y),) = centres
        place, (at_x, at_y) = min(PLACES.items(), key=lambda item: (item[1][0] - x) ** 2 + (item[1][1] - y) ** 2)
        return place if max(abs(x - at_x), abs(y - at_y)) <= 3.5 else ""
    (x, y), (other_x, other_y) = centres
    right, down = x - other_x, y - other_y
    if max(abs(right), abs(down)) < 8 or abs(abs(right) - abs(down)) < 4:
        return ""
    if abs(right) > abs(down):
        return "to the right of" if right > 0 else "to the left of"
    return "below" if down > 0 else "above"


def compare(scene: Scene, reading: Reading) -> Score:
    """
    Whether a picture shows a scene.

    Layout: as many objects as there should be, placed as they should be. Objects are told apart by colour, and where
    the colours are wrong, by position. Colours are those of the objects and the background.
    """
    found = {thing.colour: (thing, centre) for thing, centre in reading.objects}
    wanted = [thing.colour for thing in scene.things]
    ground = reading.background == scene.background
    if len(reading.objects) != len(scene.things):
        return Score(False, False, False, ground and set(found) == set(wanted))
    if set(found) == set(wanted):
        ordered = [found[colour] for colour in wanted]
    else:
        ordered = list(reading.objects)
        if len(ordered) == 2 and layout_of([centre for _, centre in ordered]) != scene.where:
            ordered.reverse()
    pairs = list(zip(scene.things, (thing for thing, _ in ordered), strict=True))
    return Score(
        layout=layout_of([centre for _, centre in ordered]) == scene.where,
        shapes=all(one.shape == other.shape for one, other in pairs),
        sizes=all(one.size == other.size for one, other in pairs),
        colours=ground and set(found) == set(wanted),
    )


def score(pictures: np.ndarray | torch.Tensor, scenes: list[Scene]) -> list[Score]:
    """Whether each picture shows its scene."""
    return [compare(scene, reading) for scene, reading in zip(scenes, read(pictures), strict=True)]


def features(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """
    A fixed vector for each picture, N x 112, for a Fréchet distance between sets of pictures.

    How much of each of 4 x 4 cells is near to each of the seven colours of the domain.
    """
    pictures = as_tensor(pictures)
    palette = torch.tensor([*COLOURS.values(), *BACKGROUNDS.values()])
    distance = (pictures[:, None] - palette[None, :, :, None, None]).square().sum(2)
    return avg_pool2d(torch.softmax(-distance / 0.02, dim=1), SIDE // 4).flatten(1)
