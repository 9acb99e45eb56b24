"""What a schedule costs, without weights: forwards on the meta device, counted by torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch

from ..attention.budget import gates_cross_attention, validate_max_memory
from ..attention.state import TGateState
from ..families import family_of, reject_dropping_momentum
from ..plan.schedule import GateStep, TGateSchedule, as_schedule
from ..plan.steps import StepCounter, Timeline
from ..plan.validation import validate_int, validate_switch
from ..run.messages import RunWarnings
from .cost_result import TGateCost
from .dry_run import simulate_schedule
from .extra_forwards import extra_forward_macs
from .meta_model import (
    MAX_SIZE,
    reject_unknown_conditioning,
    resolve_input_size,
)
from .target import DenoiserCall, profile_of, read_timeline, resolve_cfg, resolve_dtype, resolve_target


def estimate_cost(
    pipe_or_denoiser: Any,
    schedule: TGateSchedule | GateStep,
    num_inference_steps: int,
    *,
    do_classifier_free_guidance: bool | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    max_sequence_length: int | None = None,
    num_frames: int | None = None,
    vae_scale_factor: int | None = None,
    dtype: torch.dtype | None = None,
    cross_attention: bool | None = None,
    max_memory: SupportsIndex | str | None = None,
    extra_forwards: Sequence[Mapping[str, Any]] | None = None,
) -> TGateCost:
    r"""
    Count what a schedule costs, without weights. The denoiser runs on the meta device, which has neither memory nor
    arithmetic, with T-GATE's own attention processors, and torch counts.

    The denoiser alone is counted: no text encoder, no VAE, no ControlNet, no DeepCache. Nothing of the given pipeline
    changes, whatever device it is on.

    Args:
        pipe_or_denoiser (`DiffusionPipeline` or `torch.nn.Module`):
            The pipeline, or its denoiser, which may be without weights (made under `torch.device("meta")`).
        schedule (`TGateSchedule`, `int`, `float` or `str`):
            The schedule, or its `gate_step`, as in [`apply_tgate`].
        num_inference_steps (`int`):
            Number of steps that really run. The scheduler of a pipeline says how many forwards these are; a denoiser
            alone has one forward a step.
        do_classifier_free_guidance (`bool`, *optional*):
            Whether classifier-free guidance is on. Defaults to `True`, except for a denoiser that embeds the guidance
            scale (`time_cond_proj_dim`) and for a pipeline whose call takes none, where it is always off.
        height (`int`, *optional*):
            Height of the picture in pixels. Defaults to that of the pipeline or of the denoiser's configuration.
        width (`int`, *optional*): Width of the picture in pixels. Defaults like `height`.
        batch_size (`int`, *optional*, defaults to `1`): Number of pictures: prompts times `num_images_per_prompt`.
        max_sequence_length (`int`, *optional*):
            Number of text tokens. Defaults to that of the pipeline; for a denoiser alone to 77, for PixArt to 120.
        num_frames (`int`, *optional*): Number of frames of a video. Defaults to that of the denoiser's configuration
            or of the pipeline; to 1 for a pipeline that draws pictures with such a denoiser.
        vae_scale_factor (`int`, *optional*):
            Pixels of the picture for each of the latent. Defaults to that of the pipeline; for a denoiser alone to 8.
        dtype (`torch.dtype`, *optional*):
            The type that the bytes held are counted in. Defaults to that of the denoiser.
        cross_attention (`bool`, *optional*): Whether cross-attention is reused, as in [`apply_tgate`].
        max_memory (`int` or `str`, *optional*): Most bytes of kept cross-attention, as in [`apply_tgate`].
        extra_forwards (`list` of `dict`, *optional*):
            Extra denoiser calls in every step besides those for guidance, each as a `dict` of its distinguishing
            arguments. Full and half steps compute them. By default there are none, but LTX-2 needs it: `[]` for none,
            or as many as the call makes of `{"spatio_temporal_guidance_blocks": [28]}` (`stg_scale` above 0) and
            `{"isolate_modalities": True}` (`modality_scale` above 1).

    Returns:
        `TGateCost`: MACs of a forward and of the run, parameters, and the report of the run.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError:
            If an argument is out of range or means nothing for this denoiser, or if the denoiser cannot be gated or is
            not what its configuration describes (LoRA, IP-Adapter).

    Example:

    ```py
    >>> from tgate_processors import estimate_cost

    >>> cost = estimate_cost(pipe, 10, num_inference_steps=25)
    >>> cost.report.half_batch_forwards
    15
    >>> cost.with_tgate.layers == 2 * 10 * cost.full.layers + 15 * cost.without_cross_attention.layers
    True
    ```

    Source: T-GATE (https://arxiv.org/abs/2404.02747), whose tables count `layers`.
    """
    validate_switch("cross_attention", cross_attention)
    max_bytes = validate_max_memory(max_memory, cross_attention)
    cross_attention = gates_cross_attention(cross_attention, max_bytes)
    pipe, denoiser = resolve_target(pipe_or_denoiser, cross_attention)
    schedule = as_schedule(schedule, "schedule")
    num_inference_steps = validate_int("num_inference_steps", num_inference_steps, 1, maximum=MAX_SIZE)
    batch_size = validate_int("batch_size", batch_size, 1, maximum=MAX_SIZE)
    guided = resolve_cfg(pipe, denoiser, do_classifier_free_guidance)
    size = resolve_input_size(pipe, denoiser, height, width, max_sequence_length, num_frames, vae_scale_factor)
    dtype = resolve_dtype(denoiser, dtype)
    reject_unknown_conditioning(denoiser)
    profile = profile_of(denoiser, size)
    family = family_of(denoiser)
    assert family is not None
    layout = family.layout
    timeline, takes_over = read_timeline(pipe, num_inference_steps, family)
    if guided:
        reject_dropping_momentum(type(denoiser).__name__, layout, schedule)
    if cross_attention is None:
        cross_attention = layout.gates_cross_by_default
    extra = extra_forward_macs(denoiser, size, extra_forwards) * batch_size
    run = simulate_schedule(
        profile,
        schedule,
        timeline,
        batch_size=batch_size,
        guided=guided,
        itemsize=dtype.itemsize,
        cross_attention=cross_attention,
        joint=layout.joint,
        max_memory=max_bytes,
        takes_over=takes_over,
        extra_forwards=len(extra_forwards or ()),
    )
    state, call = TGateState(schedule, max_bytes), DenoiserCall(guided)
    warnings = RunWarnings(state, call, gates_cross=cross_attention, joint=layout.joint)
    _warn(warnings, schedule, timeline, run.min_bytes)
    full, without_cross = profile.forwards[False, False], profile.forwards[True, False]
    return TGateCost(
        full=full.macs,
        without_cross_attention=without_cross.macs,
        without_self_attention=profile.forwards[False, True].macs,
        without_attention=profile.forwards[True, True].macs,
        without_tgate=full.macs * (timeline.passes * batch_size * (2 if guided else 1)) + extra * timeline.passes,
        with_tgate=run.macs + extra * (timeline.passes - run.report.forecast_forwards),
        parameters=full.parameters,
        parameters_after_gate=without_cross.parameters,
        report=run.report,
    )


def _warn(warnings: RunWarnings, schedule: TGateSchedule, timeline: Timeline, min_bytes: int | None) -> None:
    """Warn of what a run would warn of."""
    if not schedule.forecast:
        warnings.no_cfg()
    warnings.gate_too_late(StepCounter(schedule, timeline))
    if min_bytes is not None:
        warnings.budget_too_small(min_bytes)
