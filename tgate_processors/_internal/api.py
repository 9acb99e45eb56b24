"""`apply_tgate` and its inverse: check everything, then install."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat, SupportsIndex, TypeVar

from .attention.budget import gates_cross_attention, validate_max_memory
from .attention.layers import CustomProcessors
from .attention.state import TGateState
from .caches.deepcache import DeepCacheAdapter, validate_helper
from .caches.foreign_forwards import CustomForwards, validate_custom_forwards
from .families import ResolvedPipeline, check_batch_arguments, check_cfg_half, check_guidance_mode, resolve_pipeline
from .install.callback import validate_cfg_half
from .install.guiders import GuiderInstallation, has_guider, validate_guider_settings
from .install.installation import Installation
from .install.pipeline import installed, replace, uninstall
from .install.pipeline_check import validate_pipeline
from .install.recompile_limit import restore_recompile_limit
from .logs import logger
from .plan.report import TGateReport
from .plan.schedule import GuidanceMode, TGateSchedule
from .plan.step_plan import CFGHalf
from .plan.validation import Auto, is_choice, shown, validate_names, validate_switch

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class _PipelineStub(Protocol):
    """
    What mypy sees in `from diffusers import StableDiffusionPipeline`: the stand-in for machines without torch.

    Its arguments of any kind set it apart from diffusers' models, which have the method too.
    """

    @classmethod
    def from_config(cls, *args: object, **kwargs: object) -> Any: ...


Pipeline = TypeVar("Pipeline", bound="DiffusionPipeline | _PipelineStub")


def apply_tgate(
    pipe: Pipeline,
    gate_step: SupportsIndex | SupportsFloat | Auto = "auto",
    *,
    guidance: GuidanceMode | None = None,
    cfg_interval: SupportsIndex | None = None,
    tolerance: SupportsFloat | None = None,
    forecast: bool | None = None,
    levels: str | None = None,
    sp_interval: SupportsIndex = 1,
    fi_interval: SupportsIndex = 1,
    warm_up: SupportsIndex = 0,
    cfg_half: CFGHalf | None = None,
    cross_attention: bool | None = None,
    max_memory: SupportsIndex | str | None = None,
    custom_processors: CustomProcessors | None = None,
    custom_forwards: CustomForwards | None = None,
    deepcache: Any = None,
    batch_arguments: Sequence[str] | None = None,
) -> Pipeline:
    r"""
    Apply T-GATE to a pipeline, in place. Then call the pipeline as before.

    In *full steps* the pipeline computes everything. In *half steps* kept cross-attention is reused, and one half of
    the batch of classifier-free guidance is left out: guidance is predicted, or dropped. In *forecast steps* the
    denoiser is not called: what it would give is extrapolated from its last two outputs. By default the run decides
    how much of each step is computed, by the measured error of its predictions. Steps are those that really run, so
    `strength`, `denoising_start`/`denoising_end` and custom timesteps are taken into account. A second call replaces
    the settings of the first.

    Args:
        pipe (`DiffusionPipeline` or `ModularPipeline`):
            The pipeline. Its class, denoiser hooks and attention processors change until [`remove_tgate`]. Where its
            guidance is a guider, as in modular pipelines, only the class does.
        gate_step (`int`, `float` or `str`, *optional*, defaults to `"auto"`):
            With `"auto"` the run decides how much of each step is computed. A number is how many steps are full before
            the half steps begin, as in the published method; a `float` in (0, 1) is their share of the steps that
            really run.
        guidance (`str`, *optional*):
            What happens to classifier-free guidance after the gate: `"drop"` ends it, as the published method does;
            `"predict"` keeps it, with the difference of the two halves predicted from the last full steps. Defaults to
            `"predict"` with `gate_step="auto"`, else to `"drop"`. Guidance with a memory (ACE-Step) cannot be dropped.
        cfg_interval (`int`, *optional*):
            With `guidance="predict"`, every `cfg_interval`-th step after the gate is a full step: both halves are
            computed, and cross-attention and the difference are kept anew. By default there are none.
        tolerance (`float`, *optional*):
            With `gate_step="auto"`, the accepted error of the guided output, relative to that output. Smaller values
            make more steps full, `0` all of them. Defaults to `0.2`, and with `forecast=False` to `0.6`. Where nothing
            can be forecast (beside another cache), half steps are accepted up to three times the tolerance.
        forecast (`bool`, *optional*):
            With `gate_step="auto"`, whether steps are forecast, also in calls without guidance. Defaults to `True`.
        levels (`str`, *optional*):
            A fixed plan in the place of `gate_step`: a letter for each step that runs, `"F"` for a full step, `"H"` for
            a half step and `"-"` for a forecast step, such as `"FFFF-F--FH"`. Guidance is predicted. The report of a
            run gives its own `levels`.
        sp_interval (`int`, *optional*, defaults to `1`):
            Before the gate, self-attention is computed every `sp_interval` steps. `1` computes it in every step.
        fi_interval (`int`, *optional*, defaults to `1`):
            After the gate, self-attention is computed every `fi_interval` steps. `1` computes it in every step.
        warm_up (`int`, *optional*, defaults to `0`):
            Number of first steps in which self-attention is always computed.
        cfg_half (`str`, *optional*):
            The half of classifier-free guidance that is computed after the gate, `"unconditional"` or `"conditional"`.
            Where guidance is dropped, it matters for what is not cross-attention: SDXL's pooled embeddings and sizes,
            PixArt's masks, SVD's conditioning. Defaults to `"conditional"` where guidance is predicted or gated alone.
            Where it is dropped together with cross-attention, it defaults to what the published implementation does:
            `"conditional"` for Stable Video Diffusion, `"unconditional"` for the other families of the paper; in a
            ControlNet's `guess_mode`, in GLIGEN, in other families, and where `max_memory` leaves layers out, to
            `"conditional"`. Guidance of more or other
            parts (InstructPix2Pix, perturbed-attention guidance) stays on whole, and then there is nothing to choose.
        cross_attention (`bool`, *optional*):
            Whether cross-attention is gated, or guidance alone (`False`). Defaults to `True` where the model has
            cross-attention, but to `False` for video families whose guidance is two calls of the denoiser (Wan,
            SkyReels V2, Cosmos): there the kept cross-attention takes gigabytes and saves little; the report says how
            many bytes. Where attention is joint (Stable Diffusion 3, Qwen-Image, Flux) there is none to keep, so
            guidance alone is gated, and it cannot be `True`; nor where guidance is a guider, as in modular pipelines.
        max_memory (`int` or `str`, *optional*):
            Most bytes that kept cross-attention takes, as an `int` or a string such as `"2GB"` or `"500MiB"`. Of the
            layers those are kept that save most for each byte, by the shapes seen in the run. The others compute in
            every step, in half steps on the half that goes on. It gates cross-attention where it is not gated by
            default. `0` is `cross_attention=False`. Differences of guidance, a latent or two, and kept self-attention
            come beside.
        custom_processors (`str`, *optional*):
            What happens to attention processors that are not diffusers' own. They may mix the pictures of a batch or
            count their calls (StyleAligned, Prompt-to-Prompt, reference attention), so by default they are left alone,
            all of guidance stays on and nothing is forecast; cross-attention of diffusers' own processors is still
            gated. `"gate"` treats them like diffusers' own. `"leave"` leaves mere functions alone too, which are
            refused by default.
        custom_forwards (`str`, *optional*):
            What happens where a `forward` of the denoiser, its blocks or its layers is not that of its class. It may be
            a cache (TeaCache and others), so by default the pipeline is refused, unless the function is known to keep
            nothing (offloading, compilation, LoRA and others). `"gate"` says of all of them that they keep nothing from
            one call to the next, as a profiler does.
        deepcache (`DeepCacheSDHelper`, *optional*):
            A DeepCache helper of this pipeline, with its parameters set, to run together with T-GATE. It may be
            enabled or not.
        batch_arguments (`Sequence[str]`, *optional*):
            Names of arguments that this denoiser has and diffusers' own does not (features of a garment, of a reference
            picture), and that hold the batch of guidance: one half of them is left out with it. For one inside
            a `dict`, give `"cross_attention_kwargs.features"`. `()` says that none does. By default an argument of its
            own that looks like the batch is refused in the first guided step.

    Returns:
        `DiffusionPipeline` or `ModularPipeline`: `pipe` itself.

    Raises:
        TypeError: If `pipe` is not a pipeline, or a setting is of the wrong kind.
        ValueError: If a setting is out of range, or the pipeline cannot be gated (the message says why).

    Example:

    ```py
    >>> from tgate_processors import apply_tgate, remove_tgate

    >>> pipe = apply_tgate(pipe)
    >>> image = pipe(prompt, num_inference_steps=25).images[0]
    >>> pipe = remove_tgate(pipe)
    ```

    Source: T-GATE (https://arxiv.org/abs/2404.02747).
    """
    validate_pipeline(pipe, gate_step)
    # The schedule turns numbers of every kind, numpy's too, into ints and floats.
    settings: Any = (gate_step, sp_interval, fi_interval, warm_up, guidance, cfg_interval, tolerance, forecast, levels)
    schedule = TGateSchedule(*settings)
    half = validate_cfg_half(cfg_half)
    validate_switch("cross_attention", cross_attention)
    max_bytes = validate_max_memory(max_memory, cross_attention)
    cross_attention = gates_cross_attention(cross_attention, max_bytes)
    if not is_choice("custom_processors", custom_processors, "leave", "gate"):
        raise ValueError(f'custom_processors must be "leave" or "gate", not {shown(custom_processors)}.')
    forwards = validate_custom_forwards(custom_forwards)
    batch_names = validate_names("batch_arguments", batch_arguments)
    state, found = TGateState(schedule, max_bytes, by_hand=False), None
    if has_guider(pipe):
        validate_guider_settings(pipe, schedule, half, cross_attention, max_bytes, deepcache, batch_names)
        installation: Installation = GuiderInstallation(
            state, custom_processors=custom_processors, custom_forwards=forwards
        )
    else:
        found = _resolve_and_check(pipe, schedule, half, cross_attention, batch_names)
        adapter = _deepcache_adapter(deepcache, pipe, schedule)
        installation = Installation(state, half, custom_processors, adapter, cross_attention, forwards, batch_names)
    replace(pipe, installation, found)
    if found is not None and found.default_cfg_half is None and not schedule.forecast:
        logger.warning(
            "T-GATE: the guidance of %s is not two halves, so all of it stays on after the gate: cross-attention alone "
            "stops.",
            type(pipe).__name__,
        )
    return pipe


def _resolve_and_check(
    pipe: Any,
    schedule: TGateSchedule,
    half: CFGHalf | None,
    cross_attention: bool | None,
    batch_arguments: tuple[str, ...] | None,
) -> ResolvedPipeline:
    """Resolve a pipeline, and refuse it if it cannot be gated with these settings."""
    found = resolve_pipeline(pipe, cross_attention)
    check_cfg_half(pipe, found, half)
    check_guidance_mode(pipe, found, schedule, cross_attention)
    check_batch_arguments(pipe, found, batch_arguments)
    return found


def _deepcache_adapter(helper: Any, pipe: Any, schedule: TGateSchedule) -> DeepCacheAdapter | None:
    """The adapter of a DeepCache helper of this pipeline, if there is one."""
    if helper is None:
        return None
    validate_helper(helper, pipe)
    return DeepCacheAdapter(helper, halves_cache=schedule.predicts)


def remove_tgate(pipe: Pipeline) -> Pipeline:
    r"""
    Take T-GATE out of a pipeline: class, hooks and attention processors are again the objects that they were.

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


def is_tgate_applied(pipe: DiffusionPipeline | _PipelineStub) -> bool:
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


def get_tgate_report(pipe: DiffusionPipeline | _PipelineStub) -> TGateReport:
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
