"""Tiny real pipelines of the families beyond UNets and PixArt: random weights, a few numbers wide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.support.paths import ROOT
from tests.zoo.core import STEPS, Case, images, quiet, seeded
from tgate_processors import apply_tgate

try:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
except ImportError:
    # The oldest diffusers has no LTX-2.
    LTX2TextConnectors = None

SHAPES = ROOT / "examples/models/shapes-sd"
TOKENS = 5
# The oldest diffusers has other words for some things, and lacks this.
IS_OLD = not hasattr(diffusers, "LTXConditionPipeline")


@dataclass(frozen=True)
class Kind(Case):
    """
    A pipeline of a family.

    `guided_channels` is how many channels of the output guidance is about (`None`: all). Where guidance is dropped,
    layers keep the mean of both halves unless `mean` is false. Guidance multiplies the difference with its scale and
    `scale_beyond`.
    """

    denoiser: str = "transformer"
    kept: str = "conditional"
    guided_channels: int | None = None
    mean: bool = True
    scale_beyond: float = 0.0
    conditional_first: bool = False
    size: dict[str, int] = field(default_factory=dict)
    batches: bool = True
    # Without guidance.
    off: dict[str, float] = field(default_factory=lambda: {"guidance_scale": 1.0})
    # The scale of what it predicts besides.
    second_scale: float | None = None
    # Rows of its first layer for each sample.
    rows: int = 1
    # Whether self-attention is among its layers.
    own: bool = True

    def inputs(self, prompts: list[int], **overrides: Any) -> dict[str, Any]:
        scale = overrides.get("guidance_scale", self.guidance)
        inputs: dict[str, Any] = {
            "num_inference_steps": STEPS,
            "output_type": "latent",
            "generator": [torch.Generator().manual_seed(500 + p) for p in prompts],
            "guidance_scale": scale,
            **self.conditioning(prompts, scale > 1),
            **self.size,
            **self.extra,
        }
        if self.image:
            inputs["image"] = images(prompts)
        if not self.batches and not self.image:
            # Some take no list.
            inputs["generator"] = inputs["generator"][0]
        return inputs | overrides

    def run(self, pipe: Any, prompts: list[int] | None = None, **overrides: Any) -> torch.Tensor:
        # Encoders of pictures draw from torch's own generator.
        torch.manual_seed(0)
        output = pipe(**self.inputs([0] if prompts is None else prompts, **overrides))
        if "audio" in output:
            return torch.cat([part.flatten(1) for part in output.values()], 1)
        return next(iter(output.values()))

    def gate(self, pipe: Any, *args: Any, **settings: Any) -> Any:
        """Apply T-GATE, to cross-attention too where a family leaves that out by default."""
        return apply_tgate(pipe, *args, **{"cross_attention": True, **self.chosen(settings)})

    def chosen(self, settings: dict[str, Any]) -> dict[str, Any]:
        """These settings, with what a family cannot do without."""
        return settings

    @property
    def is_there(self) -> bool:
        """Whether this diffusers has it; the oldest one has some of the thorough ones, with other arguments."""
        return hasattr(diffusers, self.pipeline) and not (self.tier == "thorough" and IS_OLD)

    @property
    def is_guided(self) -> bool:
        return bool(self.kept)


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
    Kind("wan", wan, text(8, masked=False), pipeline="WanPipeline", first="patch_embedding", size=_SHORT),
    Kind(
        "wan_experts",
        lambda: wan(seconds=True),
        text(8, masked=False),
        pipeline="WanPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"guidance_scale_2": 3.0},
    ),
    Kind(
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
    Kind(
        "wan_vace",
        lambda: wan("WanVACEPipeline", vace_layers=[0], vace_in_channels=72),
        text(8, masked=False),
        pipeline="WanVACEPipeline",
        first="patch_embedding",
        size=_SHORT,
        batches=False,
        tier="slow",
    ),
    Kind(
        "wan_animate",
        lambda: wan("WanAnimatePipeline", in_channels=12, latent_channels=4, **_FROM_PICTURE, **_FACES),
        text(8, masked=False, tokens=512),
        pipeline="WanAnimatePipeline",
        first="patch_embedding",
        never="face_adapter",
        size={"height": 32, "width": 32, "segment_frame_length": 5},
        extra={"image": images([0])[0], **{kind: images(range(n, n + 5)) for kind, n in _VIDEOS.items()}},
    ),
    Kind(
        "chronoedit",
        chronoedit,
        text(8, masked=False, tokens=512),
        pipeline="ChronoEditPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"image": images([0])[0]},
    ),
    Kind(
        "helios",
        helios,
        text(8, masked=False),
        pipeline="HeliosPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"num_latent_frames_per_chunk": 2},
    ),
    Kind(
        "skyreels",
        lambda: wan("SkyReelsV2Pipeline"),
        text(8, masked=False),
        pipeline="SkyReelsV2Pipeline",
        first="patch_embedding",
        size=_SHORT,
        tier="slow",
    ),
    Kind(
        "cosmos",
        lambda: cosmos("CosmosTextToWorldPipeline"),
        text(8, masked=False),
        pipeline="CosmosTextToWorldPipeline",
        first="patch_embed.proj",
        scale_beyond=1.0,
        size={"height": 32, "width": 32, "num_frames": 9},
        tier="slow",
    ),
    Kind(
        "cosmos2",
        lambda: cosmos("Cosmos2TextToImagePipeline"),
        text(8, masked=False),
        pipeline="Cosmos2TextToImagePipeline",
        first="patch_embed.proj",
        scale_beyond=1.0,
        size={"height": 32, "width": 32},
    ),
    Kind(
        "wan_video",
        lambda: wan("WanVideoToVideoPipeline"),
        text(8, masked=False),
        pipeline="WanVideoToVideoPipeline",
        first="patch_embedding",
        size={"height": 32, "width": 32},
        extra={"video": images(range(5)), "strength": 1.0},
        batches=False,
    ),
    Kind(
        "lucy",
        lambda: wan("LucyEditPipeline", in_channels=8),
        text(8, masked=False),
        pipeline="LucyEditPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"video": images(range(5))},
        batches=False,
    ),
    Kind(
        "skyreels_image",
        lambda: wan("SkyReelsV2ImageToVideoPipeline", in_channels=12, **_FROM_PICTURE),
        text(8, masked=False, tokens=512),
        pipeline="SkyReelsV2ImageToVideoPipeline",
        first="patch_embedding",
        size=_SHORT,
        extra={"image": images([0])[0]},
        batches=False,
    ),
    Kind(
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
    Kind(
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
    Kind(
        "longcat",
        longcat,
        _words,
        pipeline="LongCatAudioDiTPipeline",
        first="input_embed.proj",
        cross="cross_attn",
        extra={"audio_duration_s": 2.0, "negative_prompt": "music"},
    ),
    Kind(
        "kandinsky5",
        kandinsky5,
        _kandinsky5_text,
        pipeline="Kandinsky5T2VPipeline",
        first="visual_embeddings.in_layer",
        cross="cross_attention",
        size=_SHORT,
    ),
]

BY_KIND = {kind.name: kind for kind in KINDS + TWO_CALLS}
