"""A denoiser without weights: its model on the meta device, and the inputs that it takes there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Set
from typing import Any

import torch

from ..families import family_of
from ..plan.validation import shown, validate_int
from .inputs import INPUTS, InputShapes, InputSize, materialize

# Settings that may need an input which is not among these shapes, with the values that do not.
_SUPPORTED_CONDITIONING: dict[str, tuple[str | None, ...]] = {
    "encoder_hid_dim_type": (None, "text_proj"),
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "attention_type": (None, "default", "regular"),
}
# What pipelines call the number of frames.
_FRAMES = ("num_frames", "video_length", "frames", "segment_frame_length")
# More steps, pictures or pixels than anyone counts.
MAX_SIZE = 10**6


def family_inputs(denoiser: torch.nn.Module) -> InputShapes:
    """The inputs of a denoiser of a known family."""
    family = family_of(denoiser)
    assert family is not None
    inputs = INPUTS.get(family.denoiser_class)
    if inputs is None:
        raise ValueError(
            f"{type(denoiser).__name__} does not run on the meta device with any inputs that T-GATE knows, so its cost "
            "cannot be estimated. Count what a run takes with torch.utils.flop_counter.FlopCounterMode."
        )
    return inputs


def resolve_input_size(
    pipe: Any,
    denoiser: Any,
    height: int | None,
    width: int | None,
    max_sequence_length: int | None,
    num_frames: int | None,
    vae_scale_factor: int | None,
) -> InputSize:
    """The size of the inputs: as given, or else by the pipeline or the configuration."""
    name, inputs = type(denoiser).__name__, family_inputs(denoiser)
    _reject_meaningless(name, inputs, height, width, max_sequence_length, num_frames)
    factor = _spatial_compression(pipe, inputs) if vae_scale_factor is None else vae_scale_factor
    factor = validate_int("vae_scale_factor", factor, 1, maximum=MAX_SIZE)
    sides = []
    for axis, (argument, value) in enumerate((("height", height), ("width", width))):
        if not inputs.has_height_width:
            value = factor
        if value is None:
            value = _call_default_of(pipe, argument) or _sample_size(denoiser, axis, argument) * factor
        value = validate_int(argument, value, factor, maximum=MAX_SIZE)
        if value % factor:
            raise ValueError(f"{argument}={shown(value)} is not a multiple of {factor}: pass one.")
        sides.append(value // factor)
    tokens = max_sequence_length
    if tokens is None:
        padded = (
            getattr(getattr(pipe, "tokenizer", None), "model_max_length", None) if inputs.pads_to_tokenizer else None
        )
        tokens = _call_default_of(pipe, "max_sequence_length") or padded or inputs.tokens
    frames = num_frames
    if frames is None and inputs.frames is not None:
        frames = _frames(pipe, denoiser, inputs)
    frames = validate_int("num_frames", 1 if frames is None else frames, 1, maximum=MAX_SIZE)
    places = getattr(denoiser.config, "video_length", None)
    if places is not None and frames not in (1, places):
        raise ValueError(f"num_frames={frames}, but this {name} has places for {places}: leave num_frames out.")
    return InputSize(
        height=sides[0],
        width=sides[1],
        tokens=validate_int("max_sequence_length", tokens, 1, maximum=MAX_SIZE),
        frames=(frames - 1) // _temporal_compression(pipe, inputs) + 1,
        picture=_picture_tokens(pipe),
        given=_is_given_parts(pipe, inputs),
        crossed=bool(_call_default_of(pipe, "use_cross_timestep")),
    )


def _reject_meaningless(
    name: str,
    inputs: InputShapes,
    height: int | None,
    width: int | None,
    max_sequence_length: int | None,
    num_frames: int | None,
) -> None:
    """Refuse a size that a denoiser does not have."""
    for argument, value, exists in (
        ("num_frames", num_frames, inputs.frames is not None),
        ("max_sequence_length", max_sequence_length, inputs.has_text_length),
        ("height", height, inputs.has_height_width),
        ("width", width, inputs.has_height_width),
    ):
        if value is not None and not exists:
            raise ValueError(f"{argument}={shown(value)} means nothing for a {name}: leave it out.")


def _frames(pipe: Any, denoiser: Any, inputs: InputShapes) -> int | None:
    """Frames of the video if no argument says how many; one where the call makes an image."""
    if pipe is not None and inputs.has_height_width and not call_has_argument(pipe, "frame", "video"):
        return 1
    told = (getattr(denoiser.config, name, None) or _call_default_of(pipe, name) for name in _FRAMES)
    return next(filter(None, told), inputs.frames)


def call_has_argument(pipe: Any, *words: str) -> bool:
    """Whether the call of a pipeline has an argument with one of these words in its name, or any argument."""
    parameters = inspect.signature(type(pipe).__call__).parameters.values()
    return any(each.kind is each.VAR_KEYWORD or any(word in each.name for word in words) for each in parameters)


def _picture_tokens(pipe: Any) -> int:
    """Tokens of a reference image, where it is encoded."""
    config: Any = getattr(getattr(pipe, "image_encoder", None), "config", None)
    if not isinstance(getattr(config, "image_size", None), int):
        return InputSize.picture
    return int(config.image_size // config.patch_size) ** 2 + 1


def _is_given_parts(pipe: Any, inputs: InputShapes) -> bool:
    """Whether an input of the denoiser says which parts are given; some checkpoints of Wan need it in every call."""
    named = any(base.__name__ in inputs.reference_pipelines for base in type(pipe).__mro__)
    return named or bool(getattr(getattr(pipe, "config", None), "expand_timesteps", False))


def _sample_size(denoiser: Any, axis: int, argument: str) -> int:
    """A side of the latent in the configuration."""
    # Some name the sides separately.
    size = getattr(denoiser.config, "sample_size", None) or getattr(denoiser.config, f"sample_{argument}", None)
    if size is None:
        raise ValueError(f"{type(denoiser).__name__} has no config.sample_size: pass `{argument}`.")
    return int(size if isinstance(size, int) else size[axis])


def _spatial_compression(pipe: Any, inputs: InputShapes) -> int:
    """Pixels of the sample for each of the latent."""
    told = (
        getattr(pipe, name, None)
        for name in ("vae_scale_factor", "vae_spatial_compression_ratio", "vae_scale_factor_spatial")
    )
    return next((scale for scale in told if scale is not None), inputs.spatial_compression)


def _temporal_compression(pipe: Any, inputs: InputShapes) -> int:
    """Frames of the video for each of the latent, if the latent has fewer."""
    if inputs.temporal_compression == 1:
        return 1
    told = (getattr(pipe, name, None) for name in ("vae_temporal_compression_ratio", "vae_scale_factor_temporal"))
    return next((scale for scale in told if scale is not None), inputs.temporal_compression)


def _call_default_of(pipe: Any, argument: str) -> int | None:
    """The default of an argument in the call of a pipeline, if it is a number."""
    parameter = None if pipe is None else inspect.signature(type(pipe).__call__).parameters.get(argument)
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def reject_unknown_conditioning(denoiser: Any) -> None:
    """Refuse a denoiser with an input that T-GATE does not support."""
    for setting, known in _SUPPORTED_CONDITIONING.items():
        value = getattr(denoiser.config, setting, None)
        if value not in known:
            raise ValueError(
                f"{type(denoiser).__name__} has config.{setting}={value!r}, and T-GATE does not know the input that "
                "this needs. If it comes from an IP-Adapter, call pipe.unload_ip_adapter() first."
            )


def make_meta_model(denoiser_class: Any, config: dict[str, Any]) -> Any:
    """Make a denoiser without weights."""
    # From the configuration and not a copy: a copy would bring hooks, offloaded weights and patched forwards along.
    with torch.device("meta"):
        meta_model = denoiser_class.from_config(config)
    for name, stand_in in family_inputs(meta_model).stand_ins.items():
        part = meta_model.get_submodule(name)
        part.forward = functools.partial(stand_in, part)
    # Buffers that are made from numpy are not on meta yet.
    return meta_model.eval().requires_grad_(False).to("meta")


def reject_modified_model(denoiser: torch.nn.Module, names: Set[str]) -> None:
    """Refuse a denoiser with other parameters than its configuration describes."""
    other = names ^ {name for name, _ in denoiser.named_parameters()}
    if other:
        name = type(denoiser).__name__
        raise ValueError(
            f"{name} is not what its configuration describes: {len(other)} parameters differ, such as {min(other)}. "
            "Fuse and unload LoRA (pipe.fuse_lora(), pipe.unload_lora_weights()), or give the denoiser without it, "
            f"{name}.from_config(denoiser.config)."
        )


def make_inputs(meta_model: Any, batch: int, size: InputSize) -> dict[str, Any]:
    """Make the arguments of its forward."""
    return materialize(family_inputs(meta_model), meta_model, batch, size)
