"""Tiny real modular pipelines, around the components of the classic ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from tests.families import KINDS, TWO_CALLS, _flow, assemble, model, wan_vae
from tests.joint import JOINT
from tests.pipelines import BY_NAME, Case, quiet

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
