"""Tiny real pipelines around denoisers that have one already: from a picture, with control, with what is masked."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests.zoo.audio import SOUND, SOUND_TWO
from tests.zoo.case import SIZE, by_length, images, seeded
from tests.zoo.core import GOLDEN_SD, GOLDEN_XL, load_golden, other
from tests.zoo.cross_attention import (
    _KANDINSKY3_CROSS,
    _LTX2_CALL,
    TOKENS,
    Kind,
    _control,
    _flow,
    _kandinsky3_text,
    _picture_vae,
    assemble,
    kandinsky3,
    ltx2,
    model,
    text,
    together,
    wan_vae,
)
from tests.zoo.joint import (
    _CLIP,
    _HUNYUAN_VIDEO,
    _QWEN,
    _SD3,
    _SMALL,
    _TRUE,
    _TWO,
    Joint,
    _chroma_text,
    _qwen_text,
    _sd3_text,
    _shifted_vae,
    chroma,
    cogvideox,
    cogview,
    flux,
    hunyuan_video,
    pooled,
    qwen,
    sd3,
)
from tests.zoo.joint_images import PICTURES
from tests.zoo.sequential import _SHORT, WAN_CONFIG, Sequential, _kandinsky5_text, cosmos, helios, kandinsky5
from tests.zoo.z_image import Z_IMAGE

try:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
except ImportError:
    LTX2VideoCondition = LTX2ReferenceCondition = lambda *args, **kwargs: None
try:
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
except ImportError:
    StableAudio3DurationEmbedder = None

_MASK: dict[str, Any] = {"strength": 1.0, "mask_image": Image.new("L", (SIZE, SIZE), 255)}
_SIDES = {"height": SIZE, "width": SIZE}


def _chroma_inpaint() -> Any:
    pipe = chroma("ChromaInpaintPipeline", vae=_shifted_vae())
    # diffusers 0.42 asks for it, as in Flux.
    pipe.transformer.register_to_config(guidance_embeds=False)
    return pipe


def _qwen_vae(halved: int = 3) -> Any:
    """A VAE that halves a side so often."""
    return model(
        "AutoencoderKLQwenImage",
        base_dim=2,
        z_dim=4,
        dim_mult=[1] * (halved + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * halved,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _qwen_controlnet(name: str, extra: int = 0) -> Any:
    controlnet = model("QwenImageControlNetModel", **{**_QWEN, "num_layers": 1}, extra_condition_channels=extra)
    return qwen(name, {"vae": _qwen_vae(), "controlnet": controlnet})


def _hunyuan_vae() -> Any:
    return model(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.5,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        mid_block_add_attention=False,
    )


def sd3_controlnet_inpaint() -> Any:
    controlnet = model("SD3ControlNetModel", **{**_SD3, "num_layers": 1}, extra_conditioning_channels=1)
    return sd3("StableDiffusion3ControlNetInpaintingPipeline", controlnet=controlnet)


def _masked(prompts: list[int], guided: bool) -> dict[str, Any]:
    return {"control_image": images([p + 50 for p in prompts]), "control_mask": Image.new("L", (SIZE, SIZE), 255)}


_hunyuan_text = together(text(8), pooled(8))

# Guidance alone.
AROUND_JOINT = [
    Joint(
        "chroma_image",
        lambda: chroma("ChromaImg2ImgPipeline", vae=_shifted_vae()),
        _chroma_text,
        pipeline="ChromaImg2ImgPipeline",
        first="x_embedder",
        image=True,
        tier="thorough",
        size=_SIDES,
        extra={"strength": 1.0},
        **_TWO,
    ),
    Joint(
        "chroma_inpaint",
        _chroma_inpaint,
        _chroma_text,
        pipeline="ChromaInpaintPipeline",
        first="x_embedder",
        image=True,
        batches=False,
        tier="thorough",
        size=_SIDES,
        extra=_MASK,
        **_TWO,
    ),
    Joint(
        "flux_image",
        lambda: flux("FluxImg2ImgPipeline"),
        _sd3_text,
        pipeline="FluxImg2ImgPipeline",
        first="x_embedder",
        image=True,
        tier="thorough",
        size=_SIDES,
        extra={"strength": 1.0},
        **_TRUE,
    ),
    Joint(
        "flux_inpaint",
        lambda: flux("FluxInpaintPipeline"),
        _sd3_text,
        pipeline="FluxInpaintPipeline",
        first="x_embedder",
        image=True,
        batches=False,
        tier="thorough",
        size=_SIDES,
        extra=_MASK,
        **_TRUE,
    ),
    Joint(
        "flux_kontext",
        lambda: flux("FluxKontextPipeline"),
        _sd3_text,
        pipeline="FluxKontextPipeline",
        first="x_embedder",
        image=True,
        tier="thorough",
        size=_SMALL,
        extra={"max_area": 32**2, "_auto_resize": False},
        **_TRUE,
    ),
    Joint(
        "flux_kontext_inpaint",
        lambda: flux("FluxKontextInpaintPipeline"),
        _sd3_text,
        pipeline="FluxKontextInpaintPipeline",
        first="x_embedder",
        image=True,
        batches=False,
        tier="thorough",
        size=_SIDES,
        extra={**_MASK, "max_area": SIZE**2, "_auto_resize": False},
        **_TRUE,
    ),
    Joint(
        "qwen_image",
        lambda: qwen("QwenImageImg2ImgPipeline", {"vae": _qwen_vae()}),
        _qwen_text,
        pipeline="QwenImageImg2ImgPipeline",
        first="img_in",
        image=True,
        tier="thorough",
        size=_SIDES,
        extra={"strength": 1.0},
        rescaled=by_length(-1),
        **_TRUE,
    ),
    Joint(
        "qwen_inpaint",
        lambda: qwen("QwenImageInpaintPipeline", {"vae": _qwen_vae()}),
        _qwen_text,
        pipeline="QwenImageInpaintPipeline",
        first="img_in",
        image=True,
        batches=False,
        tier="thorough",
        size=_SIDES,
        extra=_MASK,
        rescaled=by_length(-1),
        **_TRUE,
    ),
    Joint(
        "qwen_controlnet",
        lambda: _qwen_controlnet("QwenImageControlNetPipeline"),
        together(_qwen_text, _control),
        pipeline="QwenImageControlNetPipeline",
        first="img_in",
        control="control_image",
        batches=False,
        tier="thorough",
        size=_SIDES,
        rescaled=by_length(-1),
        **_TRUE,
    ),
    Joint(
        "qwen_controlnet_inpaint",
        lambda: _qwen_controlnet("QwenImageControlNetInpaintPipeline", extra=4),
        together(_qwen_text, _masked),
        pipeline="QwenImageControlNetInpaintPipeline",
        first="img_in",
        control="control_image",
        batches=False,
        tier="thorough",
        size=_SIDES,
        rescaled=by_length(-1),
        **_TRUE,
    ),
    Joint(
        "qwen_edit",
        # Pictures that are given have a side of 1024.
        lambda: qwen("QwenImageEditPipeline", {"vae": _qwen_vae(6)}),
        _qwen_text,
        pipeline="QwenImageEditPipeline",
        first="img_in",
        batches=False,
        tier="thorough",
        size={"height": 256, "width": 256},
        extra={"image": images([0])[0]},
        rescaled=by_length(-1),
        **_TRUE,
    ),
    Joint(
        "cogvideox_video",
        lambda: cogvideox("CogVideoXVideoToVideoPipeline"),
        text(8, masked=False),
        pipeline="CogVideoXVideoToVideoPipeline",
        first="patch_embed.proj",
        rows=2,
        batches=False,
        tier="thorough",
        size=_SMALL,
        extra={"video": images(range(5)), "strength": 1.0},
    ),
    Joint(
        "cogvideox_control",
        lambda: cogvideox("CogVideoXFunControlPipeline", channels=8),
        text(8, masked=False),
        pipeline="CogVideoXFunControlPipeline",
        first="patch_embed.proj",
        rows=2,
        batches=False,
        tier="thorough",
        size=_SMALL,
        extra={"control_video": images(range(5))},
    ),
    Joint(
        "cogview4_control",
        lambda: cogview("4", "Control", channels=8, vae=_shifted_vae()),
        together(text(8, masked=False), _control),
        pipeline="CogView4ControlPipeline",
        first="patch_embed.proj",
        batches=False,
        tier="thorough",
        size=_SMALL,
        **_TWO,
    ),
    Joint(
        "hunyuan_video_image",
        lambda: hunyuan_video(
            "HunyuanVideoImageToVideoPipeline",
            {"vae": _hunyuan_vae()},
            in_channels=9,
            image_condition_type="latent_concat",
        ),
        _hunyuan_text,
        pipeline="HunyuanVideoImageToVideoPipeline",
        first="x_embedder.proj",
        batches=False,
        tier="thorough",
        size=_CLIP,
        extra={"image": images([0])[0]},
        **_TRUE,
    ),
    Joint(
        "hunyuan_video_replaced",
        lambda: hunyuan_video(
            "HunyuanVideoImageToVideoPipeline", {"vae": _hunyuan_vae()}, image_condition_type="token_replace"
        ),
        _hunyuan_text,
        pipeline="HunyuanVideoImageToVideoPipeline",
        first="x_embedder.proj",
        batches=False,
        tier="thorough",
        size=_CLIP,
        extra={"image": images([0])[0]},
        **_TRUE,
    ),
    Joint(
        "hunyuan_skyreels",
        lambda: hunyuan_video("HunyuanSkyreelsImageToVideoPipeline", {"vae": _hunyuan_vae()}, in_channels=8),
        _hunyuan_text,
        pipeline="HunyuanSkyreelsImageToVideoPipeline",
        first="x_embedder.proj",
        batches=False,
        tier="thorough",
        size=_CLIP,
        extra={"image": images([0])[0]},
        **_TRUE,
    ),
    Joint(
        "sd3_controlnet_inpaint",
        sd3_controlnet_inpaint,
        together(_sd3_text, _masked),
        pipeline="StableDiffusion3ControlNetInpaintingPipeline",
        first="pos_embed.proj",
        control="control_image",
        batches=False,
        tier="thorough",
        size=_SIDES,
    ),
]


_TINY = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 8}


def flux2(name: str = "Flux2KleinPipeline", **components: Any) -> Any:
    config = {**_TINY, "attention_head_dim": 16, "in_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
    transformer = model("Flux2Transformer2DModel", **config, guidance_embeds=False)
    vae = model(
        "AutoencoderKLFlux2",
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    return assemble(name, transformer=transformer, scheduler=_flow(), vae=vae, **components)


def krea2() -> Any:
    transformer = model(
        "Krea2Transformer2DModel",
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=8,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=8,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    return assemble("Krea2Pipeline", transformer=transformer, scheduler=_flow(), text_encoder_select_layers=(0, 1))


def _krea2_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, seed in (("", 100), ("negative_", 200)) if guided else (("", 100),):
        given[f"{name}prompt_embeds"] = torch.stack([seeded((TOKENS, 2, 8), seed + p) for p in prompts])
        given[f"{name}prompt_embeds_mask"] = torch.ones(len(prompts), TOKENS, dtype=torch.bool)
    return given


def ovis() -> Any:
    config = {**_TINY, "attention_head_dim": 16, "in_channels": 16, "out_channels": 16, "axes_dims_rope": (4, 4, 8)}
    return assemble("OvisImagePipeline", transformer=model("OvisImageTransformer2DModel", **config), scheduler=_flow())


def bria() -> Any:
    config = {**_TINY, "attention_head_dim": 8, "in_channels": 16, "axes_dims_rope": (0, 4, 4)}
    transformer = model("BriaTransformer2DModel", **config, pooled_projection_dim=None)
    return assemble("BriaPipeline", transformer=transformer, scheduler=_flow(), vae=_shifted_vae())


def prx(name: str = "PRXPipeline") -> Any:
    sizes = {"patch_size": 2, "in_channels": 4, "context_in_dim": 8, "hidden_size": 8, "num_heads": 2, "depth": 2}
    transformer = model("PRXTransformer2DModel", **sizes, axes_dim=[2, 2])
    return assemble(name, transformer=transformer, scheduler=_flow())


def ernie() -> Any:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 16, "in_channels": 4}
    transformer = model("ErnieImageTransformer2DModel", **sizes, out_channels=4, text_in_dim=8, rope_axes_dim=(4, 2, 2))
    return assemble("ErnieImagePipeline", transformer=transformer, scheduler=_flow())


def _ernie_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    names = (("", 100), ("negative_", 200)) if guided else (("", 100),)
    return {f"{name}prompt_embeds": [seeded((3 + p, 8), seed + p) for p in prompts] for name, seed in names}


def easy_animate() -> Any:
    transformer = model(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=8,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        patch_size=2,
    )
    vae = model(
        "AutoencoderKLMagvit",
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    return assemble("EasyAnimatePipeline", transformer=transformer, scheduler=_flow(), vae=vae)


AROUND_JOINT += [
    Joint(
        "flux2_given",
        flux2,
        text(8, masked=False),
        pipeline="Flux2KleinPipeline",
        first="x_embedder",
        tier="thorough",
        batches=False,
        size={"height": 64, "width": 64},
        extra={"image": images([0])[0]},
        **_TWO,
    ),
    Joint(
        "flux2_inpaint",
        lambda: flux2("Flux2KleinInpaintPipeline"),
        text(8, masked=False),
        pipeline="Flux2KleinInpaintPipeline",
        first="x_embedder",
        image=True,
        tier="thorough",
        batches=False,
        size=_SIDES,
        extra=_MASK,
        **_TWO,
    ),
    Joint(
        "flux2",
        flux2,
        text(8, masked=False),
        pipeline="Flux2KleinPipeline",
        first="x_embedder",
        tier="thorough",
        size={"height": 64, "width": 64},
        **_TWO,
    ),
    Joint(
        "krea2",
        krea2,
        _krea2_text,
        pipeline="Krea2Pipeline",
        first="img_in",
        tier="thorough",
        size={"height": 64, "width": 64},
        scale_beyond=1.0,
        off={"guidance_scale": 0.0},
        **_TWO,
    ),
    Joint(
        "ovis",
        ovis,
        text(8, masked=False),
        pipeline="OvisImagePipeline",
        first="x_embedder",
        tier="thorough",
        size=_SMALL,
        extra={"negative_prompt": None},
        **_TWO,
    ),
    Joint(
        "bria", bria, text(8, masked=False), pipeline="BriaPipeline", first="x_embedder", tier="thorough", size=_SMALL
    ),
    Joint(
        "prx",
        prx,
        lambda prompts, guided: {k: v.bool() if "mask" in k else v for k, v in text(8)(prompts, guided).items()},
        pipeline="PRXPipeline",
        first="img_in",
        # With guidance it has the time of one prompt.
        batches=False,
        tier="thorough",
        size=_SMALL,
        extra={"use_resolution_binning": False},
    ),
    Joint(
        "ernie",
        ernie,
        _ernie_text,
        pipeline="ErnieImagePipeline",
        first="x_embedder.proj",
        tier="thorough",
        size=_SMALL,
    ),
    Joint(
        "easy_animate",
        easy_animate,
        text(8),
        pipeline="EasyAnimatePipeline",
        first="proj",
        tier="thorough",
        rows=2,
        size=_CLIP,
    ),
]


def framepack() -> Any:
    config = {**_HUNYUAN_VIDEO, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True}
    transformer = model("HunyuanVideoFramepackTransformer3DModel", **config)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {
        "image_encoder": SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=16)).eval(),
        "feature_extractor": SiglipImageProcessor(size={"height": 32, "width": 32}),
        "vae": _hunyuan_vae(),
    }
    return assemble("HunyuanVideoFramepackPipeline", transformer=transformer, scheduler=_flow(), **parts)


AROUND_JOINT += [
    Joint(
        "framepack",
        framepack,
        _hunyuan_text,
        pipeline="HunyuanVideoFramepackPipeline",
        first="x_embedder.proj",
        tier="thorough",
        image=True,
        # One section.
        size={**_SMALL, "num_frames": 5},
        extra={"latent_window_size": 2},
        **_TRUE,
        # It gives its sections one by one.
        read=lambda output: torch.cat(output.frames, 2),
    ),
    *Z_IMAGE,
]


AROUND_JOINT += PICTURES


def kandinsky3_image() -> Any:
    vae = model("VQModel", block_out_channels=(4, 4), latent_channels=4, norm_num_groups=2, num_vq_embeddings=4)
    return kandinsky3("Kandinsky3Img2ImgPipeline", movq=vae)


def kandinsky5_picture(name: str, **components: Any) -> Any:
    pipe = kandinsky5(name, **components)
    # Else the smallest picture has a side of 640.
    pipe.resolutions = [(32, 32)]
    return pipe


def any_flow() -> Any:
    transformer = model("AnyFlowTransformer3DModel", **WAN_CONFIG)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    return assemble("AnyFlowPipeline", transformer=transformer, scheduler=scheduler, vae=wan_vae())


def stable_audio3(name: str = "StableAudio3Pipeline") -> Any:
    transformer = model(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        cond_token_dim=8,
        global_cond_dim=8,
        local_add_cond_dim=5,
        timestep_features_dim=8,
        ff_mult=2,
        num_memory_tokens=3,
        use_differential_attention=False,
    )
    sizes = {"patch_size": 2, "encoder_channels": 4, "encoder_c_mults": (2,), "encoder_strides": (2,)}
    sizes |= {"encoder_transformer_depths": (1,), "dim_heads": 4, "ff_mult": 2, "sampling_rate": 16}
    vae = model("AutoencoderSAME", **sizes, audio_channels=2, latent_dim=4, use_differential_attention=False)
    for layer in vae.modules():
        if hasattr(layer, "weight_g"):
            # Weights that are computed cannot be copied.
            torch.nn.utils.remove_weight_norm(layer)
    torch.manual_seed(0)
    parts = {"vae": vae, "duration_embedder": StableAudio3DurationEmbedder(output_dim=8, fourier_dim=8)}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    return assemble(name, transformer=transformer, scheduler=scheduler, **parts)


def _audio3_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    given = text(8)(prompts, guided)
    return {name.replace("prompt_attention", "encoder_attention"): value for name, value in given.items()}


def _audio3_positive(prompts: list[int], guided: bool) -> dict[str, Any]:
    return _audio3_text(prompts, False)


_SOUND = seeded((1, 2, 32), 800)


def text_to_video(name: str = "TextToVideoSDPipeline", **components: Any) -> Any:
    unet = model(
        "UNet3DConditionModel",
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return assemble(name, unet=unet, scheduler=scheduler, **{"vae": _picture_vae(), **components})


def controlnet_xs(source: tuple[str, str], name: str) -> Any:
    unet = load_golden(*source).unet
    sizes = {"size_ratio": 0.5, "conditioning_embedding_out_channels": (4,) * 4}
    torch.manual_seed(0)
    adapter = diffusers.ControlNetXSAdapter.from_unet(unet, num_attention_heads=2, **sizes)
    for parameter in adapter.parameters():
        if parameter.dim() > 1 and not parameter.any():
            # As it starts, it has no say.
            torch.nn.init.normal_(parameter, std=0.1)
    pipe = other(*source, name, controlnet=adapter)
    pipe.unet.eval()
    return pipe


def sana_world() -> Any:
    transformer = model(
        "SanaWMTransformer3DModel",
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=2,
        chunk_plucker_channels=12,
        caption_channels=8,
        mlp_ratio=1.0,
    )
    return assemble("SanaWMPipeline", transformer=transformer, scheduler=_flow(), vae=ltx2().vae)


def _world_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    given = text(8)(prompts, True)
    return {name: value if "mask" in name else value[:, None] for name, value in given.items()}


def _forward(frames: int) -> np.ndarray[Any, Any]:
    """Where a camera stands that goes straight on."""
    places = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    places[:, 2, 3] = np.arange(frames) / 10
    return places


_LTX2_KIND: dict[str, Any] = {
    "first": "proj_in",
    "guidance": 3.0,
    "never": "_to_",
    "tier": "thorough",
    "off": {"guidance_scale": 1.0, "audio_guidance_scale": 1.0},
    "second_scale": 4.0,
    "size": {"height": 32, "width": 32, "num_frames": 3},
}
# The layers of a UNet that are about one frame, not about several.
_IN_FRAMES = tuple(f".attentions.{place}.transformer_blocks.0.attn2" for place in (0, 1))
_HDR_CALL = {name: value for name, value in _LTX2_CALL.items() if "audio" not in name}

AROUND = [
    Kind(
        "kandinsky3_image",
        kandinsky3_image,
        _kandinsky3_text,
        pipeline="Kandinsky3Img2ImgPipeline",
        denoiser="unet",
        first="conv_in",
        cross=_KANDINSKY3_CROSS,
        never="add_time_condition",
        scale_beyond=1.0,
        image=True,
        tier="thorough",
        extra={"strength": 1.0},
    ),
    Kind(
        "ltx2_condition",
        lambda: ltx2("LTX2ConditionPipeline"),
        text(8),
        pipeline="LTX2ConditionPipeline",
        batches=False,
        extra={**_LTX2_CALL, "conditions": LTX2VideoCondition(images([0])[0], crf=0)},
        **_LTX2_KIND,
    ),
    Kind(
        "ltx2_context",
        lambda: ltx2("LTX2InContextPipeline"),
        text(8),
        pipeline="LTX2InContextPipeline",
        batches=False,
        extra={**_LTX2_CALL, "reference_conditions": LTX2ReferenceCondition(images([0]))},
        **_LTX2_KIND,
    ),
    Kind(
        "ltx2_hdr",
        lambda: ltx2("LTX2HDRPipeline"),
        text(8),
        pipeline="LTX2HDRPipeline",
        batches=False,
        extra=_HDR_CALL,
        # Its sound is not guided.
        **_LTX2_KIND | {"off": {"guidance_scale": 1.0}, "second_scale": 0.0},
    ),
]

AROUND += [
    Kind(
        "text_to_video",
        text_to_video,
        text(8, masked=False),
        pipeline="TextToVideoSDPipeline",
        denoiser="unet",
        first="conv_in",
        cross=_IN_FRAMES,
        rows=2,
        tier="thorough",
        size={"height": 64, "width": 64, "num_frames": 2},
    ),
    Kind(
        "video_to_video",
        lambda: text_to_video("VideoToVideoSDPipeline"),
        text(8, masked=False),
        pipeline="VideoToVideoSDPipeline",
        denoiser="unet",
        first="conv_in",
        cross=_IN_FRAMES,
        rows=2,
        tier="thorough",
        batches=False,
        extra={"video": images(range(2)), "strength": 1.0},
    ),
    Kind(
        "controlnet_xs",
        lambda: controlnet_xs(GOLDEN_SD, "StableDiffusionControlNetXSPipeline"),
        text(32, masked=False),
        pipeline="StableDiffusionControlNetXSPipeline",
        denoiser="unet",
        first="base_conv_in",
        never="ctrl_",
        image=True,
        tier="thorough",
    ),
    Kind(
        "controlnet_xs_xl",
        lambda: controlnet_xs(GOLDEN_XL, "StableDiffusionXLControlNetXSPipeline"),
        together(text(32, masked=False), pooled(32)),
        pipeline="StableDiffusionXLControlNetXSPipeline",
        denoiser="unet",
        first="base_conv_in",
        never="ctrl_",
        image=True,
        tier="thorough",
    ),
]

AROUND += [
    Kind(
        "sana_world",
        sana_world,
        _world_text,
        pipeline="SanaWMPipeline",
        first="x_embedder.proj",
        cross="cross_attn",
        own=False,
        tier="thorough",
        batches=False,
        size={"height": 8, "width": 8, "num_frames": 3},
        extra={"image": images([0])[0], "prompt": "", "c2w": _forward(3), "intrinsics": [64.0, 64.0, 32.0, 32.0]},
    ),
    Kind(
        "any_flow",
        any_flow,
        text(8, masked=False),
        pipeline="AnyFlowPipeline",
        first="patch_embedding",
        tier="thorough",
        size=_SHORT,
    ),
    Kind(
        "stable_audio3",
        stable_audio3,
        _audio3_text,
        pipeline="StableAudio3Pipeline",
        first="proj_in",
        cross="cross_attn",
        tier="thorough",
        extra={"duration": 2.0},
    ),
    Kind(
        "stable_audio3_audio",
        lambda: stable_audio3("StableAudio3AudioToAudioPipeline"),
        _audio3_positive,
        pipeline="StableAudio3AudioToAudioPipeline",
        first="proj_in",
        cross="cross_attn",
        kept="",
        tier="thorough",
        extra={"duration": 2.0, "audio": _SOUND, "init_noise_level": 0.8},
        off={},
        left_out=("guidance_scale",),
    ),
    Kind(
        "stable_audio3_inpaint",
        lambda: stable_audio3("StableAudio3InpaintPipeline"),
        _audio3_positive,
        pipeline="StableAudio3InpaintPipeline",
        first="proj_in",
        cross="cross_attn",
        kept="",
        tier="thorough",
        extra={"duration": 2.0, "audio": _SOUND, "mask_start_seconds": 0.5, "mask_end_seconds": 1.5},
        off={},
        left_out=("guidance_scale",),
    ),
]

AROUND_TWO = [
    Sequential(
        "kandinsky5_image_video",
        lambda: kandinsky5("Kandinsky5I2VPipeline", vae=_hunyuan_vae()),
        _kandinsky5_text,
        pipeline="Kandinsky5I2VPipeline",
        first="visual_embeddings.in_layer",
        cross="cross_attention",
        tier="thorough",
        size={**_SHORT, "num_frames": 17},
        batches=False,
        extra={"image": images([0])[0]},
    ),
    Sequential(
        "kandinsky5_picture",
        lambda: kandinsky5_picture("Kandinsky5T2IPipeline", visual_cond=False),
        _kandinsky5_text,
        pipeline="Kandinsky5T2IPipeline",
        first="visual_embeddings.in_layer",
        cross="cross_attention",
        tier="thorough",
        size=_SMALL,
    ),
    Sequential(
        "kandinsky5_image",
        lambda: kandinsky5_picture("Kandinsky5I2IPipeline", vae=_picture_vae()),
        _kandinsky5_text,
        pipeline="Kandinsky5I2IPipeline",
        first="visual_embeddings.in_layer",
        cross="cross_attention",
        tier="thorough",
        size=_SMALL,
        batches=False,
        extra={"image": images([0])[0]},
    ),
    Sequential(
        "cosmos25",
        lambda: cosmos("Cosmos2_5_PredictBasePipeline", channels=5, vae=wan_vae()),
        text(8, masked=False),
        pipeline="Cosmos2_5_PredictBasePipeline",
        first="patch_embed.proj",
        scale_beyond=1.0,
        tier="thorough",
        size={"height": 32, "width": 32, "num_frames": 9},
        batches=False,
        extra={"video": images(range(5))},
    ),
    Sequential(
        "helios_pyramid",
        lambda: helios("HeliosPyramidPipeline"),
        text(8, masked=False),
        pipeline="HeliosPyramidPipeline",
        first="patch_embedding",
        tier="thorough",
        size=_SHORT,
        extra={"num_latent_frames_per_chunk": 2, "pyramid_num_inference_steps_list": [6]},
        # Its steps are given stage by stage.
        left_out=("num_inference_steps",),
    ),
]

AROUND += SOUND
AROUND_TWO += SOUND_TWO
