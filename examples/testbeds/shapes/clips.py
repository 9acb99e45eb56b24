"""The domain of the video testbed: one object that moves from place to place or stays, and a scorer of its clips."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from .scenes import BACKGROUNDS, PLACES, THINGS, Thing, hidden, painted
from .scorer import Reading, Score, read

FRAMES = 5
# Pixels, in x and in y, from where an object should be in a frame.
REACH = 3.5


@dataclass(frozen=True)
class Clip:
    """One object on its way from one place to another, or at rest."""

    thing: Thing
    start: str
    end: str
    background: str

    @property
    def caption(self) -> str:
        """What the clip shows, in words."""
        # "at the top left" is the name of the place; one moves from "the top left".
        start, end = (place.split(maxsplit=1)[1] for place in (self.start, self.end))
        way = f"stays {self.start}" if self.easy else f"moves from {start} to {end}"
        return f"{self.thing} {way}, on a {self.background} background"

    @property
    def easy(self) -> bool:
        """Whether the object stays where it is."""
        return self.start == self.end

    @property
    def held_out(self) -> bool:
        """Whether training must not see it."""
        return hidden(self.caption)

    @property
    def path(self) -> list[tuple[float, float]]:
        """X and y of the object in each frame: a straight line at one speed."""
        (x, y), (to_x, to_y) = PLACES[self.start], PLACES[self.end]
        shares = [i / (FRAMES - 1) for i in range(FRAMES)]
        return [(x + share * (to_x - x), y + share * (to_y - y)) for share in shares]


@functools.cache
def all_clips() -> tuple[Clip, ...]:
    """Every clip: those at rest, then those with a movement."""
    ways = sorted(itertools.product(PLACES, PLACES), key=lambda way: way[0] != way[1])
    return tuple(Clip(thing, *way, ground) for way in ways for thing in THINGS for ground in BACKGROUNDS)


def draw_clip(clip: Clip, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Frames, 3 x `FRAMES` x 32 x 32 from 0 to 1, and the classes of the first frame and the last.

    The whole path is moved by a pixel at most.
    """
    right, down = ((torch.rand(2, generator=generator) * 3).long() - 1).tolist()
    frames = [painted(clip.background, [(clip.thing, (x + right, y + down))]) for x, y in clip.path]
    pictures, classes = zip(*frames, strict=True)
    return torch.stack(pictures, 1), torch.stack([classes[0], classes[-1]])


def compare(clip: Clip, readings: list[Reading]) -> Score:
    """Whether every frame shows the object as it should be, near where it should be by then."""
    if any(len(reading.objects) != 1 for reading in readings):
        return Score(False, False, False, False)
    things, centres = zip(*(reading.objects[0] for reading in readings), strict=True)
    return Score(
        layout=all(
            max(abs(x - at_x), abs(y - at_y)) <= REACH for (x, y), (at_x, at_y) in zip(centres, clip.path, strict=True)
        ),
        shapes=all(thing.shape == clip.thing.shape for thing in things),
        sizes=all(thing.size == clip.thing.size for thing in things),
        colours=all(thing.colour == clip.thing.colour for thing in things)
        and all(reading.background == clip.background for reading in readings),
    )


def score_clips(frames: np.ndarray, clips: list[Clip]) -> list[Score]:
    """Whether each clip, N x `FRAMES` x 32 x 32 x 3 as `output_type="np"` gives them, shows what it should."""
    readings = read(frames.reshape(-1, *frames.shape[2:]))
    return [compare(clip, readings[i * FRAMES : (i + 1) * FRAMES]) for i, clip in enumerate(clips)]


def strips(frames: np.ndarray) -> np.ndarray:
    """Clips, N x frames x height x width x 3, as pictures with the frames side by side."""
    count, length, height, width, channels = frames.shape
    return frames.transpose(0, 2, 1, 3, 4).reshape(count, height, length * width, channels)
