"""What a tiny pipeline of the tests is, how it is built and called, and when laws are held for it."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from tests.support.settings import apply_settings

STEPS = 6
SIZE = 64
# The oldest diffusers has other words for some things, and lacks this.
IS_OLD = not hasattr(diffusers, "LTXConditionPipeline")
# When the laws are held for a case: in the default session, in CI's slow one, or in the thorough one.
TIERS = {"default": [], "slow": [pytest.mark.slow], "thorough": [pytest.mark.slow, pytest.mark.thorough]}


class _Pickler(pickle.Pickler):
    """Leaves out tensors, which it takes down in a list."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, torch.Tensor):
            return None
        if id(thing) not in self._numbers:
            self._numbers[id(thing)] = len(self.tensors)
            self.tensors.append(thing)
        return self._numbers[id(thing)]


class _Unpickler(pickle.Unpickler):
    """Puts copies of the tensors in."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._copied: dict[int, Any] = {}

    def persistent_load(self, number: int) -> torch.Tensor:
        return copy.deepcopy(self._tensors[number], self._copied)


def built_once(build: Callable[..., Any]) -> Callable[..., Any]:
    """
    Build at the first call, and give a copy at every call: what `copy.deepcopy` gives, in a quarter of its time.

    Tests build more than a thousand pipelines. Copies share nothing, and as none is the one that was built, all their
    weights are aligned alike: sums are then made in the same order.
    """
    templates: dict[Any, tuple[bytes, list[torch.Tensor]]] = {}

    @functools.wraps(build)
    def copied(*args: Any, **kwargs: Any) -> Any:
        key = (args, tuple(kwargs.items()))
        if key not in templates:
            pickler = _Pickler(file := io.BytesIO())
            pickler.dump(build(*args, **kwargs))
            templates[key] = (file.getvalue(), pickler.tensors)
        pickled, tensors = templates[key]
        return _Unpickler(io.BytesIO(pickled), tensors).load()

    return copied


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(prompts: list[int]) -> list[Image.Image]:
    pixels = [(seeded((SIZE, SIZE, 3), 700 + p).sigmoid() * 255).byte().numpy() for p in prompts]
    return [Image.fromarray(p) for p in pixels]


def _read(output: Any) -> torch.Tensor:
    """What a call gives: latents, or a video and its sound as one tensor."""
    parts = {name: part for name, part in vars(output).items() if part is not None}
    return (
        torch.cat([part.flatten(1) for part in parts.values()], 1) if "audio" in parts else next(iter(parts.values()))
    )


def by_length(*dims: int, most: float = torch.inf) -> Callable[..., torch.Tensor]:
    """Guidance that gets the length of the conditional output, or is made no longer than `most` times that."""

    def rescaled(noise: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        length = {"dim": dims, "keepdim": True}
        return noise * (prompt.norm(**length) / noise.norm(**length)).clamp(max=most)

    return rescaled


@dataclass(frozen=True)
class Case:
    """A tiny pipeline: what it is, what a call of it needs, and how it guides."""

    name: str
    build: Callable[[], Any]
    # What the text and other conditions of some prompts are, with guidance or without.
    conditioning: Callable[[list[int], bool], dict[str, Any]]
    # Its class, which older versions of diffusers may lack.
    pipeline: str = ""
    # "slow" where another one stands for it by default, "thorough" where nothing of it runs in CI.
    tier: str = "default"
    # What the support matrix calls it, if it is built around another one.
    row: str = ""

    # The denoiser: what holds it, the layer of it that sees the batch first, with how many rows for each sample, and
    # that layer of its ControlNet, if it is another one.
    denoiser: str = "unet"
    first: str = ""
    rows: int = 1
    first_of_control: str = ""
    # How the names of layers end that attend to the text, what is in the names of those that are not gated, whether
    # there is self-attention, and whether layers keep the mean of both halves where guidance is dropped.
    cross: tuple[str, ...] | str = "attn2"
    never: str = "never"
    own: bool = True
    mean: bool = True

    # The call: its own arguments, those that it does not take, and whether it takes several prompts.
    size: dict[str, Any] | None = None
    image: bool = False
    control: str = ""
    control_nets: int = 1
    mask: bool = False
    video: bool = False
    strength: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    batches: bool = True
    read: Callable[[Any], torch.Tensor] = _read

    # Guidance: its scale, the argument that sets it, what is added to it, the scale of what is predicted besides, and
    # a call without any.
    guidance: float | None = 5.0
    scale: str = "guidance_scale"
    scale_beyond: float = 0.0
    second_scale: float | None = None
    off: dict[str, float] = field(default_factory=lambda: {"guidance_scale": 1.0})
    # The half that stays where it is dropped ("": none), which comes first, the number of calls of the denoiser that it
    # is, and that of its parts if they are not two halves.
    kept: str = "unconditional"
    conditional_first: bool = False
    calls: int = 1
    guidance_parts: int = 0
    # How many channels of the output it is about, whether the last tokens are read and not the first, the sign of the
    # output, and what is made of the guided one.
    guided_channels: int | None = None
    at_end: bool = False
    sign: int = 1
    rescaled: Callable[..., torch.Tensor] = lambda noise, prompt: noise

    # Settings of T-GATE: those that it cannot do without, and those that `gate` adds.
    needs: dict[str, Any] = field(default_factory=dict)
    way: dict[str, Any] = field(default_factory=dict)
    drawn: dict[Any, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        build = built_once(self.build)

        @functools.wraps(self.build)
        def build_or_skip(*args: Any, **kwargs: Any) -> Any:
            # A test may build it by name.
            if not self.is_there:
                pytest.skip(f"this diffusers has no {self.pipeline}")
            return build(*args, **kwargs)

        object.__setattr__(self, "build", build_or_skip)
        if self.size is None:
            object.__setattr__(self, "size", {} if self.image and not self.mask else {"height": SIZE, "width": SIZE})

    @property
    def is_there(self) -> bool:
        """Whether this diffusers has it; the oldest one has some of the thorough ones, with other arguments."""
        if not self.pipeline:
            return True
        found = getattr(diffusers, self.pipeline, None)
        # Flux did not guide by embeddings.
        if found is None or (IS_OLD and (self.tier == "thorough" or "true" in self.scale)):
            return False
        return self.scale in self.left_out or self.scale in inspect.signature(found.__call__).parameters

    @property
    def has_callback(self) -> bool:
        return self.denoiser == "unet"

    @property
    def is_guided(self) -> bool:
        """Whether its guidance is two halves, of which one may be left out."""
        return bool(self.kept and self.guidance and self.guidance > 1 and not self.guidance_parts)

    @property
    def stays(self) -> str:
        """What of guidance stays, in the words of the support matrix."""
        if self.guidance_parts:
            return "all parts"
        return self.kept if self.is_guided else "no guidance"

    @property
    def num_images(self) -> str:
        return "num_videos_per_prompt" if self.video else "num_images_per_prompt"

    @property
    def reuses(self) -> bool:
        """Whether it has self-attention that may be reused."""
        return self.own and self.way.get("cross_attention", True)

    def denoisers(self, pipe: Any) -> dict[str, Any]:
        """One or two, by name."""
        parts = {name: getattr(pipe, name, None) for name in (self.denoiser, f"{self.denoiser}_2")}
        return {name: part for name, part in parts.items() if part is not None}

    def inputs(self, prompts: list[int], **overrides: Any) -> dict[str, Any]:
        guidance = overrides.pop("guidance_scale", self.guidance)
        generators = [torch.Generator().manual_seed(500 + p) for p in prompts]
        inputs: dict[str, Any] = {
            "num_inference_steps": STEPS,
            "output_type": "latent",
            # Some take no list.
            "generator": generators if self.batches or self.image else generators[0],
            **self.conditioning(prompts, guidance is not None and guidance > 1),
            **self.size,
            **self.extra,
        }
        if guidance is not None:
            inputs[self.scale] = guidance
        if self.image:
            inputs["image"] = images(prompts)
        if self.control and self.control not in inputs:
            # Several ControlNets take one image each, the same for all prompts.
            numbers = [prompt + 50 for prompt in (prompts if self.control_nets == 1 else range(self.control_nets))]
            inputs[self.control] = images(numbers)
        if self.mask:
            left = Image.new("L", (SIZE, SIZE))
            left.paste(255, (0, 0, SIZE // 2, SIZE))
            inputs["mask_image"] = [left] * len(prompts)
        if self.strength is not None:
            inputs["strength"] = self.strength
        return {name: value for name, value in inputs.items() if name not in self.left_out} | overrides

    def run(self, pipe: Any, prompts: list[int] | None = None, **overrides: Any) -> torch.Tensor:
        """Latents of a call."""
        # Encoders of pictures and SparseCtrl draw from torch's own generator.
        torch.manual_seed(0)
        return self.read(pipe(**self.inputs([0] if prompts is None else prompts, **overrides)))

    def gate(self, pipe: Any, *args: Any, **settings: Any) -> Any:
        """Apply T-GATE to what it gates of this pipeline, also where that is not its default."""
        return apply_settings(pipe, *args, **{**self.way, **self.chosen(settings)})

    def chosen(self, settings: dict[str, Any]) -> dict[str, Any]:
        """These settings, with what the pipeline cannot do without."""
        return {**self.needs, **settings}

    def guided(self, none: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """What the pipeline makes of the two halves."""
        noise = none + (self.guidance + self.scale_beyond) * (prompt - none)
        return self.sign * self.rescaled(noise, prompt)

    def plain(self, prompts: list[int] | None = None, **call: Any) -> torch.Tensor:
        """Latents of a call without T-GATE, drawn once: those of every copy of the pipeline."""
        return self._once(None, prompts, call)

    def gated(
        self, gate_step: float, prompts: list[int] | None = None, call: dict[str, Any] | None = None, **settings: Any
    ) -> torch.Tensor:
        """Latents of a call with T-GATE, drawn once."""
        return self._once({"gate_step": gate_step, **settings}, prompts, call or {})

    def _once(self, settings: dict[str, Any] | None, prompts: list[int] | None, call: dict[str, Any]) -> torch.Tensor:
        key = (settings and frozenset(settings.items()), tuple(prompts or [0]), frozenset(call.items()))
        if key not in self.drawn:
            pipe = self.build() if settings is None else apply_settings(self.build(), **settings)
            self.drawn[key] = self.run(pipe, prompts, **call)
        return self.drawn[key].clone()


def slow(*values: Any) -> Any:
    """Parameters of a test that is run in the slow session only."""
    return pytest.param(*values, marks=TIERS["slow"])


def thorough(*values: Any) -> Any:
    """Parameters of a slow test whose law CI proves by other rows."""
    return pytest.param(*values, marks=TIERS["thorough"])


def rows(cases: Iterable[Case], default: Collection[str] | None = None, others: str = "thorough") -> list[Any]:
    """
    Parameters of a test: cases, each in its tier.

    With `default` those that it names are, and the others are in the tier `others`, or in a later one that is theirs.
    """
    found = []
    for case in cases:
        tier = case.tier if default is None or case.name in default else max(case.tier, others, key=list(TIERS).index)
        there = pytest.mark.skipif(not case.is_there, reason=f"this diffusers has no {case.pipeline}")
        found.append(pytest.param(case, id=case.name, marks=[*TIERS[tier], there]))
    return found
