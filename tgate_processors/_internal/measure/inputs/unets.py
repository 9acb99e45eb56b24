"""What UNets take."""

from __future__ import annotations

from typing import Any

from .shapes import InputShapes, InputSize, Shapes, first_of


def _unet(config: Any, batch: int, size: InputSize) -> Shapes:
    width = getattr(config, "encoder_hid_dim", None) or first_of(config.cross_attention_dim)
    # With ControlNet-XS the channels are fixed.
    channels = getattr(config, "in_channels", 4)
    shapes = {"sample": f"B {channels} H W", "timestep": "", "encoder_hidden_states": f"B T {width}"}
    if config.time_cond_proj_dim is not None:
        shapes["timestep_cond"] = "B time_cond_proj_dim"
    if config.addition_embed_type != "text_time":
        return shapes
    # Of the embedding only the width counts, not which part of it is text and which the sizes of the picture.
    text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {**shapes, "added_cond_kwargs": {"text_embeds": f"B {text}", "time_ids": "B 6"}}


def _motion(config: Any, batch: int, size: InputSize) -> Shapes:
    shapes = _unet(config, batch, size)
    # Every frame has the text for itself.
    text = shapes["encoder_hidden_states"].replace("B", "B*F")
    return {**shapes, "sample": "B in_channels F H W", "encoder_hidden_states": text}


def _video(config: Any, batch: int, size: InputSize) -> Shapes:
    ids = config.projection_class_embeddings_input_dim // config.addition_time_embed_dim
    text = {"encoder_hidden_states": "B T cross_attention_dim", "added_time_ids": f"B {ids}"}
    return {"sample": "B F in_channels H W", "timestep": "", **text}


def _with_control(config: Any, batch: int, size: InputSize) -> Shapes:
    # The control is a picture, and every level of its embedding but the first halves the sides.
    scale = 2 ** (len(config.ctrl_conditioning_embedding_out_channels) - 1)
    picture = f"B ctrl_conditioning_channels {scale}*H {scale}*W"
    return {**_unet(config, batch, size), "controlnet_cond": picture}


def _audioldm2(config: Any, batch: int, size: InputSize) -> Shapes:
    widths = config.cross_attention_dim
    widths = widths[0] if isinstance(widths, (list, tuple)) else widths
    widths = widths if isinstance(widths, (list, tuple)) else [widths]
    width = next(width for width in widths if width is not None)
    # So many tokens come from the language model.
    shapes = {"sample": "B in_channels H W", "timestep": "", "encoder_hidden_states": f"B 8 {width}"}
    if len(widths) > 2:
        # Later layers of a group attend to the text itself.
        shapes |= {"encoder_hidden_states_1": f"B T {widths[2]}", "encoder_attention_mask_1": "B T"}
    return shapes


_FRAMES = {"sample": "B in_channels F H W", "timestep": "", "encoder_hidden_states": "B T cross_attention_dim"}
_PICTURE = {"image_latents": "B in_channels F H W", "image_embeddings": "B cross_attention_dim"}
_KANDINSKY = {"encoder_hidden_states": "B T encoder_hid_dim", "encoder_attention_mask": "B T"}

UNETS = {
    "UNet2DConditionModel": InputShapes(_unet, tokens=77),
    "UNetMotionModel": InputShapes(_motion, tokens=77, frames=16),
    "UNetSpatioTemporalConditionModel": InputShapes(_video, tokens=1, frames=25, has_text_length=False),
    "I2VGenXLUNet": InputShapes({**_FRAMES, "fps": "B", **_PICTURE}, tokens=77, frames=16),
    "UNet3DConditionModel": InputShapes(_FRAMES, tokens=77, frames=16),
    "UNetControlNetXSModel": InputShapes(_with_control, tokens=77),
    "Kandinsky3UNet": InputShapes({"sample": "B in_channels H W", "timestep": "", **_KANDINSKY}, tokens=128),
    "AudioLDM2UNet2DConditionModel": InputShapes(_audioldm2, tokens=512, spatial_compression=4),
}
