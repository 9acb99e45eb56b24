"""Tiny real pipelines of Z-Image, whose batch is a list with an entry for each sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from tests.zoo.case import SIZE, images, seeded
from tests.zoo.cross_attention import _control, _flow, assemble, model, together
from tests.zoo.joint import _SMALL, Joint, _shifted_vae

try:
    from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel
except ImportError:
    Siglip2ImageProcessor = Siglip2VisionConfig = Siglip2VisionModel = None


def _text(prompts: list[int], guided: bool, more: int = 32) -> dict[str, Any]:
    """Text embeddings. One of two prompts has more than its negative one; the denoiser takes multiples of 32."""
    kinds = {"": 100, "negative_": 200} if guided else {"": 100}
    return {
        f"{kind}prompt_embeds": [seeded((5 + (p + seed // 100) % 2 * more, 8), seed + p) for p in prompts]
        for kind, seed in kinds.items()
    }


def _even(prompts: list[int], guided: bool) -> dict[str, Any]:
    """Text embeddings, as many for every prompt."""
    return _text(prompts, guided, more=0)


def _several(prompts: list[int], guided: bool) -> dict[str, Any]:
    """Texts before, between and after the pictures."""
    given = _text(prompts, guided)
    return {kind: [[each, each[:2], each[1:]] for each in texts] for kind, texts in given.items()}


def _nested(text: Any) -> Any:
    """As Omni takes them where there is no picture."""
    return lambda prompts, guided: {kind: [[each] for each in texts] for kind, texts in text(prompts, guided).items()}


_SIZES = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def z_image(name: str = "ZImagePipeline", siglip_feat_dim: int | None = None, **components: Any) -> Any:
    transformer = model(
        "ZImageTransformer2DModel",
        in_channels=4,
        n_layers=2,
        cap_feat_dim=8,
        siglip_feat_dim=siglip_feat_dim,
        axes_dims=(4, 6, 6),
        axes_lens=(256, 16, 16),
        **_SIZES,
    )
    with torch.no_grad():
        # They are not initialised.
        for place, part in enumerate(("x", "cap", "siglip")):
            token = getattr(transformer, f"{part}_pad_token", None)
            if token is not None:
                token.copy_(seeded(token.shape, 700 + place))
    return assemble(name, transformer=transformer, scheduler=_flow(), vae=_shifted_vae(), **components)


def _controlled(name: str, channels: int) -> Any:
    controlnet = model(
        "ZImageControlNetModel",
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        **_SIZES,
    )
    return z_image(name, controlnet=controlnet)


def _omni() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipe = z_image(
        "ZImageOmniPipeline",
        siglip_feat_dim=8,
        siglip=Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16, patch_size=16)).eval(),
        siglip_processor=Siglip2ImageProcessor(patch_size=16, max_num_patches=16),
    )
    # As its pipeline wants it.
    pipe.vae.to(torch.bfloat16)
    return pipe


_ALIKE: dict[str, Any] = {
    "first": "layers.0",
    "first_of_control": "control_layers.0",
    "tier": "thorough",
    "sign": -1,
    # One frame in the denoiser, and none in the scheduler.
    "rescaled": lambda noise, prompt: noise.squeeze(2),
    "scale_beyond": 1.0,
    "conditional_first": True,
    "off": {"guidance_scale": 0.0},
}
_SIDES = {"height": SIZE, "width": SIZE}
_MASK: dict[str, Any] = {"strength": 1.0, "mask_image": Image.new("L", (SIZE, SIZE), 255)}

Z_IMAGE = [
    Joint("z_image", z_image, _text, pipeline="ZImagePipeline", size=_SMALL, **_ALIKE),
    Joint(
        "z_image_image",
        lambda: z_image("ZImageImg2ImgPipeline"),
        _text,
        pipeline="ZImageImg2ImgPipeline",
        image=True,
        size=_SIDES,
        extra={"strength": 1.0},
        **_ALIKE,
    ),
    Joint(
        "z_image_inpaint",
        lambda: z_image("ZImageInpaintPipeline"),
        _text,
        pipeline="ZImageInpaintPipeline",
        image=True,
        batches=False,
        size=_SIDES,
        extra=_MASK,
        **_ALIKE,
    ),
    Joint(
        "z_image_controlnet",
        lambda: _controlled("ZImageControlNetPipeline", 4),
        together(_text, _control),
        pipeline="ZImageControlNetPipeline",
        control="control_image",
        size=_SMALL,
        **_ALIKE,
    ),
    Joint(
        "z_image_controlnet_inpaint",
        lambda: _controlled("ZImageControlNetInpaintPipeline", 9),
        together(_text, _control, mask_image=_MASK["mask_image"]),
        pipeline="ZImageControlNetInpaintPipeline",
        control="control_image",
        image=True,
        batches=False,
        size=_SMALL,
        **_ALIKE,
    ),
    Joint(
        "z_image_omni",
        _omni,
        _nested(_text),
        pipeline="ZImageOmniPipeline",
        size=_SMALL,
        **_ALIKE,
    ),
    Joint(
        "z_image_omni_given",
        _omni,
        _several,
        pipeline="ZImageOmniPipeline",
        size=_SMALL,
        extra={"image": images([0])},
        **_ALIKE,
    ),
]
# Whose inputs are of the sizes that are said.
EVEN = [
    replace(kind, conditioning=_nested(_even) if "omni" in kind.name else _even)
    for kind in Z_IMAGE
    if kind.name in {"z_image", "z_image_omni"}
]
