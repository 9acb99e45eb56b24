"""Tiny real pipelines that make music, and sound to a video: ACE-Step and Kandinsky 6."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import ClapTextConfig, ClapTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from tests.zoo.case import Case, images, seeded
from tests.zoo.cross_attention import SHAPES, TOKENS, Kind, _flow, assemble, audioldm2, model
from tests.zoo.sequential import _SHORT, Sequential

try:
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
except ImportError:
    AceStepConditionEncoder = None


def ace_step(**config: Any) -> Any:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    sizes |= {"intermediate_size": 8, "sliding_window": 2}
    transformer = model(
        "AceStepTransformer1DModel",
        **sizes,
        num_hidden_layers=2,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        **config,
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
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    torch.manual_seed(0)
    text = {"num_layers": 1, "num_heads": 1, "d_kv": 4, "d_ff": 4, "vocab_size": len(tokenizer)}
    encoder = T5EncoderModel(T5Config(d_model=8, **text)).eval()
    condition = AceStepConditionEncoder(
        **sizes,
        text_hidden_dim=8,
        timbre_hidden_dim=4,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    parts = {"vae": vae, "tokenizer": tokenizer, "text_encoder": encoder, "condition_encoder": condition}
    return assemble("AceStepPipeline", transformer=transformer, scheduler=scheduler, **parts)


def _music(prompts: list[int], guided: bool) -> dict[str, Any]:
    # As many tokens in each: there is no mask.
    return {"prompt": [f"a small {('blue', 'red')[p]} square" for p in prompts], "lyrics": ["a circle"] * len(prompts)}


def kandinsky6(grid: int = 1) -> Any:
    transformer = model(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        # Distilled ones give several predictions for each channel.
        out_visual_dim=4 * grid,
        in_audio_dim=4,
        out_audio_dim=4 * grid,
        in_text_dim=8,
        in_text_dim2=4,
        time_dim=8,
        model_dim=12,
        ff_dim=12,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 2),
        # As the real ones.
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )
    vae = model(
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
    audio_vae = model("MMAudioVAE", mel_bins=4, latent_channels=4, hidden_channels=4, n_fft=16)
    sizes = {"num_mels": 4, "upsample_initial_channel": 4, "upsample_rates": (2,), "upsample_kernel_sizes": (4,)}
    vocoder = model("MMAudioVocoder", **sizes, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1,),))
    parts = {"vae": vae, "audio_vae": audio_vae, "vocoder": vocoder}
    return assemble("Kandinsky6TI2VAPipeline", transformer=transformer, scheduler=_flow(shift=5.0), **parts)


def _kandinsky6_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    given = {}
    for name, seed in (("", 100), ("negative_", 200)) if guided else (("", 100),):
        given[f"{name}prompt_embeds"] = torch.stack([seeded((TOKENS, 8), seed + p) for p in prompts])
        given[f"pooled_{name}prompt_embeds".replace("pooled_negative", "negative_pooled")] = torch.stack(
            [seeded((4,), seed + 50 + p) for p in prompts]
        )
    return given


_KANDINSKY6: dict[str, Any] = {
    "pipeline": "Kandinsky6TI2VAPipeline",
    "first": "visual_embeddings.in_layer",
    "cross": ("video_dec_block.cross_attention", "audio_dec_block.cross_attention"),
    "size": _SHORT,
    "tier": "thorough",
}

SOUND = [
    Kind(
        "ace_step",
        ace_step,
        _music,
        pipeline="AceStepPipeline",
        first="proj_in_conv",
        cross="cross_attn",
        conditional_first=True,
        tier="thorough",
        extra={"audio_duration": 4.0},
        # Its guidance remembers that of the steps before, so that it cannot be dropped.
        needs={"guidance": "predict"},
    ),
]
SOUND_TWO = [
    Sequential("kandinsky6", kandinsky6, _kandinsky6_text, **_KANDINSKY6),
    Sequential("kandinsky6_silent", kandinsky6, _kandinsky6_text, **_KANDINSKY6, extra={"sample_audio": False}),
    Sequential(
        "kandinsky6_image", kandinsky6, _kandinsky6_text, **_KANDINSKY6, batches=False, extra={"image": images([0])[0]}
    ),
]


def _audioldm(name: str) -> Any:
    """A pipeline whose UNet is told the text together with the time."""
    unet = model(
        "UNet2DConditionModel",
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        attention_head_dim=2,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=8,
        class_embeddings_concat=True,
    )
    vae = model(
        "AutoencoderKL",
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = ClapTextModelWithProjection(ClapTextConfig(**sizes, projection_dim=8, vocab_size=8)).eval()
    parts = {"vae": vae, "text_encoder": encoder, "vocoder": audioldm2().vocoder}
    return assemble(name, unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False), **parts)


def _classes(prompts: list[int], guided: bool) -> dict[str, Any]:
    names = (("", 100), ("negative_", 200)) if guided else (("", 100),)
    return {f"{name}prompt_embeds": torch.stack([seeded((8,), seed + p) for p in prompts]) for name, seed in names}


def _class_conditioned(name: str) -> Case:
    more = {"size": {"audio_length_in_s": 16.0}, "extra": {"output_type": "pt"}, "denoiser": "unet", "first": "conv_in"}
    more["way"] = {"cross_attention": False}
    return Kind(
        name, lambda: _audioldm(f"{name}Pipeline"), _classes, pipeline=f"{name}Pipeline", tier="thorough", **more
    )


# Their layers attend to no text, so that guidance alone is gated.
CLASS_CONDITIONED = [_class_conditioned("AudioLDM"), _class_conditioned("MusicLDM")]
