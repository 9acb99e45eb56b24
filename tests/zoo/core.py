"""Tiny real pipelines of every supported family, and how to call them."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.support.paths import ROOT
from tgate_processors import apply_tgate

GOLDEN = ROOT / "tests/golden"
STEPS = 6
SIZE = 64


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


@built_once
def load_golden(name: str, pipeline_class: str) -> Any:
    """A pipeline of the golden cases; what it was saved without is `None`."""
    folder = GOLDEN / "pipes" / name
    index = json.loads((folder / "model_index.json").read_text())
    absent = {key: None for key, value in index.items() if isinstance(value, list) and value[0] is None}
    return quiet(getattr(diffusers, pipeline_class).from_pretrained(folder, **absent))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def other(source: str, source_class: str, pipeline_class: str, **kwargs: Any) -> Any:
    """Another pipeline class around the components of a golden one."""
    cls = getattr(diffusers, pipeline_class)
    components = {**load_golden(source, source_class).components, **kwargs}
    known, _ = cls._get_signature_keys(cls)
    return quiet(cls(**{key: value for key, value in components.items() if key in known or key in kwargs}))


def with_scheduler(pipe: Any, scheduler: str, **config: Any) -> Any:
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **config)
    return pipe


def lcm_unet() -> Any:
    """The golden SD UNet with an embedding of the guidance scale, as distilled models have it."""
    unet = load_golden("sd", "StableDiffusionPipeline").unet
    torch.manual_seed(0)
    distilled = diffusers.UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=16)
    distilled.load_state_dict(unet.state_dict(), strict=False)
    return distilled.eval()


def sigma_transformer() -> Any:
    """The golden PixArt transformer without the conditions on size."""
    transformer = load_golden(*GOLDEN_PIXART).transformer
    plain = diffusers.PixArtTransformer2DModel.from_config(transformer.config, use_additional_conditions=False)
    plain.load_state_dict(transformer.state_dict(), strict=False)
    return plain.eval()


def _svd() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 64],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        latent_channels=4,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        intermediate_size=37,
        patch_size=56,
    )
    return quiet(
        diffusers.StableVideoDiffusionPipeline(
            unet=unet.eval(),
            vae=vae.eval(),
            image_encoder=CLIPVisionModelWithProjection(vision).eval(),
            feature_extractor=CLIPImageProcessor(),
            scheduler=diffusers.EulerDiscreteScheduler(
                prediction_type="v_prediction",
                sigma_max=700.0,
                sigma_min=0.002,
                steps_offset=1,
                timestep_spacing="leading",
                timestep_type="continuous",
                use_karras_sigmas=True,
            ),
        )
    )


@built_once
def controlnet(source: str, source_class: str, seed: int = 0) -> Any:
    """A ControlNet for a golden UNet, with a say in the picture: as they start, they have none."""
    controlnet = diffusers.ControlNetModel.from_unet(load_golden(source, source_class).unet)
    torch.manual_seed(seed)
    for name, parameter in controlnet.named_parameters():
        if name.startswith(("controlnet", "cond_embedding", "conv_in")):
            torch.nn.init.normal_(parameter, std=0.1)
    return controlnet.eval()


def seeded(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(prompts: list[int]) -> list[Image.Image]:
    pixels = [(seeded((SIZE, SIZE, 3), 700 + p).sigmoid() * 255).byte().numpy() for p in prompts]
    return [Image.fromarray(p) for p in pixels]


def text(width: int, tokens: int = 7) -> Callable[[list[int], bool], dict[str, Any]]:
    """Text embeddings by the number of the prompt."""

    def inputs(prompts: list[int], guided: bool) -> dict[str, Any]:
        embeds = {"prompt_embeds": torch.stack([seeded((tokens, width), 100 + p) for p in prompts])}
        if guided:
            embeds["negative_prompt_embeds"] = torch.stack([seeded((tokens, width), 200 + p) for p in prompts])
        return embeds

    return inputs


def pooled_text(width: int, pooled: int) -> Callable[[list[int], bool], dict[str, Any]]:
    """SDXL's text embeddings."""

    def inputs(prompts: list[int], guided: bool) -> dict[str, Any]:
        embeds = text(width)(prompts, guided)
        embeds["pooled_prompt_embeds"] = torch.stack([seeded((pooled,), 300 + p) for p in prompts])
        if guided:
            embeds["negative_pooled_prompt_embeds"] = torch.stack([seeded((pooled,), 400 + p) for p in prompts])
        return embeds

    return inputs


