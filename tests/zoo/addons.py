"""Tiny real pipelines of what people build around Stable Diffusion and PixArt."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any, get_type_hints

import diffusers
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.support.paths import ROOT
from tests.zoo.case import SIZE, Case, images, seeded
from tests.zoo.core import (
    GOLDEN_PIXART,
    GOLDEN_SD,
    GOLDEN_XL,
    controlnet,
    lcm_unet,
    load_golden,
    masked_text,
    no_inputs,
    other,
    pooled_text,
    sigma_transformer,
    text,
    with_scheduler,
)
from tests.zoo.cross_attention import _hunyuan_text, assemble, hunyuan, sana, sana_vae
from tests.zoo.cross_attention import text as masked

SHAPES = ROOT / "examples/models/shapes-sd"
FRAMES = 4
IMAGE_EMBEDDING = 16
IMAGE_TOKENS = 4


sd_text, xl_text = text(32), pooled_text(32, 32)


def with_inputs(base: Any, **more: Any) -> Any:
    """Conditioning with further inputs; a function gets the prompts."""

    def inputs(prompts: list[int], guided: bool) -> dict[str, Any]:
        values = {key: value(prompts, guided) if callable(value) else value for key, value in more.items()}
        return {**base(prompts, guided), **values}

    return inputs


def ip_adapter_weights(unet: Any, seed: int = 0, kind: str = "plain") -> dict[str, Any]:
    """A checkpoint of an IP-Adapter, in the form in which they are published."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    width, channels = unet.config.cross_attention_dim, unet.config.block_out_channels
    attention = {}
    key = 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor") or "motion_modules" in name:
            continue
        part, index = name.split(".")[:2]
        blocks = {"up_blocks": channels[::-1], "down_blocks": channels}
        hidden = blocks[part][int(index)] if part in blocks else channels[-1]
        attention[f"{key}.to_k_ip.weight"] = normal(hidden, width)
        attention[f"{key}.to_v_ip.weight"] = normal(hidden, width)
        key += 2
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    if kind == "plain":
        projection = {"proj.weight": normal(width * IMAGE_TOKENS, IMAGE_EMBEDDING)} | norm
        projection["proj.bias"] = torch.zeros(width * IMAGE_TOKENS)
    elif kind == "face_id":
        projection = {
            "proj.0.weight": normal(2 * IMAGE_EMBEDDING, IMAGE_EMBEDDING),
            "proj.0.bias": normal(2 * IMAGE_EMBEDDING),
            "proj.2.weight": normal(width * IMAGE_TOKENS, 2 * IMAGE_EMBEDDING),
            "proj.2.bias": normal(width * IMAGE_TOKENS),
        } | norm
    else:
        projection = _resampler(width, normal)
    return {"image_proj": projection, "ip_adapter": attention}


def _resampler(width: int, normal: Any) -> dict[str, torch.Tensor]:
    """Image projection of an IP-Adapter Plus: a perceiver with attention layers of its own."""
    inner = 64
    weights = {
        "latents": normal(1, IMAGE_TOKENS, width),
        "proj_in.weight": normal(width, IMAGE_EMBEDDING),
        "proj_in.bias": normal(width),
        "proj_out.weight": normal(width, width),
        "proj_out.bias": normal(width),
        "norm_out.weight": torch.ones(width),
        "norm_out.bias": torch.zeros(width),
    }
    for layer in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            weights[f"layers.{layer}.{norm}.weight"] = torch.ones(width)
            weights[f"layers.{layer}.{norm}.bias"] = torch.zeros(width)
        weights |= {
            f"layers.{layer}.0.to_q.weight": normal(inner, width),
            f"layers.{layer}.0.to_kv.weight": normal(2 * inner, width),
            f"layers.{layer}.0.to_out.weight": normal(width, inner),
            f"layers.{layer}.1.1.weight": normal(4 * width, width),
            f"layers.{layer}.1.3.weight": normal(width, 4 * width),
        }
    return weights


def load_ip_adapter(pipe: Any, *kinds: str) -> Any:
    """Load IP-Adapters as a user does."""
    weights = [ip_adapter_weights(pipe.unet, seed, kind) for seed, kind in enumerate(kinds)]
    pipe.load_ip_adapter(weights, subfolder=[""] * len(kinds), weight_name=[""] * len(kinds), image_encoder_folder=None)
    pipe.set_ip_adapter_scale([0.7, 0.4][: len(kinds)] if len(kinds) > 1 else 0.7)
    return pipe


