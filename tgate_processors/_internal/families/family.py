"""The description of a family of denoisers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..denoiser.spec import Layout
from ..plan.step_plan import CFGHalf


@dataclass(frozen=True)
class Family:
    """
    A class of denoisers, and the pipelines that call them.

    Args:
        denoiser_class (`str`): Name of its class; subclasses count too.
        models (`str`): What people call the models that have it.
        layout (`Layout`): Its batch, its layers and its guidance.
        pipeline_attribute (`str`): The attribute of pipelines that holds it.
        default_cfg_half (`str`): The active half where guidance is dropped.
        pipelines_without_callback (`tuple` of `str`): Pipelines that lack `callback_on_step_end`, `num_timesteps` or
            `do_classifier_free_guidance`, but are known to call the denoiser once for each of `scheduler.timesteps` and
            to guide where `guidance_scale > 1`.
        conditional_half_pipelines (`tuple` of `str`): Pipelines with the conditional half active, whatever
            `default_cfg_half` is.
        second_denoiser (`str`, *optional*): The attribute of pipelines that holds another denoiser of the class, which
            takes over in the loop.
    """

    denoiser_class: str
    models: str
    layout: Layout = field(default_factory=Layout)
    pipeline_attribute: str = "transformer"
    default_cfg_half: CFGHalf = "conditional"
    pipelines_without_callback: tuple[str, ...] = ()
    conditional_half_pipelines: tuple[str, ...] = ()
    second_denoiser: str | None = None
