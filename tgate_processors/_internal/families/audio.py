"""
Stable Audio: text and duration in one cross-attention. AudioLDM 2: two texts in turn. LongCat: two calls. ACE-Step: the
conditional half first, and guidance with a memory.
"""

from __future__ import annotations

from typing import Any

import torch

from ..denoiser.spec import Layout
from .family import Family, InputShapes, InputSize, Shapes


def _stable_audio(config: Any, batch: int, size: InputSize) -> Shapes:
    # The duration stands behind the text, by its begin and its end, and before the latents, as one token more.
    table = torch.empty(config.sample_size + 1, config.attention_head_dim // 2, device="meta")
    return {
        "hidden_states": (batch, config.in_channels, config.sample_size),
        "timestep": (1,),
        "encoder_hidden_states": (batch, size.tokens + 2, config.cross_attention_input_dim),
        "global_hidden_states": (batch, 1, config.global_states_input_dim),
        "rotary_embedding": [table, table],
    }


def _audioldm2(config: Any, batch: int, size: InputSize) -> Shapes:
    widths = config.cross_attention_dim
    widths = widths[0] if isinstance(widths, (list, tuple)) else widths
    widths = widths if isinstance(widths, (list, tuple)) else [widths]
    shapes: Shapes = {
        "sample": (batch, config.in_channels, size.height, size.width),
        "timestep": (),
        # So many tokens come from the language model.
        "encoder_hidden_states": (batch, 8, next(width for width in widths if width is not None)),
    }
    if len(widths) > 2:
        # Later layers of a group attend to the text itself.
        shapes["encoder_hidden_states_1"] = (batch, size.tokens, widths[2])
        shapes["encoder_attention_mask_1"] = (batch, size.tokens)
    return shapes


def _longcat(config: Any, batch: int, size: InputSize) -> Shapes:
    hidden = (batch, size.frames, config.latent_dim)
    return {
        "hidden_states": hidden,
        "timestep": (batch,),
        "encoder_hidden_states": (batch, size.tokens, config.dit_text_dim),
        "encoder_attention_mask": torch.empty(batch, size.tokens, dtype=torch.bool, device="meta"),
        "attention_mask": torch.empty(batch, size.frames, dtype=torch.bool, device="meta"),
        "latent_cond": hidden,
    }


def _stable_audio3(config: Any, batch: int, size: InputSize) -> Shapes:
    # The duration is one token more.
    tokens = size.tokens + 1
    shapes: Shapes = {
        "hidden_states": (batch, config.io_channels, size.frames),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, tokens, config.cond_token_dim),
        "global_hidden_states": (batch, config.global_cond_dim),
        "encoder_attention_mask": torch.empty(batch, tokens, dtype=torch.long, device="meta"),
    }
    if size.given:
        # A mask, and what it leaves.
        shapes["local_add_cond"] = (batch, config.local_add_cond_dim, size.frames)
    return shapes


def _ace_step(config: Any, batch: int, size: InputSize) -> Shapes:
    acoustic = config.audio_acoustic_hidden_dim
    return {
        "hidden_states": (batch, size.frames, acoustic),
        "timestep": (batch,),
        "timestep_r": (batch,),
        # Lyrics, a token for the timbre, and the text.
        "encoder_hidden_states": (batch, size.tokens, config.encoder_hidden_size or config.hidden_size),
        "context_latents": (batch, size.frames, config.in_channels - acoustic),
    }


AUDIO = (
    Family(
        "StableAudioDiTModel",
        "transformer",
        "conditional",
        InputShapes(_stable_audio, tokens=128, sized=False),
        # Without a negative prompt the unconditional half attends to nothing: its output is zero, and a mean would be
        # half of the text.
        Layout(arguments=("global_hidden_states",), mean=False),
        pipelines_without_callback={"StableAudioPipeline": None},
    ),
    Family(
        "AudioLDM2UNet2DConditionModel",
        "unet",
        "conditional",
        InputShapes(_audioldm2, tokens=512, scale=4),
        Layout(arguments=("encoder_hidden_states_1", "encoder_attention_mask_1")),
        pipelines_without_callback={"AudioLDM2Pipeline": None},
    ),
    Family(
        "LongCatAudioDiTTransformer",
        "transformer",
        "conditional",
        # 30 seconds.
        InputShapes(_longcat, tokens=512, frames=351, sized=False),
        Layout(cross=("cross_attn",), calls=2, asks_scale=True),
        pipelines_without_callback={"LongCatAudioDiTPipeline": None},
    ),
    Family(
        "StableAudio3DiTModel",
        "transformer",
        "conditional",
        # 10 seconds.
        InputShapes(_stable_audio3, tokens=256, frames=108, sized=False, given=("StableAudio3InpaintPipeline",)),
        Layout(arguments=("global_hidden_states",), cross=("cross_attn",)),
        # Their call knows no guidance.
        pipelines_without_callback=dict.fromkeys(("StableAudio3AudioToAudioPipeline", "StableAudio3InpaintPipeline")),
    ),
    Family(
        "AceStepTransformer1DModel",
        "transformer",
        "conditional",
        # A minute, 25 to a second.
        InputShapes(_ace_step, tokens=512, frames=1500, sized=False, padded=False),
        Layout(
            arguments=("timestep_r", "context_latents"),
            conditional_first=True,
            # A momentum of -0.75 lives in its loop (APG): where the halves are the same, three quarters of the last
            # update come back with the other sign, and a rest of them in every step after that.
            #
            # Errors are measured as those of plain guidance with the same scale: text + (scale - 1) * difference is
            # none + scale * difference, so nothing is to be added to it. APG makes the difference shorter, and with it
            # what is off in it and the output: the two errors are alike (tests/laws/test_audio.py compares them).
            remembers=True,
        ),
    ),
)
