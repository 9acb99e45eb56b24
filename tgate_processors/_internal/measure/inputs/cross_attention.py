"""What transformers with cross-attention take."""

from __future__ import annotations

import math
from typing import Any

from .shapes import InputShapes, InputSize, Shapes

_PICTURE = {"hidden_states": "B in_channels H W", "timestep": "B"}
_VIDEO = {"hidden_states": "B in_channels F H W", "timestep": "B"}
_CAPTION = {"encoder_hidden_states": "B T caption_channels", "encoder_attention_mask": "B T"}
# Unused by those that have no condition on size.
_PIXART = {**_PICTURE, **_CAPTION, "added_cond_kwargs": {"resolution": "B 2", "aspect_ratio": "B 1"}}
_LATTE = {**_VIDEO, "encoder_hidden_states": "B T caption_channels"}


def _sana(config: Any, batch: int, size: InputSize) -> Shapes:
    guidance = {"guidance": "B"} if getattr(config, "guidance_embeds", False) else {}
    return {**_PICTURE, **_CAPTION, **guidance}


def _sana_video(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes = {**_sana(config, batch, size), "hidden_states": "B in_channels F H W"}
    if not size.given:
        return shapes
    sides = (size.frames, size.height, size.width)
    times = [str(side // patch) for side, patch in zip(sides, config.patch_size, strict=True)]
    return {**shapes, "timestep": " ".join(["B", "1", *times])}


def _ltx(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": "B F*H*W in_channels",
        "timestep": "B F*H*W" if size.given else "B",
        **_CAPTION,
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
    }


def _ltx2(config: Any, batch: int, size: InputSize) -> Shapes:
    widths = ("caption_channels", "caption_channels")
    if not config.use_prompt_embeddings:
        widths = ("cross_attention_dim", "audio_cross_attention_dim")
    # 24 frames of the video a second, of which all but the first are eight to one of the latent.
    seconds = ((size.frames - 1) * config.vae_scale_factors[0] + 1) / 24
    per_second = config.audio_sampling_rate / config.audio_hop_length / config.audio_scale_factor
    audio = round(seconds * per_second)
    return {
        **_ltx(config, batch, size),
        **({"use_cross_timestep": True} if size.crossed else {}),
        "encoder_hidden_states": f"B T {widths[0]}",
        "audio_encoder_hidden_states": f"B T {widths[1]}",
        "audio_encoder_attention_mask": "B T",
        "audio_hidden_states": f"B {audio} audio_in_channels",
        "audio_num_frames": audio,
        "audio_timestep": "B",
        "sigma": "B",
    }


def _hunyuan(config: Any, batch: int, size: InputSize) -> Shapes:
    table = f"{size.height * size.width // config.patch_size**2} attention_head_dim"
    return {
        **_PICTURE,
        # As many tokens as there is padding for.
        "encoder_hidden_states": "B text_len cross_attention_dim",
        "text_embedding_mask": "B text_len",
        "encoder_hidden_states_t5": "B text_len_t5 cross_attention_dim_t5",
        "text_embedding_mask_t5": "B text_len_t5",
        "image_meta_size": "B 6",
        "style": "B:long",
        "image_rotary_emb": [table, table],
    }


def _allegro(config: Any, batch: int, size: InputSize) -> Shapes:
    patches = size.frames * size.height * size.width // (config.patch_size_t * config.patch_size**2)
    # Tables of cosines and sines for every axis, and the places of the patches on it.
    table = f"{max(size.frames, size.height, size.width)} {config.attention_head_dim // 3}"
    tables = [[[table, table]] * 3, [f"1 {patches}:long"] * 3]
    text = {"encoder_hidden_states": "B 1 T caption_channels", "encoder_attention_mask": "B T"}
    return {**_VIDEO, **text, "image_rotary_emb": tables}


def _lumina(config: Any, batch: int, size: InputSize) -> Shapes:
    half = config.hidden_size // config.num_attention_heads // 2
    return {
        **_PICTURE,
        "encoder_hidden_states": "B T cross_attention_dim",
        "encoder_mask": "B T",
        # A table of angles for every place of the picture, of which the model takes what it needs.
        "image_rotary_emb": f"384 384 {half}:complex64",
        "cross_attention_kwargs": {},
    }


def _kandinsky5(config: Any, batch: int, size: InputSize) -> Shapes:
    _, height, width = config.patch_size
    sides = (size.frames, size.height // height, size.width // width)
    return {
        # Beside the latents stand those of a given picture, and which frames are given.
        "hidden_states": f"B F H W {'2*in_visual_dim+1' if config.visual_cond else 'in_visual_dim'}",
        "timestep": "B",
        "encoder_hidden_states": "B T in_text_dim",
        "pooled_projections": "B in_text_dim2",
        "visual_rope_pos": [f"{side}:long" for side in sides],
        "text_rope_pos": "T:long",
    }


def _kandinsky6(config: Any, batch: int, size: InputSize) -> Shapes:
    # 24 frames of the video a second, of which all but the first are four to one of the latent; and of the sound 44100
    # samples, of which 1024 are one of the latent.
    audio = math.ceil((4 * (size.frames - 1) + 1) / 24 * 44100 / 1024)
    return {
        "hidden_states": f"B F H W {'2*in_visual_dim+1' if config.visual_cond else 'in_visual_dim'}",
        "audio_hidden_states": f"B {audio} in_audio_dim",
        "timestep": "B",
        "encoder_hidden_states": "B T in_text_dim",
        "pooled_projections": "B in_text_dim2",
    }


def _stable_audio(config: Any, batch: int, size: InputSize) -> Shapes:
    table = f"sample_size+1 {config.attention_head_dim // 2}"
    return {
        "hidden_states": "B in_channels sample_size",
        "timestep": "1",
        # The duration stands behind the text, by its begin and its end, and before the latents, as one token more.
        "encoder_hidden_states": "B T+2 cross_attention_input_dim",
        "global_hidden_states": "B 1 global_states_input_dim",
        "rotary_embedding": [table, table],
    }


def _stable_audio3(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": "B io_channels F",
        "timestep": "B",
        # The duration is one token more.
        "encoder_hidden_states": "B T+1 cond_token_dim",
        "global_hidden_states": "B global_cond_dim",
        "encoder_attention_mask": "B T+1:long",
        # A mask, and what it leaves.
        **({"local_add_cond": "B local_add_cond_dim F"} if size.given else {}),
    }


def _ace_step(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        "hidden_states": "B F audio_acoustic_hidden_dim",
        "timestep": "B",
        "timestep_r": "B",
        # Lyrics, a token for the timbre, and the text.
        "encoder_hidden_states": f"B T {config.encoder_hidden_size or config.hidden_size}",
        "context_latents": f"B F {config.in_channels - config.audio_acoustic_hidden_dim}",
    }


def _wan(config: Any, batch: int, size: InputSize) -> Shapes:
    _, height, width = config.patch_size
    tokens = size.frames * (size.height // height) * (size.width // width)
    text = {"timestep": f"B {tokens}" if size.given else "B", "encoder_hidden_states": "B T text_dim"}
    if getattr(config, "image_dim", None) is not None:
        # The first picture, or with places of their own the first and the last one.
        pictures = "B" if getattr(config, "pos_embed_seq_len", None) is None else "2*B"
        text["encoder_hidden_states_image"] = f"{pictures} {size.picture} image_dim"
    return {"hidden_states": "B in_channels F H W", **text}


def _vace(config: Any, batch: int, size: InputSize) -> Shapes:
    return {**_wan(config, batch, size), "control_hidden_states": "B vace_in_channels F H W"}


def _any_flow(config: Any, batch: int, size: InputSize) -> Shapes:
    # Frames before channels, and a time for each of them.
    own = {"hidden_states": "B F in_channels H W", "timestep": "B F", "r_timestep": "B F"}
    return {**_wan(config, batch, size), **own}


def _animate(config: Any, batch: int, size: InputSize) -> Shapes:
    return {
        **_wan(config, batch, size),
        # The picture to be animated is one frame more.
        "hidden_states": "B in_channels F+1 H W",
        "pose_hidden_states": "B latent_channels F H W",
        "face_pixel_values": f"B 3 {4 * (size.frames - 1) + 1} motion_encoder_size motion_encoder_size",
    }


def _cosmos(config: Any, batch: int, size: InputSize) -> Shapes:
    time = "B 1 F 1 1" if size.given else "B"
    padding = {"padding_mask": "1 1 8*H 8*W"} if config.concat_padding_mask else {}
    return {**_VIDEO, "timestep": time, "encoder_hidden_states": "B T text_embed_dim", **padding}


_LONGCAT = {
    "hidden_states": "B F latent_dim",
    "timestep": "B",
    "encoder_hidden_states": "B T dit_text_dim",
    "encoder_attention_mask": "B T:bool",
    "attention_mask": "B F:bool",
    "latent_cond": "B F latent_dim",
}
_LTX_GIVEN = ("LTXImageToVideoPipeline", "LTXConditionPipeline")
_LTX2_GIVEN = tuple(f"LTX2{kind}Pipeline" for kind in ("ImageToVideo", "Condition", "InContext", "HDR"))
_COSMOS_GIVEN = ("Cosmos2VideoToWorldPipeline", "Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline")
_STABLE_AUDIO3_GIVEN = ("StableAudio3InpaintPipeline",)
_WAN: dict[str, Any] = {"tokens": 512, "frames": 81, "temporal_compression": 4}

# Without Sana-WM and Helios: they ask for the precision of their device, and the meta device has none.
CROSS_ATTENTION = {
    "PixArtTransformer2DModel": InputShapes(_PIXART, tokens=120),
    "SanaTransformer2DModel": InputShapes(_sana, tokens=300, spatial_compression=32),
    "SanaVideoTransformer3DModel": InputShapes(
        _sana_video, tokens=300, frames=81, temporal_compression=4, reference_pipelines=("SanaImageToVideoPipeline",)
    ),
    "LTXVideoTransformer3DModel": InputShapes(
        _ltx, tokens=128, frames=161, spatial_compression=32, temporal_compression=8, reference_pipelines=_LTX_GIVEN
    ),
    "LTX2VideoTransformer3DModel": InputShapes(
        _ltx2,
        tokens=1024,
        frames=121,
        spatial_compression=32,
        temporal_compression=8,
        has_extra_forwards=True,
        reference_pipelines=_LTX2_GIVEN,
    ),
    "HunyuanDiT2DModel": InputShapes(_hunyuan, tokens=77, has_text_length=False),
    "LatteTransformer3DModel": InputShapes(_LATTE, tokens=120, frames=16),
    "AllegroTransformer3DModel": InputShapes(_allegro, tokens=512, frames=88, temporal_compression=4),
    "LuminaNextDiT2DModel": InputShapes(_lumina, tokens=256),
    "Kandinsky5Transformer3DModel": InputShapes(_kandinsky5, tokens=512, frames=121, temporal_compression=4),
    "Kandinsky6Transformer3DModel": InputShapes(_kandinsky6, tokens=1024, frames=121, temporal_compression=4),
    "StableAudioDiTModel": InputShapes(_stable_audio, tokens=128, has_height_width=False),
    # 30 seconds.
    "LongCatAudioDiTTransformer": InputShapes(_LONGCAT, tokens=512, frames=351, has_height_width=False),
    # 10 seconds.
    "StableAudio3DiTModel": InputShapes(
        _stable_audio3, tokens=256, frames=108, has_height_width=False, reference_pipelines=_STABLE_AUDIO3_GIVEN
    ),
    # A minute, 25 to a second.
    "AceStepTransformer1DModel": InputShapes(
        _ace_step, tokens=512, frames=1500, has_height_width=False, pads_to_tokenizer=False
    ),
    "WanTransformer3DModel": InputShapes(_wan, **_WAN),
    "WanVACETransformer3DModel": InputShapes(_vace, **_WAN),
    "WanAnimateTransformer3DModel": InputShapes(_animate, tokens=512, frames=77, temporal_compression=4),
    "SkyReelsV2Transformer3DModel": InputShapes(_wan, **_WAN),
    "ChronoEditTransformer3DModel": InputShapes(_wan, **_WAN),
    "AnyFlowTransformer3DModel": InputShapes(_any_flow, **_WAN),
    "CosmosTransformer3DModel": InputShapes(
        _cosmos, tokens=512, frames=121, temporal_compression=8, reference_pipelines=_COSMOS_GIVEN
    ),
}
