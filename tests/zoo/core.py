"""Tiny real pipelines of every supported family, and how to call them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.support.paths import ROOT
from tests.zoo.case import SIZE, Case, built_once, quiet, seeded

GOLDEN = ROOT / "tests/golden"


@built_once
def load_golden(name: str, pipeline_class: str) -> Any:
    """A pipeline of the golden cases; what it was saved without is `None`."""
    folder = GOLDEN / "pipes" / name
    index = json.loads((folder / "model_index.json").read_text())
    absent = {key: None for key, value in index.items() if isinstance(value, list) and value[0] is None}
    return quiet(getattr(diffusers, pipeline_class).from_pretrained(folder, **absent))


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


GOLDEN_SD, GOLDEN_XL = ("sd", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")
GOLDEN_PIXART = ("pixart_alpha", "PixArtAlphaPipeline")
_sd_text, _xl_text = text(32), pooled_text(32, 32)

# The other channels of its output are a variance.
_PIXART: dict[str, Any] = {"denoiser": "transformer", "guided_channels": 4}

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
        kept="",
        off={"guidance_scale": 8.5},
    ),
    Case("pixart_alpha", lambda: load_golden(*GOLDEN_PIXART), masked_text(24), guidance=4.5, **_PIXART),
    Case(
        "pixart_sigma",
        lambda: other(*GOLDEN_PIXART, "PixArtSigmaPipeline", transformer=sigma_transformer()),
        masked_text(24),
        **_PIXART,
        guidance=4.5,
    ),
    Case(
        "lcm_pixart",
        lambda: with_scheduler(
            load_golden(*GOLDEN_PIXART), "LCMScheduler", clip_sample=False, original_inference_steps=50
        ),
        masked_text(24),
        **_PIXART,
        guidance=0.0,
    ),
    Case(
        "svd",
        _svd,
        no_inputs,
        guidance=3.0,
        image=True,
        video=True,
        scale="max_guidance_scale",
        rows=3,
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


BY_NAME = {case.name: case for case in CASES}
GUIDED = [case for case in CASES if case.is_guided]
