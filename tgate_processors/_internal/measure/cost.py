"""What a schedule costs, without weights: forwards on the meta device, counted by torch."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, SupportsIndex

import diffusers
import torch

from ..attention.budget import checked_memory, within
from ..attention.state import TGateState
from ..families import check_attention, check_denoiser, check_dropped, distilled_by, family_of, known, resolve_pipeline
from ..families.family import Family
from ..plan.report import TGateReport
from ..plan.schedule import TGateSchedule
from ..plan.steps import StepCounter, Timeline
from ..plan.validation import check_switch, checked_int, shown
from ..run.call import PipelineCall
from ..run.messages import RunWarnings
from ..run.timesteps import TimestepReader
from .dry_run import simulate_schedule
from .inputs import InputSize
from .macs import DenoiserProfile, MACs, count_forward, measure
from .meta_model import (
    MOST_OF_ALL,
    check_conditions,
    check_parameters,
    family_inputs,
    input_size,
    make_inputs,
    make_meta_model,
    takes,
)


@dataclass(frozen=True)
class TGateCost:
    r"""
    What a schedule costs, in multiply-accumulates of the denoiser. With `gate_step="auto"` it is a lower bound: the
    cost of a run in which every prediction is right. `without_tgate` is then the upper bound.

    Args:
        full (`MACs`): One forward of one picture without guidance, all attention computed.
        without_cross_attention (`MACs`): The same with cross-attention reused.
        without_self_attention (`MACs`): The same with self-attention reused.
        without_attention (`MACs`): The same with both reused.
        without_tgate (`MACs`): The whole run without T-GATE.
        with_tgate (`MACs`): The whole run with T-GATE.
        parameters (`int`): Parameters of the denoiser.
        parameters_after_gate (`int`): Those of the modules that still run when cross-attention is reused.
        report (`TGateReport`):
            What [`get_tgate_report`] says after the run: forwards of each kind, most bytes held in stored outputs.
    """

    full: MACs
    without_cross_attention: MACs
    without_self_attention: MACs
    without_attention: MACs
    without_tgate: MACs
    with_tgate: MACs
    parameters: int
    parameters_after_gate: int
    report: TGateReport

    @property
    def speedup_bound(self) -> float:
        """The speed-up of the denoiser if its time were in proportion to its MACs, attention's products included."""
        return self.without_tgate.total / self.with_tgate.total


