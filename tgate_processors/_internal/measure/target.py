"""What is to be counted: the denoiser, its guidance and its steps, from a pipeline or a denoiser alone."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from ..families import (
    check_attention,
    check_denoiser,
    family_of,
    guidance_distillation_flag,
    resolve_pipeline,
    supported_names,
)
from ..families.family import Family
from ..plan.steps import Timeline
from ..plan.validation import shown
from ..run.call import PipelineCall
from ..run.timesteps import TimestepReader
from .inputs import InputSize
from .macs import DenoiserProfile, profile_denoiser
from .meta_model import call_has_argument, make_meta_model, reject_modified_model


class DenoiserCall(PipelineCall):
    """A call of a denoiser alone, of which only guidance is known."""

    def __init__(self, guided: bool) -> None:
        super().__init__(None)
        self._supports_cfg = guided

    @property
    def pipeline_name(self) -> str:
        """The name of the target in messages."""
        return "the denoiser"

    def do_cfg_now(self) -> bool:
        """Whether guidance is on."""
        return self._supports_cfg

    def do_cfg_ever(self) -> bool:
        """Whether guidance is on in some step."""
        return self._supports_cfg


def config_json(denoiser: Any) -> str:
    """The configuration as JSON, made from a copy, because diffusers writes into it."""
    given = denoiser._internal_dict
    denoiser._internal_dict = type(given)(given)
    try:
        config: str = denoiser.to_json_string()
        return config
    finally:
        denoiser._internal_dict = given


def resolve_target(given: Any, cross_attention: bool | None) -> tuple[Any, Any]:
    """A pipeline, if one is given, and its denoiser."""
    if isinstance(given, diffusers.DiffusionPipeline):
        found = resolve_pipeline(given, cross_attention)
        if found.default_cfg_half is None and not found.is_distilled:
            raise ValueError(
                f"the guidance of {type(given).__name__} is not two halves; how many parts it has is up to the call: "
                "pass its denoiser, do_classifier_free_guidance=False, and the pictures times the parts as batch_size."
            )
        denoiser = found.denoiser
        return given, getattr(denoiser, "_orig_mod", denoiser)
    name = type(given).__name__
    if not isinstance(given, torch.nn.Module):
        raise TypeError(f"pipe_or_denoiser is of type {name}: pass a diffusers pipeline, or its denoiser.")
    family = family_of(given)
    if family is None:
        check_denoiser(given, name)
        names = supported_names(joint=not cross_attention)
        raise ValueError(f"{name} cannot be gated: T-GATE does not know how it does guidance. It knows {names}.")
    check_attention(given, name, family.layout, cross_attention)
    return None, getattr(given, "_orig_mod", given)


def resolve_cfg(pipe: Any, denoiser: Any, asked: bool | None) -> bool:
    """Whether guidance is on; pipelines never double the batch of a denoiser that embeds the guidance scale."""
    if asked is not None and not isinstance(asked, bool):
        raise TypeError(
            f"do_classifier_free_guidance={shown(asked)} is of type {type(asked).__name__}: pass True or False."
        )
    timed = getattr(denoiser.config, "time_cond_proj_dim", None) is not None
    embedded = "time_cond_proj_dim" if timed else guidance_distillation_flag(denoiser)
    family = family_of(denoiser)
    # Sequential CFG with a negative prompt may be added to the embedded guidance.
    if asked and embedded and (family is None or family.layout.calls_per_step == 1):
        raise ValueError(
            f"do_classifier_free_guidance=True, but this {type(denoiser).__name__} has its guidance in itself "
            f"(config.{embedded}), so its batch is never two halves: leave out `do_classifier_free_guidance`."
        )
    asks = (
        pipe is None or hasattr(type(pipe), "do_classifier_free_guidance") or call_has_argument(pipe, "guidance", "cfg")
    )
    if asked and not asks:
        raise ValueError(
            f"do_classifier_free_guidance=True, but the call of {type(pipe).__name__} takes no guidance_scale, so its "
            "batch is never two halves: leave out `do_classifier_free_guidance`."
        )
    return asks and not embedded if asked is None else asked


def resolve_dtype(denoiser: Any, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of cached outputs."""
    dtype = denoiser.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"dtype={shown(dtype)} is of type {type(dtype).__name__}: pass a torch.dtype, such as torch.float16."
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not a floating-point type: pass the one that the denoiser computes in.")
    return dtype


def read_timeline(pipe: Any, num_inference_steps: int, family: Family | None) -> tuple[Timeline, int | None]:
    """
    Read the timeline of a run, and the pass from which another denoiser runs, as in Wan 2.2.
    """
    if pipe is None:
        return Timeline(num_inference_steps), None
    scheduler = copy.deepcopy(pipe.scheduler)
    # Some schedulers accept this for two steps only; for any other number their pipelines pass `None`.
    odd = "intermediate_timesteps" in inspect.signature(scheduler.set_timesteps).parameters
    more = {"intermediate_timesteps": None} if odd and num_inference_steps != 2 else {}
    scheduler.set_timesteps(num_inference_steps, **more)
    ratio = getattr(pipe.config, "boundary_ratio", None)
    takes_over = None
    if (
        ratio is not None
        and family is not None
        and family.second_denoiser
        and getattr(pipe, family.second_denoiser, None) is not None
    ):
        takes_over = int((scheduler.timesteps >= ratio * scheduler.config.num_train_timesteps).sum())
    return TimestepReader(SimpleNamespace(scheduler=scheduler)).read_timeline(), takes_over


def profile_of(denoiser: Any, size: InputSize) -> DenoiserProfile:
    """Profile a denoiser, and refuse it if it is not what its configuration describes."""
    denoiser_class: Any = type(denoiser)
    try:
        profile, names = _profile(denoiser_class, config_json(denoiser), size)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(
            f"height, width, num_frames and max_sequence_length make tensors larger than torch counts, {size}: pass "
            "smaller ones."
        ) from None
    reject_modified_model(denoiser, names)
    return profile


@functools.lru_cache(maxsize=16)
def _profile(denoiser_class: Any, config: str, size: InputSize) -> tuple[DenoiserProfile, frozenset[str]]:
    """Profile a denoiser, and list its parameters; cached, because most calls differ in the schedule only."""
    meta_model = make_meta_model(denoiser_class, json.loads(config))
    return profile_denoiser(meta_model, size), frozenset(name for name, _ in meta_model.named_parameters())
