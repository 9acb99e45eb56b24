"""Training batches: drawn pictures, what is where in them, and captions that are sometimes wrong."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL

from .clips import Clip, all_clips, draw_clip
from .networks import CHANNELS
from .scenes import Scene, all_scenes, draw
from .stages import generator
from .tokens import encode

# Share of batches' scenes with one object, and of clips at rest: they are the easier ones.
EASY = 0.3
# Captions left empty, for guidance; and from CLEAN on, captions of another scene, and captions that miss a word.
EMPTY = 0.1
WRONG = 0.25
MISSING = 0.1
# Share of training with right captions only: what a noisy caption says is learned after what a caption says.
CLEAN = 0.6


@dataclass
class Drawn:
    """Training scenes or clips, each drawn `copies` times: number `i` has the pictures from `i * copies` on."""

    scenes: list[Scene] | list[Clip]
    copies: int
    pictures: torch.Tensor
    classes: torch.Tensor
    latents: torch.Tensor | None = None

    @property
    def easy(self) -> int:
        """Number of easier scenes; they come first."""
        return sum(scene.easy for scene in self.scenes)

    def choose(self, count: int, numbers: torch.Generator) -> torch.Tensor:
        """Numbers of scenes, `EASY` of them easier ones."""
        easier = torch.rand(count, generator=numbers) < EASY
        among = torch.where(easier, self.easy, len(self.scenes) - self.easy)
        return (torch.rand(count, generator=numbers) * among).long() + torch.where(easier, 0, self.easy)


def everything(model: str) -> tuple[Scene, ...] | tuple[Clip, ...]:
    """All that a model can be asked for."""
    return all_clips() if model == "wan" else all_scenes()


def drawn(model: str, seed: int, copies: int, every: int = 1) -> Drawn:
    """All scenes or clips that training may see, or one in `every`."""
    scenes = [scene for scene in everything(model) if not scene.held_out][::every]
    numbers = generator(seed, "drawing")
    pictures, classes = [], []
    for scene in scenes:
        for _ in range(copies):
            picture, labels = (draw_clip if isinstance(scene, Clip) else draw)(scene, numbers)
            pictures.append((picture * 255).round().byte())
            # One class for each place of the latents.
            classes.append(labels[..., 2::4, 2::4].byte())
    return Drawn(scenes, copies, torch.stack(pictures), torch.stack(classes))


def images(pictures: torch.Tensor) -> torch.Tensor:
    """Bytes to -1 to 1."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def encode_pictures(data: Drawn, vae: AutoencoderKL) -> None:
    """Keep the latents of all pictures and set the autoencoder's scale, so that they have a deviation of one."""
    device = next(vae.parameters()).device
    means = [vae.encode(images(part).to(device)).latent_dist.mean.cpu() for part in data.pictures.split(512)]
    data.latents = torch.cat(means)
    if data.latents.ndim == 5:
        # Wan's autoencoder has a mean and a deviation for each channel.
        parts = {"latents_mean": data.latents.mean((0, 2, 3, 4)), "latents_std": data.latents.std((0, 2, 3, 4))}
        parts = {name: [round(float(value), 4) for value in values] for name, values in parts.items()}
        vae.register_to_config(**parts)
        mean, deviation = (torch.tensor(values)[:, None, None, None] for values in parts.values())
        data.latents = (data.latents - mean) / deviation
    else:
        vae.register_to_config(scaling_factor=round(1 / float(data.latents.std()), 4))
        data.latents *= vae.config.scaling_factor


def latent_shape(size: torch.Size) -> tuple[int, ...]:
    """What the autoencoders make of pictures or of frames: eight channels, a quarter of each side, half of the time."""
    *frames, height, width = size
    return (CHANNELS, *(1 + (count - 1) // 2 for count in frames), height // 4, width // 4)


class Batches:
    """Makes the batches of each stage from random numbers and how much of the stage is done, from 0 to 1."""

    def __init__(self, data: Drawn, tokenizer: Any, size: int):
        self.data = data
        self.size = size
        self.tokens = encode(tokenizer, [scene.caption for scene in data.scenes])
        self.empty = encode(tokenizer, [""])
        self.pad = tokenizer.pad_token_id
        self.lengths = (self.tokens != self.pad).sum(1)

    def pick(self, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of scenes and of pictures that show them."""
        scenes = self.data.choose(self.size, numbers)
        copies = (torch.rand(self.size, generator=numbers) * self.data.copies).long()
        return scenes, scenes * self.data.copies + copies

    def pictures(self, numbers: torch.Generator, _done: float) -> tuple[torch.Tensor, ...]:
        """For the autoencoder: pictures, and noise for its latents."""
        _, chosen = self.pick(numbers)
        pictures = self.data.pictures[chosen]
        noise = torch.randn(self.size, *latent_shape(pictures.shape[2:]), generator=numbers)
        return images(pictures), noise

    def encoded(self, numbers: torch.Generator, _done: float) -> tuple[torch.Tensor, ...]:
        """For the decoder alone: latents, noise, pictures."""
        _, chosen = self.pick(numbers)
        latents = self.data.latents[chosen]
        return latents, torch.randn(latents.shape, generator=numbers), images(self.data.pictures[chosen])

    def questions(self, numbers: torch.Generator, _done: float) -> tuple[torch.Tensor, ...]:
        """For the text encoder: captions, and what is where."""
        scenes, chosen = self.pick(numbers)
        return self.tokens[scenes], self.data.classes[chosen].long().flatten(1)

    def noisy(self, numbers: torch.Generator, done: float) -> tuple[torch.Tensor, ...]:
        """For the denoiser: latents, noise, steps, captions."""
        scenes, chosen = self.pick(numbers)
        noise = torch.randn(self.data.latents[chosen].shape, generator=numbers)
        # One step out of each of as many equal parts: the loss then depends less on the draw.
        even = (torch.arange(self.size) + torch.rand(self.size, generator=numbers)) / self.size
        steps = (even * 1000).long().clamp(max=999)
        # The same numbers are drawn in both parts of training.
        chance, place = torch.rand(self.size, generator=numbers), torch.rand(self.size, generator=numbers)
        others = self.data.choose(self.size, numbers)
        if done >= CLEAN:
            scenes = torch.where((chance >= EMPTY) & (chance < EMPTY + WRONG), others, scenes)
        tokens = self.tokens[scenes]
        if done >= CLEAN:
            missing = (chance >= EMPTY + WRONG) & (chance < EMPTY + WRONG + MISSING)
            tokens = torch.where(missing[:, None], self.without_a_word(tokens, self.lengths[scenes], place), tokens)
        tokens = torch.where((chance < EMPTY)[:, None], self.empty, tokens)
        return self.data.latents[chosen], noise, steps, tokens

    def without_a_word(self, tokens: torch.Tensor, lengths: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Each caption with one token left out: not its first, which may be a mark, nor what marks its end."""
        gap = 1 + (place * (lengths - 2)).long()
        later = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], self.pad)], 1)
        return torch.where(torch.arange(tokens.shape[1]) >= gap[:, None], later, tokens)
