"""`apply_tgate` and its inverse: check everything, then install."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

from .attention.budget import gates_cross_attention, validate_max_memory
from .attention.layers import CustomProcessors
from .attention.state import TGateState
from .caches.deepcache import DeepCacheAdapter, validate_helper
from .caches.foreign_forwards import CustomForwards, validate_custom_forwards
from .families import resolve_and_check
from .install.callback import validate_cfg_half
from .install.guiders import GuiderInstallation, has_guider, validate_guider_settings
from .install.installation import Installation
from .install.pipeline import installed, replace, uninstall
from .install.pipeline_check import Pipeline, PipelineStub, validate_pipeline
from .install.recompile_limit import restore_recompile_limit
from .logs import logger
from .plan.combinations import doubt_of_share, doubt_of_warm_up
from .plan.report import TGateReport
from .plan.schedule import GateStep, GuidanceMode, TGateSchedule, as_schedule
from .plan.step_plan import CFGHalf
from .plan.validation import is_choice, unlike, validate_names, validate_switch

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def apply_tgate(
    pipe: Pipeline,
    gate_step: GateStep | TGateSchedule = "auto",
    *,
    guidance: GuidanceMode | None = None,
    tolerance: SupportsFloat | None = None,
    cross_attention: bool | None = None,
    max_memory: SupportsIndex | str | None = None,
    deepcache: Any = None,
    cfg_half: CFGHalf | None = None,
    custom_processors: CustomProcessors | None = None,
    custom_forwards: CustomForwards | None = None,
    batch_arguments: Sequence[str] | None = None,
) -> Pipeline:
    r"""
    Apply T-GATE to a pipeline, in place. Then call the pipeline as before.

    Most steps become *half steps*, which compute one half of classifier-free guidance and predict the other, or
    *forecast steps*, in which the denoiser is not called. By default, the measured error of the predictions decides
    which. Applying T-GATE again replaces the settings.

    Args:
        pipe (`DiffusionPipeline` or `ModularPipeline`):
            The pipeline. [`remove_tgate`] restores it.
        gate_step (`int`, `float`, `str` or `TGateSchedule`, *optional*, defaults to `"auto"`):
            When to save work:

            - `"auto"`: decided in each run, by the measured error and `tolerance`.
            - `10`: after 10 full steps, all others are half steps, as in the paper. `0.4`: the same after 40 % of the
              steps.
            - `"FFFF-F--FH"`: a letter for each step that runs, `F` for full, `H` for half, `-` for forecast.
            - A [`TGateSchedule`], for everything else: no forecast steps, self-attention at intervals.
        tolerance (`float`, *optional*):
            With `"auto"`, the relative error to accept in a step. Defaults to `0.2`. A higher value is faster, a lower
            one stays closer to the original picture, and `0` changes nothing.
        guidance (`str`, *optional*):
            With a number as `gate_step`: `"drop"` ends guidance there, as in the paper, and is the default;
            `"predict"` keeps it.
        cross_attention (`bool`, *optional*):
            Whether half steps reuse cross-attention, which takes memory. Defaults to `True` where the model has any,
            but to `False` for large video models (Wan, SkyReels V2, Cosmos) and with guiders.
        max_memory (`int` or `str`, *optional*):
            Limit for the stored cross-attention, in bytes or as in `"2GB"`. The layers that save most per byte are
            stored first. `0` is `cross_attention=False`.
        deepcache (`DeepCacheSDHelper`, *optional*):
            A DeepCache helper of this pipeline, with its parameters set, to use together with T-GATE.
        cfg_half (`str`, *optional*):
            The half of guidance that half steps compute, `"conditional"` or `"unconditional"`. Defaults to
            `"conditional"`; where guidance is dropped, to the half that the published code computes.
        custom_processors (`str`, *optional*):
            What to do with attention processors that are not from diffusers. By default, classes are left alone, which
            keeps all of guidance on, and functions are refused. `"gate"` treats both like diffusers' own, `"leave"`
            leaves both alone.
        custom_forwards (`str`, *optional*):
            `"gate"` accepts a patched `forward` in the denoiser. By default it is refused, as it may be a cache, unless
            it is known to keep nothing (offloading, compilation, LoRA).
        batch_arguments (`Sequence[str]`, *optional*):
            Names of the denoiser's own arguments that hold the batch of guidance. For one inside a `dict`, write
            `"cross_attention_kwargs.features"`. `()` means that there are none.

    Returns:
        `DiffusionPipeline` or `ModularPipeline`: `pipe` itself.

    Raises:
        TypeError: If `pipe` is not a pipeline, or a setting is of the wrong kind.
        ValueError: If a setting is out of range, or the pipeline cannot be gated (the message says why).

    Example:

    ```py
    >>> from tgate_processors import TGateSchedule, apply_tgate, remove_tgate

    >>> pipe = apply_tgate(pipe)
    >>> image = pipe(prompt, num_inference_steps=25).images[0]

    >>> # T-GATE v2, as published
    >>> pipe = apply_tgate(pipe, TGateSchedule(10, sp_interval=5, warm_up=2))
    >>> image = pipe(prompt, num_inference_steps=25).images[0]
    >>> pipe = remove_tgate(pipe)
    ```

    Source: T-GATE (https://arxiv.org/abs/2404.02747).
    """
    validate_pipeline(pipe, gate_step)
    schedule = as_schedule(gate_step, guidance=guidance, tolerance=tolerance)
    half = validate_cfg_half(cfg_half)
    validate_switch("cross_attention", cross_attention)
    max_bytes = validate_max_memory(max_memory, cross_attention)
    cross_attention = gates_cross_attention(cross_attention, max_bytes)
    if not is_choice("custom_processors", custom_processors, "leave", "gate"):
        raise ValueError(unlike("custom_processors", '"leave" or "gate"', custom_processors))
    forwards = validate_custom_forwards(custom_forwards)
    batch_names = validate_names("batch_arguments", batch_arguments)
    state, found = TGateState(schedule, max_bytes, by_hand=False), None
    if has_guider(pipe):
        validate_guider_settings(pipe, schedule, half, cross_attention, max_bytes, deepcache, batch_names)
        installation: Installation = GuiderInstallation(
            state, custom_processors=custom_processors, custom_forwards=forwards
        )
    else:
        found = resolve_and_check(pipe, schedule, half, cross_attention, batch_names)
        adapter = _deepcache_adapter(deepcache, pipe, schedule)
        installation = Installation(state, half, custom_processors, adapter, cross_attention, forwards, batch_names)
    replace(pipe, installation, found)
    for doubt in (doubt_of_share(gate_step, guidance=guidance), doubt_of_warm_up(schedule)):
        if doubt is not None:
            logger.warning("T-GATE: %s", doubt)
    if found is not None and found.default_cfg_half is None and not schedule.forecast:
        logger.warning(
            "T-GATE: the guidance of %s is not two halves, so it is kept after the gate and only cross-attention is "
            "reused.",
            type(pipe).__name__,
        )
    return pipe


def _deepcache_adapter(helper: Any, pipe: Any, schedule: TGateSchedule) -> DeepCacheAdapter | None:
    """The adapter of a DeepCache helper of this pipeline, if there is one."""
    if helper is None:
        return None
    validate_helper(helper, pipe)
    return DeepCacheAdapter(helper, halves_cache=schedule.predicts)


def remove_tgate(pipe: Pipeline) -> Pipeline:
    r"""
    Remove T-GATE from a pipeline and restore its original class, hooks and attention processors.

    An attention processor that was installed after [`apply_tgate`] stays. On a pipeline without T-GATE this does
    nothing.

    Args:
        pipe (`DiffusionPipeline` or `ModularPipeline`): The pipeline.

    Returns:
        `DiffusionPipeline` or `ModularPipeline`: `pipe` itself.

    Raises:
        TypeError: If `pipe` is not a pipeline.
        RuntimeError: If called while the pipeline runs, for example by a callback.

    Example:

    ```py
    >>> from tgate_processors import apply_tgate, is_tgate_applied, remove_tgate

    >>> is_tgate_applied(remove_tgate(apply_tgate(pipe)))
    False
    ```
    """
    validate_pipeline(pipe)
    uninstall(pipe)
    restore_recompile_limit()
    return pipe


def is_tgate_applied(pipe: DiffusionPipeline | PipelineStub) -> bool:
    r"""
    Tell whether T-GATE is applied to a pipeline.

    Args:
        pipe (`DiffusionPipeline` or `ModularPipeline`): The pipeline.

    Returns:
        `bool`: `True` between [`apply_tgate`] and [`remove_tgate`].

    Raises:
        TypeError: If `pipe` is not a pipeline.

    Example:

    ```py
    >>> from tgate_processors import is_tgate_applied

    >>> is_tgate_applied(pipe)
    False
    ```
    """
    validate_pipeline(pipe)
    return installed(pipe) is not None


def get_tgate_report(pipe: DiffusionPipeline | PipelineStub) -> TGateReport:
    r"""
    Tell what T-GATE did in the last call of a pipeline.

    Args:
        pipe (`DiffusionPipeline` or `ModularPipeline`): A pipeline with T-GATE applied.

    Returns:
        `TGateReport`: The level of each step, denoiser forwards at full and half batch and left out, bytes held.

    Raises:
        TypeError: If `pipe` is not a pipeline.
        ValueError: If T-GATE is not applied to it.

    Example:

    ```py
    >>> from tgate_processors import apply_tgate, get_tgate_report

    >>> image = apply_tgate(pipe, gate_step=10)(prompt, num_inference_steps=25).images[0]
    >>> get_tgate_report(pipe).half_batch_forwards
    15
    ```
    """
    validate_pipeline(pipe)
    installation = installed(pipe)
    if installation is None:
        raise ValueError(f"T-GATE is not applied to this {type(pipe).__name__}: call apply_tgate(pipe) before the run.")
    report = installation.report_of(pipe)
    if not report.num_inference_steps:
        logger.warning("T-GATE: %s has not run since apply_tgate: the report is empty.", type(pipe).__name__)
    return report