def estimate_cost(
    pipe_or_denoiser: Any,
    schedule: TGateSchedule,
    num_inference_steps: int,
    *,
    guidance: bool | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    max_sequence_length: int | None = None,
    num_frames: int | None = None,
    vae_scale_factor: int | None = None,
    dtype: torch.dtype | None = None,
    cross_attention: bool | None = None,
    max_memory: SupportsIndex | str | None = None,
    further_calls: Sequence[Mapping[str, Any]] | None = None,
) -> TGateCost:
    r"""
    Count what a schedule costs, without weights. The denoiser runs on the meta device, which has neither memory nor
    arithmetic, with T-GATE's own attention processors, and torch counts.

    The denoiser alone is counted: no text encoder, no VAE, no ControlNet, no DeepCache. Nothing of the given pipeline
    changes, whatever device it is on.

    Args:
        pipe_or_denoiser (`DiffusionPipeline` or `torch.nn.Module`):
            The pipeline, or its denoiser, which may be without weights (made under `torch.device("meta")`).
        schedule (`TGateSchedule`): When attention is computed, stored and reused.
        num_inference_steps (`int`):
            Number of steps that really run. The scheduler of a pipeline says how many forwards these are; a denoiser
            alone has one forward a step.
        guidance (`bool`, *optional*):
            Whether classifier-free guidance is on. Defaults to `True`, except for a denoiser that embeds the guidance
            scale (`time_cond_proj_dim`) and for a pipeline whose call takes none, where it is always off.
        height (`int`, *optional*):
            Height of the picture in pixels. Defaults to that of the pipeline or of the denoiser's configuration.
        width (`int`, *optional*): Width of the picture in pixels, likewise.
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
        further_calls (`list` of `dict`, *optional*):
            What tells further calls of the denoiser in every step from those of guidance, a `dict` of its arguments for
            each. They run whole. By default there are none, but LTX-2 needs it: `[]` for none, or as many as the call
            makes of `{"spatio_temporal_guidance_blocks": [28]}` (`stg_scale` above 0) and `{"isolate_modalities":
            True}` (`modality_scale` above 1).

    Returns:
        `TGateCost`: MACs of a forward and of the run, parameters, and the report of the run.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError:
            If an argument is out of range or means nothing for this denoiser, or if the denoiser cannot be gated or is
            not what its configuration describes (LoRA, IP-Adapter).

    Example:

    ```py
    >>> from tgate_processors import TGateSchedule, estimate_cost

    >>> cost = estimate_cost(pipe, TGateSchedule(gate_step=10), num_inference_steps=25)
    >>> cost.report.half_batch_forwards
    15
    >>> cost.with_tgate.layers == 2 * 10 * cost.full.layers + 15 * cost.without_cross_attention.layers
    True
    ```

    Source: T-GATE (https://arxiv.org/abs/2404.02747), whose tables count `layers`.
    """
    check_switch("cross_attention", cross_attention)
    most = checked_memory(max_memory, cross_attention)
    cross_attention = within(cross_attention, most)
    pipe, denoiser = _pipe_and_denoiser(pipe_or_denoiser, cross_attention)
    if not isinstance(schedule, TGateSchedule):
        raise TypeError(f"schedule is of type {type(schedule).__name__}: give a TGateSchedule(gate_step=...).")
    num_inference_steps = checked_int("num_inference_steps", num_inference_steps, 1, most=MOST_OF_ALL)
    batch_size = checked_int("batch_size", batch_size, 1, most=MOST_OF_ALL)
    guided = _guided(pipe, denoiser, guidance)
    size = input_size(pipe, denoiser, height, width, max_sequence_length, num_frames, vae_scale_factor)
    dtype = _dtype(denoiser, dtype)
    check_conditions(denoiser)
    denoiser_class: Any = type(denoiser)
    try:
        profile, names = _profile(denoiser_class, _config_of(denoiser), size)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(
            f"height, width, num_frames and max_sequence_length make tensors larger than torch counts, {size}: give "
            "smaller ones."
        ) from None
    check_parameters(denoiser, names)

    family = family_of(denoiser)
    timeline, takes_over = _timeline(pipe, num_inference_steps, family)
    if family is not None and guided:
        check_dropped(denoiser_class.__name__, family.layout, schedule)
    if cross_attention is None:
        cross_attention = family is None or family.layout.keeps_cross
    joint = family is not None and family.layout.joint
    run = simulate_schedule(
        profile,
        schedule,
        timeline,
        batch_size=batch_size,
        guided=guided,
        itemsize=dtype.itemsize,
        cross_attention=cross_attention,
        joint=joint,
        max_memory=most,
        takes_over=takes_over,
    )
    warnings = RunWarnings(TGateState(schedule, most), _DenoiserCall(guided), gates_cross=cross_attention, joint=joint)
    warnings.no_cfg()
    warnings.gate_too_late(StepCounter(schedule, timeline))
    if run.least is not None:
        warnings.budget_too_small(run.least)
    full, without_cross = profile.forwards[False, False], profile.forwards[True, False]
    beside = _beside(denoiser, size, further_calls) * (timeline.passes * batch_size)
    return TGateCost(
        full=full.macs,
        without_cross_attention=without_cross.macs,
        without_self_attention=profile.forwards[False, True].macs,
        without_attention=profile.forwards[True, True].macs,
        without_tgate=full.macs * (timeline.passes * batch_size * (2 if guided else 1)) + beside,
        with_tgate=run.macs + beside,
        parameters=full.parameters,
        parameters_after_gate=without_cross.parameters,
        report=run.report,
    )


class _DenoiserCall(PipelineCall):
    """A call of which nothing is known but whether it is guided."""

    def __init__(self, guided: bool) -> None:
        super().__init__(None)
        self._guides = guided

    @property
    def subject(self) -> str:
        """Whose call it is, for messages."""
        return "the denoiser"

    def guided(self) -> bool:
        """Whether guidance is on."""
        return self._guides

    def guides(self) -> bool:
        """Whether it is on in some step."""
        return self._guides


def _config_of(denoiser: Any) -> str:
    """The configuration as JSON; diffusers writes into what it makes that of."""
    given = denoiser._internal_dict
    denoiser._internal_dict = type(given)(given)
    try:
        config: str = denoiser.to_json_string()
        return config
    finally:
        denoiser._internal_dict = given


@functools.lru_cache(maxsize=16)
def _profile(denoiser_class: Any, config: str, size: InputSize) -> tuple[DenoiserProfile, frozenset[str]]:
    """What a denoiser takes, and the names of its parameters; kept, because most calls differ in the schedule only."""
    meta_model = make_meta_model(denoiser_class, json.loads(config))
    return measure(meta_model, size), frozenset(name for name, _ in meta_model.named_parameters())