def image_embeds(*shapes: tuple[int, ...]) -> Any:
    """Embeddings of one image for each IP-Adapter, the same for all prompts."""

    def inputs(prompts: list[int], guided: bool) -> list[torch.Tensor]:
        embeds = [seeded((1, *shape), 900 + index) for index, shape in enumerate(shapes)]
        return [torch.cat([torch.zeros_like(e), e]) if guided else e for e in embeds]

    return inputs


def _masks(prompts: list[int], guided: bool) -> dict[str, Any]:
    left = torch.zeros(1, 1, SIZE, SIZE)
    left[..., : SIZE // 2] = 1
    return {"ip_adapter_masks": [left, 1 - left]}


def lora(module: Any, seed: int = 0, rank: int = 2) -> dict[str, torch.Tensor]:
    """Weights of a LoRA for all attention layers, in diffusers' form."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, layer in module.named_modules():
        name = name.removesuffix(".base_layer")
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")) and isinstance(layer, torch.nn.Linear):
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) * 0.3
            weights[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * 0.3
    return weights


def load_lora(pipe: Any, **adapters: int) -> Any:
    """Load LoRAs as a user does, each by its name and seed."""
    for name, seed in adapters.items():
        pipe.load_lora_weights(lora(pipe.unet, seed), adapter_name=name)
    return pipe


def _two_loras(pipe: Any) -> Any:
    load_lora(pipe, first=0, second=1).set_adapters(["first", "second"], [0.9, 0.3])
    return pipe


def union() -> Any:
    """A ControlNet for several kinds of control at once."""
    unet = load_golden(*GOLDEN_XL).unet
    torch.manual_seed(0)
    shared = {
        key: value for key, value in unet.config.items() if key in signature(diffusers.ControlNetUnionModel).parameters
    }
    net = diffusers.ControlNetUnionModel(**shared, num_trans_channel=16, num_proj_channel=16)
    net.load_state_dict(unet.state_dict(), strict=False)
    for name, parameter in net.named_parameters():
        if name.startswith(("controlnet", "cond_embedding", "conv_in", "task_embedding", "spatial")):
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def _adapter(seed: int = 0, xl: bool = False) -> Any:
    torch.manual_seed(seed)
    kind = {"adapter_type": "full_adapter_xl", "downscale_factor": 16} if xl else {"downscale_factor": 8}
    return diffusers.T2IAdapter(in_channels=3, channels=[16, 32, 32], num_res_blocks=2, **kind).eval()


def motion_adapter(source: tuple[str, str]) -> Any:
    """Motion modules for a golden UNet, with a say in the picture: as they start, they have none."""
    unet = load_golden(*source).unet
    torch.manual_seed(0)
    adapter = diffusers.MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )
    for name, parameter in adapter.named_parameters():
        if "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapter.eval()


def sparse_controlnet() -> Any:
    torch.manual_seed(0)
    net = diffusers.SparseControlNetModel(
        in_channels=4,
        conditioning_channels=4,
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(16, 16),
        motion_num_attention_heads=4,
        use_simplified_condition_embedding=True,
    )
    for name, parameter in net.named_parameters():
        if name.startswith(("controlnet", "conv_in", "controlnet_cond_embedding")):
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def animate(pipeline_class: str, **components: Any) -> Any:
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    components |= {"motion_adapter": motion_adapter(GOLDEN_SD), "scheduler": scheduler}
    return other(*GOLDEN_SD, pipeline_class, **components)


def free_init(pipe: Any) -> Any:
    pipe.enable_free_init(num_iters=2, use_fast_sampling=True)
    return pipe


def wider_unet(source: tuple[str, str], in_channels: int, **config: Any) -> Any:
    """A golden UNet with more input channels or other conditions."""
    unet = load_golden(*source).unet
    torch.manual_seed(0)
    wide = diffusers.UNet2DConditionModel.from_config(unet.config, in_channels=in_channels, **config)
    shapes = {key: value.shape for key, value in wide.state_dict().items()}
    weights = {key: value for key, value in unet.state_dict().items() if shapes[key] == value.shape}
    wide.load_state_dict(weights, strict=False)
    return wide.eval()


def _vision(kind: Any = CLIPVisionModelWithProjection) -> Any:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        intermediate_size=37,
        patch_size=16,
    )
    return kind(config).eval()


def _latent_upscaler() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=[32, 32, 64, 64],
        time_cond_proj_dim=160,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=32,
        down_block_types=(
            "KDownBlock2D",
            "KCrossAttnDownBlock2D",
            "KCrossAttnDownBlock2D",
            "KCrossAttnDownBlock2D",
        ),
        in_channels=8,
        mid_block_type=None,
        only_cross_attention=False,
        out_channels=5,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    )
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample")
    return other(*GOLDEN_SD, "StableDiffusionLatentUpscalePipeline", unet=unet.eval(), scheduler=scheduler)


def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")


def text_encoder(kind: Any = CLIPTextModel, width: int = 32) -> Any:
    """A text encoder for the golden UNets."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        projection_dim=32,
    )
    return kind(config).eval()


