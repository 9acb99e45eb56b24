"""Tiny real modular pipelines, around the components of the classic ones."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.zoo.case import Case, quiet
from tests.zoo.core import BY_NAME
from tests.zoo.cross_attention import KINDS, SHAPES, _flow, assemble, model, wan_vae
from tests.zoo.joint import JOINT
from tests.zoo.sequential import TWO_CALLS

# Blocks that need weights of their own, or nothing that is tested here.
_LEFT_OUT = ("text_encoder", "image_encoder", "ip_adapter", "decode")
IS_THERE = hasattr(diffusers, "ModularPipeline")


@dataclass(frozen=True)
class Modular:
    """
    A modular pipeline, and the classic one for the same denoiser.

    `vae` is one for pipelines whose classic case has none, `scales` the guidance scales of the guiders. `unpacked`
    makes latents of the modular pipeline of those that the classic one gives.
    """

    name: str
    blocks: str
    classic: Case
    denoisers: tuple[str, ...] = ("transformer",)
    scales: tuple[float, ...] = (5.0,)
    vae: Callable[[], Any] | None = None
    unpacked: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents

    def _blocks(self) -> Any:
        blocks = getattr(diffusers, self.blocks)()
        for name in _LEFT_OUT:
            # Wan asks the VAE for the channels of its latents, and nothing but the decoder brings one.
            if name != "decode" or self.vae is None:
                blocks.sub_blocks.pop(name, None)
        return blocks

    def build(self, change: Callable[[Any], None] | None = None) -> Any:
        """A modular pipeline with the components of the classic one, its blocks changed first."""
        classic, blocks = self.classic.build(), self._blocks()
        if change is not None:
            change(blocks)
        pipe = blocks.init_pipeline()
        given = {name: part for name, part in classic.components.items() if name in pipe.components and part}
        if self.vae is not None:
            given["vae"] = self.vae()
        for name, scale in zip(("guider", "guider_2"), self.scales, strict=False):
            given[name] = diffusers.ClassifierFreeGuidance(guidance_scale=scale)
        ratio = classic.config.get("boundary_ratio")
        pipe.update_components(**given, **({} if ratio is None else {"boundary_ratio": ratio}))
        return quiet(pipe)

    def inputs(self, prompts: list[int] | None = None, **overrides: Any) -> dict[str, Any]:
        inputs = {**self.classic.inputs([0] if prompts is None else prompts), "output_type": "pt", **overrides}
        known = {each.name for each in self._blocks().inputs}
        return {key: value for key, value in inputs.items() if key in known}

    def run(self, pipe: Any, prompts: list[int] | None = None, **overrides: Any) -> torch.Tensor:
        """Latents of a call."""
        return pipe(**self.inputs(prompts, **overrides), output="latents")

    def denoiser(self, pipe: Any) -> Any:
        return getattr(pipe, self.denoisers[0])


_BY_NAME = {case.name: case for case in (*KINDS, *TWO_CALLS, *JOINT)} | BY_NAME
_EXPERTS = ("transformer", "transformer_2")
MODULAR = [
    Modular("sdxl", "StableDiffusionXLAutoBlocks", _BY_NAME["sdxl"], ("unet",)),
    Modular("wan", "WanBlocks", _BY_NAME["wan"], vae=wan_vae),
    Modular("wan_experts", "Wan22Blocks", _BY_NAME["wan_experts"], _EXPERTS, (5.0, 3.0), wan_vae),
    Modular(
        "ltx",
        "LTXAutoBlocks",
        _BY_NAME["ltx"],
        scales=(3.0,),
        unpacked=lambda latents: latents.transpose(1, 2).unflatten(2, (3, 16, 16)),
    ),
    Modular("sd3", "StableDiffusion3AutoBlocks", _BY_NAME["sd3"]),
]


def hunyuan() -> Any:
    """A classic pipeline that has a guider."""
    transformer = model(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        target_size=64,
        task_type="t2v",
    )
    vae = model("AutoencoderKLHunyuanVideo15", latent_channels=4, block_out_channels=(32,) * 5, layers_per_block=1)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=5.0)
    pipe = assemble("HunyuanVideo15Pipeline", transformer=transformer, vae=vae, scheduler=_flow(), guider=guider)
    # The width of what stands for a picture.
    pipe.vision_states_dim = 8
    return pipe


def hunyuan_image() -> Any:
    """A classic pipeline whose guider is of another kind, and which has another one for prompts with words to draw."""
    transformer = model(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        rope_axes_dim=(4, 4),
    )
    vae = model(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        scaling_factor=0.5,
        spatial_compression_ratio=8,
        sample_size=64,
    )
    guiders = {
        name: diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=start)
        for name, start in (("guider", 2), ("ocr_guider", 3))
    }
    return assemble("HunyuanImagePipeline", transformer=transformer, vae=vae, scheduler=_flow(), **guiders)


def save_sdxl(folder: Path) -> None:
    """Save a pipeline with text encoders, as the snippet of a page loads it."""
    with warnings.catch_warnings():
        # What diffusers imports to find the modular pipeline for it warns of torch.
        warnings.simplefilter("ignore")
        importlib.import_module("diffusers.pipelines.auto_pipeline")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    text = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=8, **sizes)
    torch.manual_seed(0)
    unet = model(
        "UNet2DConditionModel",
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        cross_attention_dim=16,
    )
    vae = model("AutoencoderKL", block_out_channels=(4,), norm_num_groups=2, latent_channels=4, force_upcast=False)
    assemble(
        "StableDiffusionXLPipeline",
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        # That of Euler warns of numpy.
        scheduler=diffusers.DDIMScheduler(),
    ).save_pretrained(folder)