def _beside(denoiser: Any, size: InputSize, further_calls: Sequence[Any] | None) -> MACs:
    """What the calls beside those of guidance take in a step, for one picture."""
    family, name = family_of(denoiser), type(denoiser).__name__
    assert family is not None
    known = family.layout.beside
    if further_calls is not None and not isinstance(further_calls, Sequence):
        raise TypeError(
            f"further_calls={shown(further_calls)} is of type {type(further_calls).__name__}: give a list, with a dict "
            "for each call."
        )
    if further_calls is None:
        if family_inputs(denoiser).further:
            raise ValueError(
                f"pipelines call {name} further times in every step, with {' or '.join(known)}, and these calls "
                "run whole: give further_calls, a list with the arguments of each such as "
                f'{{"{known[-1]}": True}}, or [] for none.'
            )
        return MACs()
    for given in further_calls:
        unknown = set(given) - set(known) if isinstance(given, Mapping) else [given]
        if unknown or not given:
            raise ValueError(
                f"further_calls={shown(further_calls)} means nothing for a {name}: "
                + (f"give a dict for each call, with {' or '.join(known)}." if known else "leave it out.")
            )
    if not further_calls:
        return MACs()
    meta_model = make_meta_model(type(denoiser), json.loads(_config_of(denoiser)))
    return sum(
        (count_forward(meta_model, make_inputs(meta_model, 1, size) | dict(given)).macs for given in further_calls),
        MACs(),
    )


def _pipe_and_denoiser(given: Any, cross_attention: bool | None) -> tuple[Any, Any]:
    """A pipeline, if one is given, and its denoiser."""
    if isinstance(given, diffusers.DiffusionPipeline):
        found = resolve_pipeline(given, cross_attention)
        if found.kept_half is None:
            raise ValueError(
                f"the guidance of {type(given).__name__} is not two halves; how many parts it has is up to the call: "
                "give its denoiser, guidance=False, and the pictures times the parts as batch_size."
            )
        denoiser = found.denoiser
        return given, getattr(denoiser, "_orig_mod", denoiser)
    name = type(given).__name__
    if not isinstance(given, torch.nn.Module):
        raise TypeError(f"pipe_or_denoiser is of type {name}: give a diffusers pipeline, or its denoiser.")
    family = family_of(given)
    if family is None:
        check_denoiser(given, name)
        raise ValueError(f"{name} cannot be gated: T-GATE does not know how it does guidance. It knows {known()}.")
    check_attention(given, name, family.layout, cross_attention)
    return None, getattr(given, "_orig_mod", given)


def _guided(pipe: Any, denoiser: Any, guidance: bool | None) -> bool:
    """Whether guidance is on; pipelines never double the batch of a denoiser that embeds the guidance scale."""
    if guidance is not None and not isinstance(guidance, bool):
        raise TypeError(f"guidance={shown(guidance)} is of type {type(guidance).__name__}: give True or False.")
    timed = getattr(denoiser.config, "time_cond_proj_dim", None) is not None
    embedded = "time_cond_proj_dim" if timed else distilled_by(denoiser)
    family = family_of(denoiser)
    # Guidance by a second call, with a negative prompt, may come beside the embedded one.
    if guidance and embedded and (family is None or family.layout.calls == 1):
        raise ValueError(
            f"guidance=True, but this {type(denoiser).__name__} has its guidance in itself (config.{embedded}), so "
            "its batch is never two halves: leave out `guidance`."
        )
    asks = pipe is None or hasattr(type(pipe), "do_classifier_free_guidance") or takes(pipe, "guidance", "cfg")
    if guidance and not asks:
        raise ValueError(
            f"guidance=True, but the call of {type(pipe).__name__} takes no guidance_scale, so its batch is never two "
            "halves: leave out `guidance`."
        )
    return asks and not embedded if guidance is None else guidance


def _dtype(denoiser: Any, dtype: torch.dtype | None) -> torch.dtype:
    """The type of what is stored."""
    dtype = denoiser.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"dtype={shown(dtype)} is of type {type(dtype).__name__}: give a torch.dtype, such as torch.float16."
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not a floating-point type: give the one that the denoiser computes in.")
    return dtype


def _timeline(pipe: Any, num_inference_steps: int, family: Family | None) -> tuple[Timeline, int | None]:
    """
    Passes of the loop, passes per step, first passes that repeat step 0; as in the pipeline's own run.

    And the pass from which another denoiser runs, as in Wan 2.2.
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
    if ratio is not None and family is not None and family.second and getattr(pipe, family.second, None) is not None:
        takes_over = int((scheduler.timesteps >= ratio * scheduler.config.num_train_timesteps).sum())
    return TimestepReader(SimpleNamespace(scheduler=scheduler)).timeline(), takes_over
