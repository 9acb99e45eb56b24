"""Tiny real pipelines of families whose guidance is two calls of the denoiser."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.zoo.case import images, seeded
from tests.zoo.cross_attention import (
    SHAPES,
    TOKENS,
    Kind,
    _flow,
    assemble,
    model,
    text,
    wan_vae,
)

# Its guidance is two calls.
Sequential = functools.partial(Kind, calls=2)

WAN_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}

_WAN_DENOISERS = {
    "WanVACEPipeline": "WanVACETransformer3DModel",
    "WanAnimatePipeline": "WanAnimateTransformer3DModel",
    "ChronoEditPipeline": "ChronoEditTransformer3DModel",
    "SkyReelsV2Pipeline": "SkyReelsV2Transformer3DModel",
    "SkyReelsV2ImageToVideoPipeline": "SkyReelsV2Transformer3DModel",
}

_FROM_PICTURE = {"image_dim": 8, "added_kv_proj_dim": 24, "num_layers": 1}

_FACES = {
    "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
    "motion_encoder_size": 16,
    "motion_style_dim": 4,
    "motion_dim": 2,
    "motion_encoder_dim": 4,
    "face_encoder_hidden_dim": 4,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 1,
}


def chronoedit() -> Any:
    pipe = wan("ChronoEditPipeline", in_channels=12, **_FROM_PICTURE)
    # It shortens what the scheduler remembers when it drops frames.
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return pipe


def helios(name: str = "HeliosPipeline") -> Any:
    config = {key: value for key, value in WAN_CONFIG.items() if key != "rope_max_seq_len"}
    memory = {"has_multi_term_memory_patch": True, "guidance_cross_attn": True, "zero_history_timestep": True}
    transformer = model("HeliosTransformer3DModel", **config, **memory, rope_dim=(4, 4, 4), is_amplify_history=False)
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    return assemble(name, transformer=transformer, scheduler=scheduler, vae=wan_vae())


def wan(name: str = "WanPipeline", seconds: bool = False, **changed: Any) -> Any:
    config = WAN_CONFIG | changed
    kind = _WAN_DENOISERS.get(name, "WanTransformer3DModel")
    parts = {"transformer": model(kind, **config), "scheduler": _flow()}
    if seconds:
        parts["transformer_2"] = model("WanTransformer3DModel", seed=1, **config)
        parts["boundary_ratio"] = 0.6
    if name != "WanPipeline":
        parts["vae"] = wan_vae()
    if "image_dim" in changed:
        sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 8, "intermediate_size": 8}
        vision = CLIPVisionConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
        torch.manual_seed(0)
        parts["image_encoder"] = CLIPVisionModel(vision).eval()
        parts["image_processor"] = CLIPImageProcessor(crop_size=32, size=32)
    return assemble(name, **parts)


def longcat() -> Any:
    transformer = model(
        "LongCatAudioDiTTransformer", dit_dim=8, dit_depth=2, dit_heads=2, dit_text_dim=8, latent_dim=4, text_conv=False
    )
    vae = model(
        "LongCatAudioDiTVae",
        channels=4,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=4,
        encoder_latent_dim=4,
        downsampling_ratio=2,
        sample_rate=8,
    )
    # What is drawn ends before it, and its weights cannot be copied.
    vae.encoder = vae.decoder = torch.nn.Linear(1, 1)
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_heads": 1, "d_kv": 4, "d_ff": 4, "vocab_size": len(tokenizer)}
    encoder = UMT5EncoderModel(UMT5Config(d_model=8, **sizes)).eval()
    components = {"transformer": transformer, "vae": vae, "tokenizer": tokenizer, "text_encoder": encoder}
    return assemble("LongCatAudioDiTPipeline", **components)


def _words(prompts: list[int], guided: bool) -> dict[str, Any]:
    return {"prompt": ["a small blue square" + ", on a grey background" * p for p in prompts]}


def kandinsky5(name: str = "Kandinsky5T2VPipeline", visual_cond: bool = True, **components: Any) -> Any:
    transformer = model(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=4,
        time_dim=8,
        model_dim=12,
        ff_dim=12,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 2),
        visual_cond=visual_cond,
    )
    return assemble(name, transformer=transformer, scheduler=_flow(shift=7.0), **components)


def _kandinsky5_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, seed in (("", 100), ("negative_", 200)) if guided else (("", 100),):
        given[f"{name}prompt_embeds_qwen"] = torch.stack([seeded((TOKENS, 8), seed + p) for p in prompts])
        given[f"{name}prompt_embeds_clip"] = torch.stack([seeded((4,), seed + 50 + p) for p in prompts])
        given[f"{name}prompt_cu_seqlens"] = torch.arange(len(prompts) + 1) * TOKENS
    return given


class _Safe(torch.nn.Module):
    """In the place of a checker that is downloaded."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True


def cosmos(name: str, channels: int = 4, **components: Any) -> Any:
    transformer = model(
        "CosmosTransformer3DModel",
        in_channels=channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=1,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    if name in ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"):
        scheduler = diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
        )
    else:
        scheduler = _flow(use_karras_sigmas=True)
    return assemble(name, transformer=transformer, scheduler=scheduler, safety_checker=_Safe(), **components)


