"""Tiny real pipelines that make music, and sound to a video: ACE-Step and Kandinsky 6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from transformers import CLIPTokenizer, T5Config, T5EncoderModel

from tests.zoo.core import images, seeded
from tests.zoo.cross_attention import _SHORT, SHAPES, TOKENS, Kind, _flow, assemble, model

try:
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
except ImportError:
    AceStepConditionEncoder = None


@dataclass(frozen=True)
class Remembering(Kind):
    """Its guidance remembers that of the steps before, so that it cannot be dropped."""

    def chosen(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"guidance": "predict", **settings}


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
    Remembering(
        "ace_step",
        ace_step,
        _music,
        pipeline="AceStepPipeline",
        first="proj_in_conv",
        cross="cross_attn",
        conditional_first=True,
        tier="thorough",
        extra={"audio_duration": 4.0},
    ),
]
SOUND_TWO = [
    Kind("kandinsky6", kandinsky6, _kandinsky6_text, **_KANDINSKY6),
    Kind("kandinsky6_silent", kandinsky6, _kandinsky6_text, **_KANDINSKY6, extra={"sample_audio": False}),
    Kind(
        "kandinsky6_image", kandinsky6, _kandinsky6_text, **_KANDINSKY6, batches=False, extra={"image": images([0])[0]}
    ),
]
