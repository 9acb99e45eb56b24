"""How good pictures are, and how near to the baseline's."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from examples.testbeds.shapes.clips import FRAMES, Clip, draw_clip, score_clips
from examples.testbeds.shapes.scenes import SIDE, Scene, draw
from examples.testbeds.shapes.scorer import score

CLIP = "openai/clip-vit-base-patch16"


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    """N x 3 x height x width, from 0 to 1."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255


def psnr(images: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """That of each picture; a picture that is the baseline's to the last bit has an infinite one."""
    return peak_signal_noise_ratio(images, baseline, data_range=1.0, dim=(1, 2, 3), reduction="none")


def ssim(images: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture."""
    return structural_similarity_index_measure(images, baseline, data_range=1.0, reduction="none").reshape(-1)


def mean_of_finite(values: torch.Tensor) -> float | None:
    """The mean of those that are finite, if any is."""
    values = values[values.isfinite()]
    return float(values.mean()) if len(values) else None


def frechet(one: torch.Tensor, other: torch.Tensor) -> float:
    """The Fréchet distance of two sets of vectors, N x D, as FID has it."""
    one, other = one.double(), other.double()
    # With few vectors the product of the covariances is singular, and its eigenvalues are zero but for rounding.
    roots = torch.linalg.eigvals(one.T.cov() @ other.T.cov()).real.clamp(min=0).sqrt()
    means = (one.mean(0) - other.mean(0)).square().sum()
    return float((means + one.T.cov().trace() + other.T.cov().trace() - 2 * roots.sum()).clamp(min=0))


def frames_of(images: torch.Tensor) -> torch.Tensor:
    """The frames of strips, one after the other, N x 3 x 32 x 32; pictures of that size are as they were."""
    return images.unflatten(-1, (-1, SIDE)).movedim(-2, 1).flatten(0, 1)


def drawn(scenes: list[Scene] | list[Clip], seed: int) -> torch.Tensor:
    """Real pictures of the scenes, or strips of the clips."""
    numbers = torch.Generator().manual_seed(seed)
    if isinstance(scenes[0], Clip):
        return torch.stack([draw_clip(clip, numbers)[0].movedim(1, 2).flatten(2) for clip in scenes])
    return torch.stack([draw(scene, numbers)[0] for scene in scenes])


def right(images: torch.Tensor, scenes: list[Scene] | list[Clip]) -> list[bool]:
    """Whether each picture or strip shows all that its prompt says."""
    pictures = frames_of(images)
    if isinstance(scenes[0], Clip):
        pictures = pictures.unflatten(0, (-1, FRAMES)).permute(0, 1, 3, 4, 2).numpy()
    return [one.right for one in (score_clips if isinstance(scenes[0], Clip) else score)(pictures, scenes)]


def readable(images: torch.Tensor, scenes: list[Scene] | list[Clip] | None) -> bool:
    """Whether the scorer knows the captions and can read pictures of this size."""
    if not scenes:
        return False
    return images.shape[1:] == (3, SIDE, SIDE * (FRAMES if isinstance(scenes[0], Clip) else 1))


class Extras:
    """
    The metrics with backbones of their own, whose packages and weights are not this repository's.

    What is missing makes a note and an empty column.
    """

    def __init__(self, device: str):
        self.device = device
        self.notes: dict[str, str] = {}
        self.loaded: dict[str, Any] = {}

    def attempt(self, name: str, make: Callable[[], float]) -> float | None:
        """A number, or a note why there is none; tried once."""
        if name in self.notes:
            return None
        try:
            return make()
        # A package that is absent, a download that is refused: each library says it in its own way.
        except (ImportError, OSError, RuntimeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            self.notes[name] = f"{name} was not measured: {type(error).__name__}: {reason}"
            return None

    def fid(self, folder: Path, other: Path | None) -> float | None:
        """FID by pytorch-fid, between two folders."""
        if other is None:
            return None

        def make() -> float:
            from pytorch_fid.fid_score import calculate_fid_given_paths

            return float(calculate_fid_given_paths([str(folder), str(other)], 50, self.device, 2048, num_workers=0))

        return self.attempt("FID", make)

    def lpips(self, pairs: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]) -> float | None:
        """LPIPS with AlexNet, of pictures and the baseline's, part by part."""

        def make() -> float:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            if "lpips" not in self.loaded:
                self.loaded["lpips"] = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(self.device)
            metric = self.loaded["lpips"]
            metric.reset()
            for one, other in pairs():
                metric.update(one.to(self.device), other.to(self.device))
            return float(metric.compute())

        return self.attempt("LPIPS", make)

    def clip_score(self, parts: Callable[[], Iterable[tuple[torch.Tensor, list[str]]]]) -> float | None:
        """CLIP score of pictures and their captions, part by part."""

        def make() -> float:
            from torchmetrics.multimodal.clip_score import CLIPScore

            if "clip" not in self.loaded:
                self.loaded["clip"] = CLIPScore(CLIP).to(self.device)
            metric = self.loaded["clip"]
            metric.reset()
            for images, captions in parts():
                metric.update((images * 255).round().to(torch.uint8).to(self.device), captions)
            return float(metric.compute())

        return self.attempt("CLIP score", make)


def finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None