def _cosmos_vae() -> Any:
    return model(
        "AutoencoderKLCosmos",
        latent_channels=4,
        encoder_block_out_channels=(4, 4, 4, 4),
        decode_block_out_channels=(4, 4, 4, 4),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


_VIDEOS = {"pose_video": 10, "face_video": 20}

_SHORT = {"height": 32, "width": 32, "num_frames": 5}

# Guidance of these is two calls.
TWO_CALLS = [
    Sequential("wan", wan, text(8, masked=False), pipeline="WanPipeline", first="patch_embedding", size=_SHORT),
    Sequential(
        "wan_experts",
        lambda: wan(seconds=True),
        text(8, masked=False),
        pipeline="WanPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"guidance_scale_2": 3.0},
    ),
    Sequential(
        "wan_image",
        lambda: wan("WanImageToVideoPipeline", in_channels=12, **_FROM_PICTURE),
        # Its layers count 512 tokens of text from the end.
        text(8, masked=False, tokens=512),
        pipeline="WanImageToVideoPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"image": images([0])[0]},
        tier="slow",
    ),
    Sequential(
        "wan_vace",
        lambda: wan("WanVACEPipeline", vace_layers=[0], vace_in_channels=72),
        text(8, masked=False),
        pipeline="WanVACEPipeline",
        first="patch_embedding",
        size=_SHORT,
        batches=False,
        tier="slow",
    ),
    Sequential(
        "wan_animate",
        lambda: wan("WanAnimatePipeline", in_channels=12, latent_channels=4, **_FROM_PICTURE, **_FACES),
        text(8, masked=False, tokens=512),
        pipeline="WanAnimatePipeline",
        first="patch_embedding",
        never="face_adapter",
        size={"height": 32, "width": 32, "segment_frame_length": 5},
        extra={"image": images([0])[0], **{kind: images(range(n, n + 5)) for kind, n in _VIDEOS.items()}},
    ),
    Sequential(
        "chronoedit",
        chronoedit,
        text(8, masked=False, tokens=512),
        pipeline="ChronoEditPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"image": images([0])[0]},
    ),
    Sequential(
        "helios",
        helios,
        text(8, masked=False),
        pipeline="HeliosPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"num_latent_frames_per_chunk": 2},
    ),
    Sequential(
        "skyreels",
        lambda: wan("SkyReelsV2Pipeline"),
        text(8, masked=False),
        pipeline="SkyReelsV2Pipeline",
        first="patch_embedding",
        size=_SHORT,
        tier="slow",
    ),
    Sequential(
        "cosmos",
        lambda: cosmos("CosmosTextToWorldPipeline"),
        text(8, masked=False),
        pipeline="CosmosTextToWorldPipeline",
        first="patch_embed.proj",
        scale_beyond=1.0,
        size={"height": 32, "width": 32, "num_frames": 9},
        tier="slow",
    ),
    Sequential(
        "cosmos2",
        lambda: cosmos("Cosmos2TextToImagePipeline"),
        text(8, masked=False),
        pipeline="Cosmos2TextToImagePipeline",
        first="patch_embed.proj",
        scale_beyond=1.0,
        size={"height": 32, "width": 32},
    ),
    Sequential(
        "wan_video",
        lambda: wan("WanVideoToVideoPipeline"),
        text(8, masked=False),
        pipeline="WanVideoToVideoPipeline",
        first="patch_embedding",
        size={"height": 32, "width": 32},
        extra={"video": images(range(5)), "strength": 1.0},
        batches=False,
    ),
    Sequential(
        "lucy",
        lambda: wan("LucyEditPipeline", in_channels=8),
        text(8, masked=False),
        pipeline="LucyEditPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"video": images(range(5))},
        batches=False,
    ),
    Sequential(
        "skyreels_image",
        lambda: wan("SkyReelsV2ImageToVideoPipeline", in_channels=12, **_FROM_PICTURE),
        text(8, masked=False, tokens=512),
        pipeline="SkyReelsV2ImageToVideoPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"image": images([0])[0]},
        batches=False,
    ),
    Sequential(
        "cosmos_video",
        lambda: cosmos("CosmosVideoToWorldPipeline", channels=5, vae=_cosmos_vae()),
        text(8, masked=False),
        pipeline="CosmosVideoToWorldPipeline",
        first="patch_embed.proj",
        scale_beyond=1.0,
        size={"height": 32, "width": 32, "num_frames": 9},
        extra={"image": images([0])[0]},
        batches=False,
    ),
    Sequential(
        "cosmos2_video",
        lambda: cosmos("Cosmos2VideoToWorldPipeline", channels=5, vae=wan_vae()),
        text(8, masked=False),
        pipeline="Cosmos2VideoToWorldPipeline",
        first="patch_embed.proj",
        scale_beyond=1.0,
        size={"height": 32, "width": 32, "num_frames": 9},
        extra={"image": images([0])[0]},
        batches=False,
    ),
    Sequential(
        "longcat",
        longcat,
        _words,
        pipeline="LongCatAudioDiTPipeline",
        first="input_embed.proj",
        cross="cross_attn",
        extra={"audio_duration_s": 2.0, "negative_prompt": "music"},
    ),
    Sequential(
        "kandinsky5",
        kandinsky5,
        _kandinsky5_text,
        pipeline="Kandinsky5T2VPipeline",
        first="visual_embeddings.in_layer",
        cross="cross_attention",
        size=_SHORT,
    ),
]