def _boxes(prompts: list[int], guided: bool) -> list[list[float]]:
    return [[0.1, 0.1, 0.5, 0.6]]


HOSTS = [
    Case(
        "controlnet_inpaint",
        lambda: other(*GOLDEN_SD, "StableDiffusionControlNetInpaintPipeline", controlnet=controlnet(*GOLDEN_SD)),
        sd_text,
        image=True,
        mask=True,
        control="control_image",
        strength=1.0,
        row="ControlNet, inpainting",
    ),
    Case(
        "sdxl_controlnet_img2img",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLControlNetImg2ImgPipeline", controlnet=controlnet(*GOLDEN_XL)),
        xl_text,
        image=True,
        control="control_image",
        strength=0.99,
        row="ControlNet, image to image",
        tier="thorough",
    ),
    Case(
        "union",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLControlNetUnionPipeline", controlnet=union()),
        with_inputs(xl_text, control_image=lambda p, g: images([51, 52]), control_mode=[0, 3]),
        row="ControlNet-Union, two kinds of control",
        tier="slow",
    ),
    Case(
        "union_img2img",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLControlNetUnionImg2ImgPipeline", controlnet=union()),
        with_inputs(xl_text, control_image=lambda p, g: images([51]), control_mode=[1]),
        image=True,
        strength=0.99,
        row="ControlNet-Union, image to image",
        tier="thorough",
    ),
    Case(
        "union_inpaint",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLControlNetUnionInpaintPipeline", controlnet=union()),
        with_inputs(xl_text, control_image=lambda p, g: images([51]), control_mode=[1]),
        image=True,
        mask=True,
        strength=0.99,
        row="ControlNet-Union, inpainting",
        tier="thorough",
    ),
    Case(
        "adapter",
        lambda: other(*GOLDEN_SD, "StableDiffusionAdapterPipeline", adapter=_adapter()),
        with_inputs(sd_text, image=lambda p, g: images([50 + n for n in p])),
        row="T2I-Adapter",
        tier="thorough",
    ),
    Case(
        "multi_adapter",
        lambda: other(
            *GOLDEN_SD,
            "StableDiffusionAdapterPipeline",
            adapter=diffusers.MultiAdapter([_adapter(), _adapter(1)]),
        ),
        with_inputs(
            sd_text,
            image=lambda p, g: [images([50] * len(p)), images([60] * len(p))],
            adapter_conditioning_scale=[0.8, 0.3],
        ),
        row="several T2I-Adapters",
        tier="thorough",
    ),
    Case(
        "sdxl_adapter",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLAdapterPipeline", adapter=_adapter(xl=True)),
        with_inputs(xl_text, image=lambda p, g: images([50 + n for n in p]), adapter_conditioning_factor=0.5),
        row="T2I-Adapter, in the first half of the steps",
        tier="slow",
    ),
    Case(
        "gligen",
        lambda: other(
            *GOLDEN_SD,
            "StableDiffusionGLIGENPipeline",
            unet=wider_unet(GOLDEN_SD, 4, attention_type="gated"),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
        ),
        with_inputs(sd_text, gligen_phrases=["a red circle"], gligen_boxes=_boxes, gligen_scheduled_sampling_beta=0.5),
        kept="conditional",
        row="GLIGEN",
    ),
    Case(
        "ip_adapter",
        lambda: load_ip_adapter(load_golden(*GOLDEN_SD), "plain"),
        with_inputs(sd_text, ip_adapter_image_embeds=image_embeds((1, IMAGE_EMBEDDING))),
        row="IP-Adapter",
        tier="slow",
    ),
    Case(
        "sdxl_ip_adapter_plus",
        lambda: load_ip_adapter(load_golden(*GOLDEN_XL), "plus"),
        with_inputs(xl_text, ip_adapter_image_embeds=image_embeds((1, 5, IMAGE_EMBEDDING))),
        row="IP-Adapter Plus",
        tier="slow",
    ),
    Case(
        "sdxl_face_id",
        lambda: load_ip_adapter(load_golden(*GOLDEN_XL), "face_id"),
        with_inputs(xl_text, ip_adapter_image_embeds=image_embeds((1, IMAGE_EMBEDDING))),
        row="IP-Adapter FaceID",
        tier="slow",
    ),
    Case(
        "two_ip_adapters",
        lambda: load_ip_adapter(load_golden(*GOLDEN_SD), "plain", "plus"),
        with_inputs(
            sd_text,
            ip_adapter_image_embeds=image_embeds((1, IMAGE_EMBEDDING), (1, 5, IMAGE_EMBEDDING)),
            cross_attention_kwargs=_masks,
        ),
        row="two IP-Adapters with masks",
    ),
    Case("lora", lambda: load_lora(load_golden(*GOLDEN_SD), first=0), sd_text, row="LoRA"),
    Case(
        "sdxl_loras",
        lambda: _two_loras(load_golden(*GOLDEN_XL)),
        with_inputs(xl_text, cross_attention_kwargs={"scale": 0.6}),
        row="several LoRAs",
        tier="slow",
    ),
    Case(
        "lcm_lora",
        lambda: with_scheduler(load_lora(load_golden(*GOLDEN_XL), lcm=0), "LCMScheduler", clip_sample=False),
        xl_text,
        guidance=1.0,
        row="LCM-LoRA",
        tier="slow",
    ),
    Case(
        "tcd",
        lambda: with_scheduler(load_lora(load_golden(*GOLDEN_XL), tcd=0), "TCDScheduler", clip_sample=False),
        with_inputs(xl_text, eta=0.3),
        guidance=0.0,
        row="TCD",
        tier="slow",
    ),
    Case(
        "turbo",
        lambda: with_scheduler(load_golden(*GOLDEN_XL), "EulerAncestralDiscreteScheduler", timestep_spacing="trailing"),
        xl_text,
        guidance=0.0,
        row="Turbo, Lightning",
        tier="slow",
    ),
    Case(
        "lcm_img2img",
        lambda: with_scheduler(
            other(*GOLDEN_SD, "LatentConsistencyModelImg2ImgPipeline", unet=lcm_unet()),
            "LCMScheduler",
            clip_sample=False,
        ),
        with_inputs(lambda prompts, guided: sd_text(prompts, False)),
        guidance=8.5,
        image=True,
        strength=0.99,
        kept="",
        row="latent consistency, image to image",
        tier="slow",
    ),
    Case(
        "refiner",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLImg2ImgPipeline"),
        with_inputs(xl_text, denoising_start=0.3),
        image=True,
        strength=0.3,
        row="SDXL refiner",
        tier="slow",
    ),
    Case(
        "kolors",
        lambda: other(
            *GOLDEN_XL,
            "KolorsPipeline",
            unet=wider_unet(GOLDEN_XL, 4, encoder_hid_dim=24, encoder_hid_dim_type="text_proj"),
            text_encoder=None,
            tokenizer=None,
        ),
        pooled_text(24, 32),
        row="Kolors",
    ),
    Case(
        "image_variation",
        lambda: other(
            *GOLDEN_SD,
            "StableDiffusionImageVariationPipeline",
            image_encoder=_vision(),
            feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
        ),
        no_inputs,
        image=True,
        row="image variation",
    ),
    Case(
        "paint_by_example",
        lambda: other(
            *GOLDEN_SD,
            "PaintByExamplePipeline",
            unet=wider_unet(GOLDEN_SD, 9),
            image_encoder=_vision(get_type_hints(diffusers.PaintByExamplePipeline.__init__)["image_encoder"]),
            feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
        ),
        with_inputs(no_inputs, example_image=lambda prompts, guided: images([prompt + 60 for prompt in prompts])),
        image=True,
        mask=True,
        row="inpainting by an example",
        tier="thorough",
    ),
    Case(
        "depth2img",
        lambda: other(
            *GOLDEN_SD,
            "StableDiffusionDepth2ImgPipeline",
            unet=wider_unet(GOLDEN_SD, 5),
            depth_estimator=None,
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
        ),
        with_inputs(sd_text, depth_map=lambda p, g: torch.stack([seeded((SIZE, SIZE), 70 + n) for n in p])),
        image=True,
        strength=1.0,
        row="depth to image",
        tier="slow",
    ),
    Case(
        "x4_upscaler",
        lambda: other(
            *GOLDEN_SD,
            "StableDiffusionUpscalePipeline",
            unet=wider_unet(GOLDEN_SD, 7, only_cross_attention=(True, True, False), num_class_embeds=100),
            low_res_scheduler=diffusers.DDPMScheduler(),
        ),
        # Its latents are as large as the picture.
        with_inputs(sd_text, image=lambda p, g: [image.resize((SIZE // 4, SIZE // 4)) for image in images(p)]),
        size={},
        row="x4 upscaler",
        tier="slow",
    ),
    Case(
        "latent_upscaler",
        _latent_upscaler,
        with_inputs(xl_text, image=lambda p, g: torch.stack([seeded((4, 8, 8), 80 + n) for n in p])),
        size={},
        row="latent upscaler",
        tier="slow",
    ),
]


def _video(prompts: list[int], guided: bool) -> list[Any]:
    return _frames(FRAMES)


def _frames(count: int) -> list[Any]:
    return images([70 + frame for frame in range(count)])


def with_frames(host: Case, count: int) -> Case:
    """The same host with another number of frames."""

    def inputs(prompts: list[int], guided: bool) -> dict[str, Any]:
        given = host.conditioning(prompts, guided)
        videos = {key: _frames(count) for key in ("video", "conditioning_frames") if len(given.get(key, ())) == FRAMES}
        return given | videos | ({"num_frames": count} if "num_frames" in given else {})

    return replace(host, name=f"{host.name}-{count}", conditioning=inputs)


_ANIMATED = {"num_frames": FRAMES}
HOSTS += [
    Case("animatediff", lambda: animate("AnimateDiffPipeline"), with_inputs(sd_text, **_ANIMATED), row="AnimateDiff"),
    Case(
        "animatediff_free_init",
        lambda: free_init(animate("AnimateDiffPipeline")),
        with_inputs(sd_text, **_ANIMATED),
        row="AnimateDiff with FreeInit",
        tier="slow",
    ),
    Case(
        "animatediff_controlnet",
        lambda: animate("AnimateDiffControlNetPipeline", controlnet=controlnet(*GOLDEN_SD)),
        with_inputs(sd_text, conditioning_frames=_video, **_ANIMATED),
        batches=False,
        row="AnimateDiff with ControlNet",
        tier="slow",
    ),
    Case(
        "animatediff_sparse_controlnet",
        lambda: animate("AnimateDiffSparseControlNetPipeline", controlnet=sparse_controlnet()),
        with_inputs(
            sd_text,
            conditioning_frames=lambda p, g: images([70]),
            controlnet_frame_indices=[0],
            **_ANIMATED,
        ),
        row="AnimateDiff with SparseCtrl",
        tier="slow",
    ),
    Case(
        "animatediff_video",
        lambda: animate("AnimateDiffVideoToVideoPipeline"),
        with_inputs(sd_text, video=_video),
        strength=1.0,
        batches=False,
        row="AnimateDiff, video to video",
        tier="slow",
    ),
    Case(
        "animatediff_video_controlnet",
        lambda: animate("AnimateDiffVideoToVideoControlNetPipeline", controlnet=controlnet(*GOLDEN_SD)),
        with_inputs(sd_text, video=_video, conditioning_frames=_video),
        strength=1.0,
        batches=False,
        row="AnimateDiff, video to video with ControlNet",
        tier="thorough",
    ),
    Case(
        "animatediff_sdxl",
        lambda: other(*GOLDEN_XL, "AnimateDiffSDXLPipeline", motion_adapter=motion_adapter(GOLDEN_XL)),
        with_inputs(xl_text, **_ANIMATED),
        row="AnimateDiff SDXL",
        tier="slow",
    ),
]
HOSTS += [
    Case(
        "pix2pix",
        lambda: other(*GOLDEN_SD, "StableDiffusionInstructPix2PixPipeline", unet=wider_unet(GOLDEN_SD, 8)),
        with_inputs(sd_text, image_guidance_scale=1.5),
        image=True,
        guidance_parts=3,
        row="InstructPix2Pix",
    ),
    Case(
        "sdxl_pix2pix",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLInstructPix2PixPipeline", unet=wider_unet(GOLDEN_XL, 8)),
        with_inputs(xl_text, image_guidance_scale=1.5),
        image=True,
        guidance_parts=3,
        row="InstructPix2Pix",
        tier="thorough",
    ),
    Case(
        "pag",
        lambda: other(*GOLDEN_SD, "StableDiffusionPAGPipeline", pag_applied_layers=["mid"]),
        with_inputs(sd_text, pag_scale=2.0),
        guidance_parts=3,
        row="perturbed-attention guidance",
    ),
    Case(
        "pag_alone",
        lambda: other(*GOLDEN_XL, "StableDiffusionXLPAGPipeline", pag_applied_layers=["mid"]),
        with_inputs(xl_text, pag_scale=2.0),
        guidance=1.0,
        guidance_parts=2,
        row="only perturbed-attention guidance",
        tier="slow",
    ),
    Case(
        "pag_controlnet",
        lambda: other(
            *GOLDEN_SD,
            "StableDiffusionControlNetPAGPipeline",
            controlnet=controlnet(*GOLDEN_SD),
            pag_applied_layers=["mid"],
        ),
        with_inputs(sd_text, pag_scale=2.0),
        control="image",
        guidance_parts=3,
        row="perturbed-attention guidance with ControlNet",
        tier="thorough",
    ),
    Case(
        "pag_animatediff",
        lambda: animate("AnimateDiffPAGPipeline", pag_applied_layers=["mid"]),
        with_inputs(sd_text, pag_scale=2.0, **_ANIMATED),
        guidance_parts=3,
        row="perturbed-attention guidance, AnimateDiff",
        tier="thorough",
    ),
    Case(
        "pag_pixart",
        lambda: other(
            *GOLDEN_PIXART,
            "PixArtSigmaPAGPipeline",
            transformer=sigma_transformer(),
            pag_applied_layers=["blocks.1"],
        ),
        with_inputs(masked_text(24), pag_scale=2.0),
        denoiser="transformer",
        guidance=4.5,
        guidance_parts=3,
        row="perturbed-attention guidance, PixArt",
    ),
]


def pag_sana() -> Any:
    pipe = sana()
    # The oldest diffusers wants a VAE and a tokenizer.
    parts = {"vae": sana_vae(), "tokenizer": pipe.tokenizer}
    parts |= {"transformer": pipe.transformer, "scheduler": pipe.scheduler}
    return assemble("SanaPAGPipeline", **parts, pag_applied_layers=["transformer_blocks.0"])


def unclip(name: str, **components: Any) -> Any:
    """A picture is told as an embedding and how much noise was added to that."""
    unet = wider_unet(GOLDEN_SD, 4, class_embed_type="projection", projection_class_embeddings_input_dim=64)
    parts = {"image_noising_scheduler": diffusers.DDPMScheduler(), "text_encoder": text_encoder()}
    torch.manual_seed(0)
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=32)
    return other(*GOLDEN_SD, name, unet=unet, image_normalizer=normalizer, tokenizer=tokenizer(), **parts, **components)


def unclip_text() -> Any:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "embedding_dim": 32, "num_layers": 1}
    prior = diffusers.PriorTransformer(**sizes, num_embeddings=tokenizer().model_max_length)
    parts = {"prior": prior.eval(), "prior_tokenizer": tokenizer()}
    parts["prior_text_encoder"] = text_encoder(CLIPTextModelWithProjection)
    parts["prior_scheduler"] = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample")
    return unclip("StableUnCLIPPipeline", **parts)


def _words(prompts: list[int], guided: bool) -> dict[str, Any]:
    return {"prompt": ["a small blue square" + ", on a grey background" * p for p in prompts]}


HOSTS += [
    Case(
        "unclip",
        unclip_text,
        with_inputs(_words, prior_num_inference_steps=2),
        kept="conditional",
        tier="thorough",
        row="Stable unCLIP",
    ),
    Case(
        "unclip_image",
        lambda: unclip(
            "StableUnCLIPImg2ImgPipeline",
            image_encoder=_vision(),
            feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
        ),
        sd_text,
        kept="conditional",
        image=True,
        tier="thorough",
        row="Stable unCLIP, from an image",
    ),
    Case(
        "pag_sana",
        pag_sana,
        with_inputs(masked(8), pag_scale=2.0, use_resolution_binning=False, negative_prompt=None),
        denoiser="transformer",
        guidance=4.5,
        guidance_parts=3,
        tier="thorough",
        row="perturbed-attention guidance, Sana",
    ),
    Case(
        "pag_hunyuan",
        lambda: hunyuan("HunyuanDiTPAGPipeline", pag_applied_layers=["blocks.1"]),
        with_inputs(_hunyuan_text, pag_scale=2.0, use_resolution_binning=False),
        denoiser="transformer",
        guidance=4.5,
        guidance_parts=3,
        tier="thorough",
        row="perturbed-attention guidance, HunyuanDiT",
    ),
]
