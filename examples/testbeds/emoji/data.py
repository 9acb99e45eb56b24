"""Training batches: glyphs on backgrounds, as pictures and as latents, and captions that are sometimes left out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from examples.testbeds.shapes.stages import generator

from . import glyphs
from .networks import CHANNELS, LATENT_SIDE, PATCH
from .scenes import Scene, all_scenes, draw

# Captions left empty, for guidance, and captions with one of the shorter names.
EMPTY = 0.1
SHORTER = 0.2


@dataclass
class Drawn:
    """Training scenes, each drawn `copies` times: number `i` has the pictures from `i * copies` on."""

    scenes: list[Scene]
    copies: int
    pictures: torch.Tensor
    mean: torch.Tensor
    components: torch.Tensor
    latents: torch.Tensor


def everything(packages: Path) -> list[Scene]:
    """All that the model can be asked for."""
    return all_scenes(glyphs.read(packages)[0])


def images(pictures: torch.Tensor) -> torch.Tensor:
    """Bytes to -1 to 1."""
    return pictures.float() / 127.5 - 1


def squares(pictures: torch.Tensor) -> torch.Tensor:
    """The pixels of each square: N x 3 x 64 x 64 bytes to N x 8 x 8 x 192 numbers."""
    return torch.nn.functional.pixel_unshuffle(images(pictures), PATCH).permute(0, 2, 3, 1)


def components_of(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The mean of the squares, and their principal components with lengths that bring all latents to a deviation of one.

    Each component is divided by the root of its deviation: between pixels as they are, where the finer components would
    drown in noise, and equal deviations, where noise and detail would weigh as much as the outline.
    """
    found = squares(pictures).flatten(0, 2)
    mean = found.mean(0)
    values, vectors = torch.linalg.eigh((found - mean).T.double() @ (found - mean).double() / len(found))
    deviations = values.flip(0)[:CHANNELS].sqrt()
    # The sign of an eigenvector is anyone's guess.
    chosen = vectors.flip(1)[:, :CHANNELS].T
    chosen = chosen * chosen.sum(1, keepdim=True).sign()
    return mean, (chosen / deviations.sqrt()[:, None] / deviations.mean().sqrt()).float()


def drawn(packages: Path, seed: int, copies: int, every: int = 1) -> Drawn:
    """All scenes that training may see, or one in `every`."""
    vendors = glyphs.read(packages)[1]
    scenes = [scene for scene in everything(packages) if not scene.held_out][::every]
    numbers = generator(seed, "drawing")
    pictures = np.stack([draw(scene, vendors, numbers) for scene in scenes for _ in range(copies)])
    shown = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    mean, components = components_of(shown[:: -(-len(shown) // 4000)])
    latents = [(squares(part) - mean) @ components.T for part in shown.split(512)]
    return Drawn(scenes, copies, shown, mean, components, torch.cat(latents).permute(0, 3, 1, 2).contiguous())


class Batches:
    """Makes the batches of each stage from random numbers."""

    def __init__(self, data: Drawn, encode: Callable[[list[str]], torch.Tensor], size: int):
        self.data = data
        self.size = size
        self.full = encode([scene.captions[0] for scene in data.scenes])
        self.shorter = encode([scene.captions[-1] for scene in data.scenes])
        self.empty = encode([""])

    def pick(self, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions, and numbers of pictures that show what they say."""
        count, chance = len(self.data.scenes), torch.rand(self.size, generator=numbers)
        scenes = (torch.rand(self.size, generator=numbers) * count).long()
        copies = (torch.rand(self.size, generator=numbers) * self.data.copies).long()
        tokens = torch.where((chance < SHORTER)[:, None], self.shorter[scenes], self.full[scenes])
        return tokens, scenes * self.data.copies + copies

    def questions(self, numbers: torch.Generator, _done: float) -> tuple[torch.Tensor, ...]:
        """For the text encoder: captions and latents."""
        tokens, chosen = self.pick(numbers)
        return tokens, self.data.latents[chosen]

    def encoded(self, numbers: torch.Generator, _done: float) -> tuple[torch.Tensor, ...]:
        """For the decoder: latents, noise, pictures."""
        _, chosen = self.pick(numbers)
        noise = torch.randn(self.size, CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=numbers)
        return self.data.latents[chosen], noise, images(self.data.pictures[chosen])

    def noisy(self, numbers: torch.Generator, _done: float) -> tuple[torch.Tensor, ...]:
        """For the denoiser: latents, noise, steps, captions."""
        tokens, chosen = self.pick(numbers)
        noise = torch.randn(self.size, CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=numbers)
        # One step out of each of as many equal parts: the loss then depends less on the draw.
        even = (torch.arange(self.size) + torch.rand(self.size, generator=numbers)) / self.size
        steps = (even * 1000).long().clamp(max=999)
        empty = torch.rand(self.size, generator=numbers) < EMPTY
        return self.data.latents[chosen], noise, steps, torch.where(empty[:, None], self.empty, tokens)
