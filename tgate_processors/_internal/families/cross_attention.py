"""Transformers whose cross-attention has an output of its own, with guidance in one batch or by two calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..denoiser.spec import AuxiliaryScale, Layout
from .family import Family


def _video_and_sound(tensors: list[torch.Tensor], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Video and sound of Kandinsky 6, without the last frame of the video where that is a reference image."""
    is_given = given.get("visual_token_type_ids") is not None
    return [tensors[0][:, :-1], *tensors[1:]] if is_given else tensors


_LTX2_SOUND = ("audio_hidden_states", "audio_encoder_hidden_states", "audio_encoder_attention_mask", "audio_timestep")
_LTX2_PLACES = ("video_coords", "audio_coords", "video_self_attention_mask", "video_keyframes_mask")
_HUNYUAN_TEXT = ("text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5")
# The keys of an image that the video begins with have a softmax apart from that of the text.
_WAN = Layout(calls_per_step=2, decoupled_image_attention=True, gates_cross_by_default=False)

CROSS_ATTENTION = (
    Family(
        "PixArtTransformer2DModel",
        "PixArt",
        default_cfg_half="unconditional",
        pipelines_without_callback=("PixArtAlphaPipeline", "PixArtSigmaPipeline", "PixArtSigmaPAGPipeline"),
    ),
    Family("SanaTransformer2DModel", "Sana", Layout(controlnet_residuals={"controlnet_block_samples": None})),
    Family("SanaVideoTransformer3DModel", "Sana Video", Layout(gates_cross_by_default=False)),
    # Its self-attention is no attention layer of diffusers'.
    Family(
        "SanaWMTransformer3DModel",
        "Sana-WM",
        Layout(
            batch_arguments=("mask", "camera_conditions", "chunk_plucker"),
            cross_attention_suffixes=("cross_attn",),
            gates_cross_by_default=False,
        ),
    ),
    # Its layers have no flag that says which of them attend to the text.
    Family(
        "LTXVideoTransformer3DModel",
        "LTX-Video",
        Layout(batch_arguments=("video_coords",), cross_attention_suffixes=("attn2",)),
    ),
    Family(
        "LTX2VideoTransformer3DModel",
        "LTX-2",
        Layout(
            batch_arguments=(*_LTX2_SOUND, "sigma", "audio_sigma", *_LTX2_PLACES),
            cross_attention_suffixes=("attn2",),
            # What these attend to is the other of video and sound.
            ungated_layers=("audio_to_video_attn", "video_to_audio_attn"),
            auxiliary_calls={
                "spatio_temporal_guidance_blocks": AuxiliaryScale(("_stg_scale", "_audio_stg_scale")),
                "isolate_modalities": AuxiliaryScale(("_modality_scale", "_audio_modality_scale"), offset=-1.0),
            },
            # Video and sound.
            guided_views=lambda tensors, given: tensors,
            scale_attributes=("_guidance_scale", "_audio_guidance_scale"),
            gates_cross_by_default=False,
        ),
    ),
    Family(
        "HunyuanDiT2DModel",
        "HunyuanDiT",
        Layout(
            batch_arguments=(*_HUNYUAN_TEXT, "image_meta_size", "style"),
            controlnet_residuals={"controlnet_block_samples": None},
        ),
    ),
    Family("LatteTransformer3DModel", "Latte"),
    # It reports its steps, but not its guidance.
    Family("AllegroTransformer3DModel", "Allegro", pipelines_without_callback=("AllegroPipeline",)),
    Family("LuminaNextDiT2DModel", "Lumina-Next", Layout(batch_arguments=("encoder_mask",), conditional_first=True)),
    Family(
        "Kandinsky5Transformer3DModel",
        "Kandinsky 5",
        Layout(
            cross_attention_suffixes=("cross_attention",),
            # The text is refined here, in a small part of the time.
            ungated_layers=("text_transformer_blocks",),
            calls_per_step=2,
            rereads_scale=True,
            gates_cross_by_default=False,
        ),
        # They report their steps, and guide where `guidance_scale` is above 1.
        pipelines_without_callback=tuple(f"Kandinsky5{kind}Pipeline" for kind in ("T2V", "I2V", "T2I", "I2I")),
    ),
    Family(
        "Kandinsky6Transformer3DModel",
        "Kandinsky 6",
        Layout(
            cross_attention_suffixes=("cross_attention",),
            # What the latter two attend to is the other of video and sound.
            ungated_layers=("text_transformer_blocks", "va_cross_attention", "av_cross_attention"),
            calls_per_step=2,
            guided_views=_video_and_sound,
            # A video may be made without its sound.
            optional_layers={"audio_dec_block": "audio_hidden_states"},
            gates_cross_by_default=False,
        ),
    ),
    # Without a negative prompt the unconditional half attends to nothing: its output is zero, and a mean would be half
    # of the text.
    Family(
        "StableAudioDiTModel",
        "Stable Audio",
        Layout(batch_arguments=("global_hidden_states",), averages_when_dropped=False),
        pipelines_without_callback=("StableAudioPipeline",),
    ),
    Family(
        "LongCatAudioDiTTransformer",
        "LongCat-AudioDiT",
        Layout(cross_attention_suffixes=("cross_attn",), calls_per_step=2, rereads_scale=True),
        pipelines_without_callback=("LongCatAudioDiTPipeline",),
    ),
    Family(
        "StableAudio3DiTModel",
        "Stable Audio 3",
        Layout(batch_arguments=("global_hidden_states",), cross_attention_suffixes=("cross_attn",)),
        # Their call knows no guidance.
        pipelines_without_callback=("StableAudio3AudioToAudioPipeline", "StableAudio3InpaintPipeline"),
    ),
    Family(
        "AceStepTransformer1DModel",
        "ACE-Step",
        Layout(
            batch_arguments=("timestep_r", "context_latents"),
            conditional_first=True,
            # A momentum of -0.75 lives in its loop (APG): where the halves are the same, three quarters of the last
            # update come back with the other sign, and a rest of them in every step after that.
            #
            # Errors are measured as those of plain guidance with the same scale: text + (scale - 1) * difference is
            # none + scale * difference, so nothing is to be added to it. APG makes the difference shorter, and with it
            # what is off in it and the output: the two errors are alike (tests/laws/test_audio.py compares them).
            has_momentum=True,
        ),
    ),
    # Version 2.2 has two denoisers, one for much noise and one for little.
    Family("WanTransformer3DModel", "Wan (2.1, 2.2)", _WAN, second_denoiser="transformer_2"),
    Family("WanVACETransformer3DModel", "Wan VACE", _WAN, second_denoiser="transformer_2"),
    # Faces are no text: what is seen of them changes from frame to frame.
    Family("WanAnimateTransformer3DModel", "Wan Animate", replace(_WAN, ungated_layers=("face_adapter",))),
    Family("SkyReelsV2Transformer3DModel", "SkyReels V2", _WAN),
    Family("HeliosTransformer3DModel", "Helios", _WAN),
    Family("ChronoEditTransformer3DModel", "ChronoEdit", _WAN),
    Family(
        "AnyFlowTransformer3DModel",
        "AnyFlow",
        Layout(batch_arguments=("r_timestep",), cross_attention_suffixes=("attn2",), gates_cross_by_default=False),
    ),
    # The difference is added to the conditional half.
    Family("CosmosTransformer3DModel", "Cosmos (1, 2, 2.5)", replace(_WAN, scale_offset=1.0)),
)