def masked_text(width: int) -> Callable[[list[int], bool], dict[str, Any]]:
    """PixArt's text embeddings; the masks differ from prompt to prompt."""

    def inputs(prompts: list[int], guided: bool) -> dict[str, Any]:
        embeds = text(width, tokens=9)(prompts, guided)
        masks = torch.stack([(torch.arange(9) < 5 + p % 4).long() for p in prompts])
        embeds |= {"prompt_attention_mask": masks, "use_resolution_binning": False, "negative_prompt": None}
        if guided:
            embeds["negative_prompt_attention_mask"] = torch.ones_like(masks)
        return embeds

    return inputs


def no_inputs(prompts: list[int], guided: bool) -> dict[str, Any]:
    return {}


# When the laws are held for a case: in the default session, in CI's slow one, or in the thorough one.
TIERS = {"default": [], "slow": [pytest.mark.slow], "thorough": [pytest.mark.slow, pytest.mark.thorough]}


@dataclass(frozen=True)
class Case:
    """
    A pipeline, and what a call of it needs.

    `pipeline` is its class, which older versions of diffusers may lack. `first` is the layer of the denoiser that sees
    the batch first, `cross` how the names of layers that attend to the text end, `never` what is in the names of those
    that are not gated. Its `tier` is `"slow"` where another one stands for it by default, and `"thorough"` where
    nothing of it runs in CI.
    """

    name: str
    build: Callable[[], Any]
    conditioning: Callable[[list[int], bool], dict[str, Any]]
    denoiser: str = "unet"
    guidance: float | None = 5.0
    image: bool = False
    control: str = ""
    mask: bool = False
    video: bool = False
    strength: float | None = None
    control_nets: int = 1
    kept: str = "unconditional"
    extra: dict[str, Any] = field(default_factory=dict)
    pipeline: str = ""
    first: str = ""
    cross: tuple[str, ...] | str = "attn2"
    never: str = "never"
    tier: str = "default"
    drawn: dict[Any, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "build", built_once(self.build))

    @property
    def is_there(self) -> bool:
        """Whether this diffusers has it."""
        return True

    @property
    def has_callback(self) -> bool:
        return self.denoiser == "unet"

    @property
    def num_images(self) -> str:
        return "num_videos_per_prompt" if self.video else "num_images_per_prompt"

    def inputs(self, prompts: list[int], **overrides: Any) -> dict[str, Any]:
        guidance = overrides.pop("guidance_scale", self.guidance)
        guided = guidance is not None and guidance > 1
        inputs: dict[str, Any] = {
            "num_inference_steps": STEPS,
            "output_type": "latent",
            "generator": [torch.Generator().manual_seed(500 + p) for p in prompts],
            **self.conditioning(prompts, guided),
            **self.extra,
        }
        if guidance is not None:
            inputs["max_guidance_scale" if self.video else "guidance_scale"] = guidance
        if not self.image:
            inputs |= {"height": SIZE, "width": SIZE}
        else:
            inputs["image"] = images(prompts)
        if self.control:
            # Several ControlNets take one image each, the same for all prompts.
            numbers = [prompt + 50 for prompt in (prompts if self.control_nets == 1 else range(self.control_nets))]
            inputs[self.control] = images(numbers)
        if self.mask:
            left = Image.new("L", (SIZE, SIZE))
            left.paste(255, (0, 0, SIZE // 2, SIZE))
            inputs["mask_image"] = [left] * len(prompts)
            inputs |= {"height": SIZE, "width": SIZE}
        if self.strength is not None:
            inputs["strength"] = self.strength
        return inputs | overrides

    def run(self, pipe: Any, prompts: list[int] | None = None, **overrides: Any) -> torch.Tensor:
        """Latents of a call."""
        output = pipe(**self.inputs([0] if prompts is None else prompts, **overrides))
        return output.frames if self.video else output.images

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
            pipe = self.build() if settings is None else apply_tgate(self.build(), **settings)
            self.drawn[key] = self.run(pipe, prompts, **call)
        return self.drawn[key].clone()


GOLDEN_SD, GOLDEN_XL = ("sd", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")
GOLDEN_PIXART = ("pixart_alpha", "PixArtAlphaPipeline")
_sd_text, _xl_text = text(32), pooled_text(32, 32)

CASES = [
    Case("sd", lambda: load_golden(*GOLDEN_SD), _sd_text),
    Case(
        "sd_v_prediction",
        lambda: with_scheduler(load_golden(*GOLDEN_SD), "DDIMScheduler", prediction_type="v_prediction"),
        _sd_text,
        extra={"guidance_rescale": 0.7},
        tier="slow",
    ),
    Case(
        "sd_img2img",
        lambda: other(*GOLDEN_SD, "StableDiffusionImg2ImgPipeline"),
        _sd_text,
        image=True,
        strength=1.0,
        tier="slow",
    ),
    Case(
        "sd_inpaint",
        lambda: other(*GOLDEN_SD, "StableDiffusionInpaintPipeline"),
        _sd_text,
        image=True,
        mask=True,
        strength=1.0,
        tier="thorough",
    ),
    Case("sdxl", lambda: load_golden(*GOLDEN_XL), _xl_text),
    Case(
        "sdxl_img2img",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLImg2ImgPipeline"),
        _xl_text,
        image=True,
        strength=0.99,
        tier="thorough",
    ),
    Case(
        "sdxl_inpaint",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLInpaintPipeline"),
        _xl_text,
        image=True,
        mask=True,
        strength=0.99,
    ),
    Case("lcm_sdxl", lambda: load_golden("sdxl_lcm", "StableDiffusionXLPipeline"), _xl_text, guidance=1.0, tier="slow"),
    Case(
        "lcm",
        lambda: with_scheduler(
            other(*GOLDEN_SD, "LatentConsistencyModelPipeline", unet=lcm_unet()), "LCMScheduler", clip_sample=False
        ),
        lambda prompts, guided: _sd_text(prompts, False),
        guidance=8.5,
    ),
    Case("pixart_alpha", lambda: load_golden(*GOLDEN_PIXART), masked_text(24), denoiser="transformer", guidance=4.5),
    Case(
        "pixart_sigma",
        lambda: other(*GOLDEN_PIXART, "PixArtSigmaPipeline", transformer=sigma_transformer()),
        masked_text(24),
        denoiser="transformer",
        guidance=4.5,
    ),
    Case(
        "lcm_pixart",
        lambda: with_scheduler(
            load_golden(*GOLDEN_PIXART), "LCMScheduler", clip_sample=False, original_inference_steps=50
        ),
        masked_text(24),
        denoiser="transformer",
        guidance=0.0,
    ),
    Case(
        "svd",
        _svd,
        no_inputs,
        guidance=3.0,
        image=True,
        video=True,
        kept="conditional",
        extra={"num_frames": 3, "height": SIZE // 4, "width": SIZE // 4},
    ),
]
CASES += [
    Case(
        "sd_controlnet",
        lambda: other(*GOLDEN_SD, "StableDiffusionControlNetPipeline", controlnet=controlnet(*GOLDEN_SD)),
        _sd_text,
        control="image",
    ),
    Case(
        "sd_multi_controlnet_img2img",
        lambda: other(
            *GOLDEN_SD,
            "StableDiffusionControlNetImg2ImgPipeline",
            controlnet=diffusers.MultiControlNetModel([controlnet(*GOLDEN_SD), controlnet(*GOLDEN_SD, seed=1)]),
        ),
        _sd_text,
        image=True,
        control="control_image",
        control_nets=2,
        strength=1.0,
        tier="slow",
    ),
    Case(
        "sdxl_controlnet",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLControlNetPipeline", controlnet=controlnet(*GOLDEN_XL)),
        _xl_text,
        control="image",
        tier="thorough",
    ),
    Case(
        "sdxl_controlnet_inpaint",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLControlNetInpaintPipeline", controlnet=controlnet(*GOLDEN_XL)),
        _xl_text,
        image=True,
        mask=True,
        control="control_image",
        strength=0.99,
        tier="slow",
    ),
]


def slow(*values: Any) -> Any:
    """Parameters of a test that is run in the slow session only."""
    return pytest.param(*values, marks=TIERS["slow"])


def thorough(*values: Any) -> Any:
    """Parameters of a slow test whose law CI proves by other rows."""
    return pytest.param(*values, marks=TIERS["thorough"])


def rows(cases: Iterable[Case], dear: Collection[str] = (), default: Collection[str] | None = None) -> list[Any]:
    """
    Parameters of a test: cases, each in its tier; those named in `dear` not by default, whatever their tier is.

    For a law of which little depends on the pipeline, `default` names the cases that are enough by default: the others
    are thorough.
    """
    found = []
    for case in cases:
        marks = TIERS[case.tier] or TIERS["slow" if case.name in dear else "default"]
        if default is not None and case.name not in default:
            marks = TIERS["thorough"]
        there = pytest.mark.skipif(not case.is_there, reason=f"this diffusers has no {case.pipeline}")
        found.append(pytest.param(case, id=case.name, marks=[*marks, there]))
    return found


BY_NAME = {case.name: case for case in CASES}
GUIDED = [case for case in CASES if case.guidance and case.guidance > 1 and case.name != "lcm"]
