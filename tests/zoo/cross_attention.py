"""Tiny real pipelines of the families beyond UNets and PixArt: random weights, a few numbers wide."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from tests.support.paths import ROOT
from tests.zoo.case import IS_OLD, Case, images, quiet, seeded

try:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
except ImportError:
    # The oldest diffusers has no LTX-2.
    LTX2TextConnectors = None

SHAPES = ROOT / "examples/models/shapes-sd"
TOKENS = 5


# A transformer with layers of cross-attention, all of which are gated.
Kind = functools.partial(Case, denoiser="transformer", kept="conditional", size={}, way={"cross_attention": True})


def text(width: int, masked: bool = True, suffix: str = "", tokens: int = TOKENS) -> Callable[..., dict[str, Any]]:
    """Text embeddings, with masks that differ from prompt to prompt."""

    def inputs(prompts: list[int], guided: bool) -> dict[str, Any]:
        given = {}
        for name, seed in (("", 100), ("negative_", 200)) if guided else (("", 100),):
            given[f"{name}prompt_embeds{suffix}"] = torch.stack([seeded((tokens, width), seed + p) for p in prompts])
            if masked:
                masks = [(torch.arange(tokens) < 3 + (p + seed // 100) % 3).long() for p in prompts]
                given[f"{name}prompt_attention_mask{suffix}"] = torch.stack(masks)
        return given

    return inputs


def together(*parts: Callable[..., dict[str, Any]], **more: Any) -> Callable[..., dict[str, Any]]:
    """Several kinds of conditioning in one call."""

    def inputs(prompts: list[int], guided: bool) -> dict[str, Any]:
        return {key: value for part in parts for key, value in part(prompts, guided).items()} | more

    return inputs


def assemble(name: str, **components: Any) -> Any:
    """A pipeline of these components; what is not given is left out."""
    cls = getattr(diffusers, name)
    required, optional = cls._get_signature_keys(cls)
    given = {**dict.fromkeys(required), **components}
    if "requires_safety_checker" in optional:
        given["requires_safety_checker"] = False
    return quiet(cls(**given))


def model(name: str, seed: int = 0, **config: Any) -> Any:
    """A model with random weights that are the same every time."""
    torch.manual_seed(seed)
    made = getattr(diffusers, name)(**config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1 and not parameter.any():
            # What starts at nothing shall have a say.
            torch.nn.init.normal_(parameter, std=0.1)
    return made


_SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": 8,
    "sample_size": 4,
}


def _flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def sana(name: str = "SanaPipeline", scheduler: Any = None, **config: Any) -> Any:
    transformer = model("SanaTransformer2DModel", **_SANA, **config)
    # The oldest diffusers sets a side of the tokenizer, whatever it is.
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    return assemble(name, transformer=transformer, tokenizer=tokenizer, scheduler=scheduler or _flow(shift=3.0))


def sana_vae() -> Any:
    return model(
        "AutoencoderDC",
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def sana_controlnet() -> Any:
    controlnet = model("SanaControlNetModel", **{**_SANA, "num_layers": 1})
    pipe = sana()
    parts = {"vae": sana_vae(), "transformer": pipe.transformer, "scheduler": pipe.scheduler}
    return assemble("SanaControlNetPipeline", controlnet=controlnet, **parts)


def _control(prompts: list[int], guided: bool) -> dict[str, Any]:
    return {"control_image": [image.resize((32, 32)) for image in images([p + 50 for p in prompts])]}


def ltx(name: str = "LTXPipeline") -> Any:
    transformer = model(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=8,
    )
    vae = model(
        "AutoencoderKLLTXVideo",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    # As in the real one, an image is one frame of the latent.
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return assemble(name, transformer=transformer, vae=vae, scheduler=_flow())


def ltx2(name: str = "LTX2Pipeline", **config: Any) -> Any:
    transformer = model(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=8,
        rope_double_precision=False,
        rope_type="split",
        # As version 2.3.
        perturbed_attn=True,
        cross_attn_mod=True,
        audio_cross_attn_mod=True,
        # Those of the VAE below.
        vae_scale_factors=(2, 2, 2),
        **config,
    )
    connectors = {
        f"{kind}_connector_{size}": number
        for kind in ("video", "audio")
        for size, number in {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    torch.manual_seed(0)
    components = {
        "connectors": LTX2TextConnectors(
            caption_channels=8,
            text_proj_in_factor=1,
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
            rope_type="split",
            **connectors,
        ).eval(),
        "vae": model(
            "AutoencoderKLLTX2Video",
            latent_channels=4,
            block_out_channels=(4,),
            decoder_block_out_channels=(4,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=1,
        ),
        "audio_vae": model(
            "AutoencoderKLLTX2Audio",
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            resolution=32,
            latent_channels=2,
            mel_bins=8,
        ),
    }
    return assemble(name, transformer=transformer, scheduler=_flow(), **components)


# Its further calls and rescaling off; the audio has a scale of its own.
_LTX2_CALL = {
    "audio_guidance_scale": 4.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
    "frame_rate": 25.0,
}

# A call with further guidance: without the attention of a layer, and kind by kind.
LTX2_FURTHER = {
    "stg_scale": 1.0,
    "modality_scale": 3.0,
    "audio_modality_scale": 3.0,
    "guidance_rescale": 0.7,
    "spatio_temporal_guidance_blocks": [1],
}

_HUNYUAN = {
    "in_channels": 4,
    "sample_size": 8,
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "hidden_size": 16,
    "cross_attention_dim": 8,
    "cross_attention_dim_t5": 8,
    "pooled_projection_dim": 4,
    "text_len": TOKENS,
    "text_len_t5": 4,
    "activation_fn": "gelu-approximate",
}


def hunyuan(name: str = "HunyuanDiTPipeline", **components: Any) -> Any:
    transformer = model("HunyuanDiT2DModel", **_HUNYUAN, num_layers=4)
    return assemble(name, transformer=transformer, scheduler=diffusers.DDIMScheduler(clip_sample=False), **components)


def _picture_vae() -> Any:
    return model(
        "AutoencoderKL",
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    )


def hunyuan_controlnet() -> Any:
    vae = _picture_vae()
    controlnet = model("HunyuanDiT2DControlNetModel", **_HUNYUAN, transformer_num_layers=4)
    return hunyuan("HunyuanDiTControlNetPipeline", vae=vae, controlnet=controlnet)


def latte() -> Any:
    transformer = model(
        "LatteTransformer3DModel",
        sample_size=4,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=8,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return assemble("LattePipeline", transformer=transformer, vae=_picture_vae(), scheduler=scheduler)


def allegro() -> Any:
    transformer = model(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=12,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        caption_channels=8,
    )
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    return assemble("AllegroPipeline", transformer=transformer, scheduler=scheduler)


def stable_audio() -> Any:
    transformer = model(
        "StableAudioDiTModel",
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        num_attention_heads=2,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    vae = model(
        "AutoencoderOobleck",
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    # What is drawn ends before it, and its weights cannot be copied.
    vae.encoder = vae.decoder = torch.nn.Linear(1, 1)
    projection = model("StableAudioProjectionModel", text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    components = {"transformer": transformer, "vae": vae, "projection_model": projection, "scheduler": scheduler}
    return assemble("StableAudioPipeline", **components)


def sana_video(name: str = "SanaVideoPipeline", scheduler: Any = None, **components: Any) -> Any:
    transformer = model("SanaVideoTransformer3DModel", **_SANA, rope_max_seq_len=32)
    scheduler = scheduler or diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    return assemble(name, transformer=transformer, scheduler=scheduler, **components)


def kandinsky3(name: str = "Kandinsky3Pipeline", **components: Any) -> Any:
    unet = model(
        "Kandinsky3UNet",
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        encoder_hid_dim=8,
    )
    return assemble(name, unet=unet, scheduler=diffusers.DDPMScheduler(clip_sample=False), **components)


def _kandinsky3_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    return {key.replace("prompt_attention", "attention"): value for key, value in text(8)(prompts, guided).items()}


def lumina() -> Any:
    transformer = model(
        "LuminaNextDiT2DModel",
        sample_size=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=4,
        cross_attention_dim=8,
    )
    for parameter in transformer.parameters():
        if not parameter.isfinite().all() or not parameter.any():
            # A token that is never used is not initialised, and a gate that is closed lets no text in.
            torch.nn.init.normal_(parameter)
    return assemble("LuminaPipeline", transformer=transformer, vae=_picture_vae(), scheduler=_flow())


_NO_TOKENS = {"vocab_size": 8, "bos_token_id": None, "eos_token_id": None}


def audioldm2() -> Any:
    unet = model(
        "AudioLDM2UNet2DConditionModel",
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        # As the real ones: one layer attends to itself, one to what a language model made of the text, one to the text.
        cross_attention_dim=[[None, 8, 16], [None, 8, 16]],
        attention_head_dim=2,
    )
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_heads": 1, "d_kv": 4, "d_ff": 4, "vocab_size": 8}
    encoder = T5EncoderModel(T5Config(d_model=16, **sizes)).eval()
    language = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=1, n_layer=1, n_positions=8, **_NO_TOKENS)).eval()
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=16,
            sampling_rate=16,
            upsample_initial_channel=4,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
            normalize_before=False,
        )
    ).eval()
    components = {"text_encoder_2": encoder, "language_model": language, "vocoder": vocoder, "vae": _picture_vae()}
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return assemble("AudioLDM2Pipeline", unet=unet, scheduler=scheduler, **components)


def _two_texts(prompts: list[int], guided: bool) -> dict[str, Any]:
    given = _kandinsky3_text(prompts, guided)
    for name, seed in (("", 100), ("negative_", 200)) if guided else (("", 100),):
        given[f"{name}prompt_embeds"] = torch.stack([seeded((TOKENS, 16), seed + p) for p in prompts])
        given[f"{name}generated_prompt_embeds"] = torch.stack([seeded((8, 8), seed + 50 + p) for p in prompts])
    return given


def picture_video() -> Any:
    unet = model(
        "I2VGenXLUNet",
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vision = CLIPVisionConfig(**sizes, projection_dim=8, image_size=32, patch_size=16)
    components = {
        "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
        "feature_extractor": CLIPImageProcessor(crop_size=32, size=32),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes, **_NO_TOKENS)).eval(),
        "vae": _picture_vae(),
    }
    return assemble("I2VGenXLPipeline", unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False), **components)


def _positive(prompts: list[int], guided: bool) -> dict[str, Any]:
    return text(8, masked=False)(prompts, False)


_PICTURE = {"height": 128, "width": 128}
_CLIP = {"height": 64, "width": 64, "num_frames": 9}
_SANA_CALL = {"use_resolution_binning": False, "negative_prompt": None}
_KANDINSKY3_CROSS = ("attentions.1.attention", "attentions.2.attention")
_HUNYUAN_CALL = {"use_resolution_binning": False}
_hunyuan_text = together(text(8), text(8, suffix="_2", tokens=4))

KINDS = [
    Kind("sana", sana, text(8), pipeline="SanaPipeline", first="patch_embed.proj", size=_PICTURE, extra=_SANA_CALL),
    Kind(
        "sana_controlnet",
        sana_controlnet,
        together(text(8), _control),
        pipeline="SanaControlNetPipeline",
        first="patch_embed.proj",
        size={"height": 32, "width": 32},
        extra=_SANA_CALL,
        control="control_image",
        tier="slow",
    ),
    Kind(
        "sana_sprint",
        lambda: sana(
            "SanaSprintPipeline",
            diffusers.SCMScheduler(),
            guidance_embeds=True,
            qk_norm="rms_norm_across_heads",
        ),
        lambda prompts, guided: text(8)(prompts, False),
        pipeline="SanaSprintPipeline",
        first="patch_embed.proj",
        kept="",
        size=_PICTURE,
        extra={"use_resolution_binning": False, "intermediate_timesteps": None},
        tier="slow",
    ),
    Kind("ltx", ltx, text(8), pipeline="LTXPipeline", first="proj_in", guidance=3.0, size=_CLIP),
    Kind(
        "ltx_image",
        lambda: ltx("LTXImageToVideoPipeline"),
        text(8),
        pipeline="LTXImageToVideoPipeline",
        first="proj_in",
        guidance=3.0,
        size={"height": 32, "width": 32, "num_frames": 9},
        image=True,
        extra={} if IS_OLD else {"guidance_rescale": 0.7},
        tier="slow",
    ),
    Kind(
        "ltx_condition",
        lambda: ltx("LTXConditionPipeline"),
        text(8),
        pipeline="LTXConditionPipeline",
        first="proj_in",
        guidance=3.0,
        size={"height": 32, "width": 32, "num_frames": 9},
        image=True,
        batches=False,
        tier="slow",
    ),
    Kind(
        "ltx2",
        ltx2,
        text(8),
        pipeline="LTX2Pipeline",
        first="proj_in",
        guidance=3.0,
        never="_to_",
        size={"height": 32, "width": 32, "num_frames": 3},
        extra=_LTX2_CALL,
        off={"guidance_scale": 1.0, "audio_guidance_scale": 1.0},
        second_scale=4.0,
    ),
    Kind(
        "ltx2_image",
        lambda: ltx2("LTX2ImageToVideoPipeline"),
        text(8),
        pipeline="LTX2ImageToVideoPipeline",
        first="proj_in",
        guidance=3.0,
        never="_to_",
        size={"height": 32, "width": 32, "num_frames": 3},
        image=True,
        extra={**_LTX2_CALL, "image_crf": 0},
        off={"guidance_scale": 1.0, "audio_guidance_scale": 1.0},
        second_scale=4.0,
        tier="slow",
    ),
    Kind(
        "hunyuan",
        hunyuan,
        _hunyuan_text,
        pipeline="HunyuanDiTPipeline",
        first="pos_embed.proj",
        guided_channels=4,
        size={"height": 64, "width": 64},
        extra=_HUNYUAN_CALL,
    ),
    Kind(
        "hunyuan_controlnet",
        hunyuan_controlnet,
        together(_hunyuan_text, _control),
        pipeline="HunyuanDiTControlNetPipeline",
        first="pos_embed.proj",
        guided_channels=4,
        size={"height": 32, "width": 32},
        extra=_HUNYUAN_CALL,
        control="control_image",
        batches=False,
        tier="slow",
    ),
    Kind(
        "latte",
        latte,
        text(8, masked=False),
        pipeline="LattePipeline",
        first="pos_embed.proj",
        rows=2,
        guided_channels=4,
        size={"height": 32, "width": 32, "video_length": 2},
        extra={
            "negative_prompt": None,
            "mask_feature": False,
            "clean_caption": False,
            "output_type": "latents" if IS_OLD else "latent",
        },
    ),
    Kind(
        "allegro",
        allegro,
        text(8),
        pipeline="AllegroPipeline",
        first="pos_embed.proj",
        rows=2,
        size={"height": 32, "width": 32, "num_frames": 8},
        extra={"negative_prompt": None, "clean_caption": False},
    ),
    Kind(
        "stable_audio",
        stable_audio,
        _positive,
        pipeline="StableAudioPipeline",
        first="proj_in",
        mean=False,
        extra={"audio_end_in_s": 2.0},
    ),
    Kind(
        "stable_audio_negative",
        stable_audio,
        text(8, masked=False),
        pipeline="StableAudioPipeline",
        first="proj_in",
        mean=False,
        extra={"audio_end_in_s": 2.0},
        tier="slow",
    ),
    Kind(
        "sana_video",
        sana_video,
        text(8),
        pipeline="SanaVideoPipeline",
        first="patch_embedding",
        size={"height": 32, "width": 32, "frames": 5},
        extra=_SANA_CALL,
    ),
    Kind(
        "sana_video_image",
        lambda: sana_video("SanaImageToVideoPipeline", _flow(), vae=wan_vae()),
        text(8),
        pipeline="SanaImageToVideoPipeline",
        first="patch_embedding",
        size={"height": 32, "width": 32, "frames": 5},
        extra={**_SANA_CALL, "image": images([0])[0]},
        batches=False,
        tier="slow",
    ),
    Kind(
        "kandinsky3",
        kandinsky3,
        _kandinsky3_text,
        pipeline="Kandinsky3Pipeline",
        denoiser="unet",
        first="conv_in",
        cross=_KANDINSKY3_CROSS,
        never="add_time_condition",
        scale_beyond=1.0,
        size={"height": 64, "width": 64},
    ),
    Kind(
        "lumina",
        lumina,
        text(8),
        pipeline="LuminaPipeline",
        first="patch_embedder.proj",
        conditional_first=True,
        guided_channels=4,
        size={"height": 64, "width": 64},
        extra={"negative_prompt": None, "clean_caption": False},
    ),
    Kind(
        "audioldm2",
        audioldm2,
        _two_texts,
        pipeline="AudioLDM2Pipeline",
        denoiser="unet",
        first="conv_in",
        cross=tuple(f"attentions.{place}.transformer_blocks.0.attn2" for place in (1, 2, 4, 5)),
        size={"audio_length_in_s": 16.0},
    ),
    Kind(
        "picture_video",
        picture_video,
        text(8, masked=False),
        pipeline="I2VGenXLPipeline",
        denoiser="unet",
        first="conv_in",
        cross=tuple(f".attentions.{place}.transformer_blocks.0.attn2" for place in (0, 1)),
        rows=2,
        size={"height": 64, "width": 64, "num_frames": 2},
        extra={"image": images([0])[0]},
        batches=False,
    ),
]


def wan_vae() -> Any:
    return model(
        "AutoencoderKLWan",
        base_dim=2,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
