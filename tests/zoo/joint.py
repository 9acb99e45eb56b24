"""Tiny real pipelines with joint attention, of which guidance alone is gated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from PIL import Image
from transformers import CLIPTokenizer

from tests.zoo.case import IS_OLD, SIZE, by_length, images, seeded
from tests.zoo.cross_attention import SHAPES, Kind, _control, _flow, assemble, model, text, together

# A transformer in which text and picture share a softmax, so that guidance alone is gated.
Joint = functools.partial(Kind, way={"cross_attention": False})


def pooled(width: int) -> Callable[..., dict[str, Any]]:
    """Embeddings of the whole text."""

    def inputs(prompts: list[int], guided: bool) -> dict[str, Any]:
        given = {"pooled_prompt_embeds": torch.stack([seeded((width,), 300 + p) for p in prompts])}
        if guided:
            given["negative_pooled_prompt_embeds"] = torch.stack([seeded((width,), 400 + p) for p in prompts])
        return given

    return inputs


def _shifted_vae(channels: int = 4) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "latent_channels": channels}
    return model("AutoencoderKL", **blocks, **sizes, shift_factor=0.1)


_SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
}


def sd3(name: str = "StableDiffusion3Pipeline", channels: tuple[int, int] = (4, 4), **components: Any) -> Any:
    transformer = model("SD3Transformer2DModel", **{**_SD3, "in_channels": channels[0], "out_channels": channels[1]})
    if IS_OLD:
        # It asks how long the text may be.
        components["tokenizer"] = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    components["vae"] = _shifted_vae(channels[1])
    return assemble(name, transformer=transformer, scheduler=_flow(), **components)


def sd3_ip_adapter() -> Any:
    pipe = sd3()
    torch.manual_seed(0)
    made = {name: SD3IPAdapterJointAttnProcessor2_0(16, 8, 8, 8) for name in pipe.transformer.attn_processors}
    pipe.transformer.set_attn_processor(made)
    sizes = {"embed_dim": 8, "output_dim": 8, "hidden_dim": 8, "timestep_in_dim": 8}
    pipe.transformer.image_proj = IPAdapterTimeImageProjection(**sizes, depth=1, dim_head=4, heads=2, num_queries=2)
    pipe.transformer.eval()
    return pipe


def _picture(prompts: list[int], guided: bool) -> dict[str, Any]:
    # The pipeline takes one for all prompts.
    return {
        "ip_adapter_image_embeds": torch.stack([seeded((3, 8), seed) for seed in ([600, 650] if guided else [650])])
    }


def sd3_controlnet() -> Any:
    controlnet = model("SD3ControlNetModel", **{**_SD3, "num_layers": 1})
    return sd3("StableDiffusion3ControlNetPipeline", controlnet=controlnet)


_QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": (4, 6, 6),
}


def qwen(name: str = "QwenImagePipeline", components: dict[str, Any] | None = None, **config: Any) -> Any:
    transformer = model("QwenImageTransformer2DModel", **_QWEN, **config)
    return assemble(name, transformer=transformer, scheduler=_flow(), **components or {})


def _qwen_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    given = text(8)(prompts, guided)
    return {name.replace("attention", "embeds"): value for name, value in given.items()}


def _chroma_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    return {name: value.bool() if "mask" in name else value for name, value in text(8)(prompts, guided).items()}


def _loud_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    """So that it has a say beside what else stands in the sequence."""
    return {name: value if "mask" in name else 50 * value for name, value in text(8)(prompts, guided).items()}


def cogvideox(name: str = "CogVideoXPipeline", channels: int = 4) -> Any:
    transformer = model(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=8,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )
    vae = model(
        "AutoencoderKLCogVideoX",
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return assemble(name, transformer=transformer, vae=vae, scheduler=diffusers.CogVideoXDDIMScheduler())


def mochi() -> Any:
    transformer = model(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=12,
        text_embed_dim=8,
        time_embed_dim=4,
        max_sequence_length=5,
    )
    return assemble("MochiPipeline", transformer=transformer, scheduler=_flow())


def lumina2() -> Any:
    transformer = model(
        "Lumina2Transformer2DModel",
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=8,
    )
    return assemble("Lumina2Pipeline", transformer=transformer, scheduler=_flow())


def chroma(name: str = "ChromaPipeline", **components: Any) -> Any:
    transformer = model(
        "ChromaTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return assemble(name, transformer=transformer, scheduler=_flow(), **components)


_HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "guidance_embeds": True,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def hunyuan_video(name: str = "HunyuanVideoPipeline", components: dict[str, Any] | None = None, **config: Any) -> Any:
    transformer = model("HunyuanVideoTransformer3DModel", **_HUNYUAN_VIDEO | config)
    return assemble(name, transformer=transformer, scheduler=_flow(), **components or {})


FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}


def flux(name: str = "FluxPipeline", **components: Any) -> Any:
    transformer = model("FluxTransformer2DModel", **FLUX)
    return assemble(name, transformer=transformer, scheduler=_flow(), vae=_shifted_vae(), **components)


def flux_controlnet() -> Any:
    return flux("FluxControlNetPipeline", controlnet=model("FluxControlNetModel", **FLUX))


def aura_flow() -> Any:
    transformer = model(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return assemble("AuraFlowPipeline", transformer=transformer, scheduler=_flow())


def cogview(number: str, kind: str = "", channels: int = 4, **components: Any) -> Any:
    transformer = model(
        f"CogView{number}Transformer2DModel",
        in_channels=channels,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = _flow() if number == "4" else diffusers.CogVideoXDDIMScheduler()
    return assemble(f"CogView{number}{kind}Pipeline", transformer=transformer, scheduler=scheduler, **components)


_sd3_text = together(text(8, masked=False), pooled(8))
_SMALL = {"height": 32, "width": 32}
_CLIP = {"height": 32, "width": 32, "num_frames": 5}
_TWO: dict[str, Any] = {"calls": 2}
_TRUE: dict[str, Any] = {"calls": 2, "scale": "true_cfg_scale"}

JOINT = [
    Joint("sd3", sd3, _sd3_text, pipeline="StableDiffusion3Pipeline", first="pos_embed.proj", size=_SMALL),
    Joint(
        "sd3_image",
        lambda: sd3("StableDiffusion3Img2ImgPipeline"),
        _sd3_text,
        pipeline="StableDiffusion3Img2ImgPipeline",
        first="pos_embed.proj",
        image=True,
        extra={"strength": 1.0},
    ),
    Joint(
        "sd3_ip_adapter",
        sd3_ip_adapter,
        together(_sd3_text, _picture),
        pipeline="StableDiffusion3Pipeline",
        first="pos_embed.proj",
        size=_SMALL,
    ),
    Joint(
        "sd3_inpaint",
        lambda: sd3("StableDiffusion3InpaintPipeline", channels=(33, 16)),
        _sd3_text,
        pipeline="StableDiffusion3InpaintPipeline",
        first="pos_embed.proj",
        image=True,
        batches=False,
        extra={"strength": 1.0, "mask_image": Image.new("L", (SIZE, SIZE), 255), "height": SIZE, "width": SIZE},
    ),
    Joint(
        "sd3_controlnet",
        sd3_controlnet,
        together(_sd3_text, _control),
        pipeline="StableDiffusion3ControlNetPipeline",
        first="pos_embed.proj",
        size=_SMALL,
        control="control_image",
        batches=False,
    ),
    Joint(
        "qwen",
        qwen,
        _qwen_text,
        pipeline="QwenImagePipeline",
        first="img_in",
        size={"height": 64, "width": 64},
        rescaled=by_length(-1),
        **_TRUE,
    ),
    Joint(
        "cogvideox",
        cogvideox,
        text(8, masked=False),
        pipeline="CogVideoXPipeline",
        first="patch_embed.proj",
        rows=2,
        size=_CLIP,
    ),
    Joint(
        "cogvideox_image",
        lambda: cogvideox("CogVideoXImageToVideoPipeline", channels=8),
        text(8, masked=False),
        pipeline="CogVideoXImageToVideoPipeline",
        first="patch_embed.proj",
        rows=2,
        size=_CLIP,
        batches=False,
        extra={"image": images([0])[0]},
    ),
    Joint(
        "mochi",
        mochi,
        text(8),
        pipeline="MochiPipeline",
        first="patch_embed.proj",
        rows=2,
        size={**_SMALL, "num_frames": 7},
    ),
    Joint(
        "lumina2",
        lumina2,
        text(8),
        pipeline="Lumina2Pipeline",
        first="x_embedder",
        size=_SMALL,
        rescaled=by_length(-1),
        sign=-1,
        **_TWO,
    ),
    Joint("chroma", chroma, _chroma_text, pipeline="ChromaPipeline", first="x_embedder", size=_SMALL, **_TWO),
    Joint(
        "hunyuan_video",
        hunyuan_video,
        together(text(8), pooled(8)),
        pipeline="HunyuanVideoPipeline",
        first="x_embedder.proj",
        size=_CLIP,
        **_TRUE,
    ),
    Joint("flux", flux, _sd3_text, pipeline="FluxPipeline", first="x_embedder", size=_SMALL, **_TRUE),
    Joint(
        "flux_controlnet",
        flux_controlnet,
        together(_sd3_text, _control),
        pipeline="FluxControlNetPipeline",
        first="x_embedder",
        size=_SMALL,
        control="control_image",
        batches=False,
        **_TRUE,
    ),
    Joint("aura_flow", aura_flow, _loud_text, pipeline="AuraFlowPipeline", first="pos_embed.proj", size=_SMALL),
    Joint(
        "cogview3",
        lambda: cogview("3Plus"),
        text(8, masked=False),
        pipeline="CogView3PlusPipeline",
        first="patch_embed.proj",
        size=_SMALL,
    ),
    Joint(
        "cogview4",
        lambda: cogview("4"),
        text(8, masked=False),
        pipeline="CogView4Pipeline",
        first="patch_embed.proj",
        size=_SMALL,
        **_TWO,
    ),
]
