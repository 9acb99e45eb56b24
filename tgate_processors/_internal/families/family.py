"""What a family of denoisers is described by."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..denoiser.spec import Layout
from ..plan.step_plan import CFGHalf


@dataclass(frozen=True)
class Family:
    """
    A kind of denoiser, and of the pipelines that call it.

    Args:
        denoiser_class (`str`): Name of its class; subclasses count too.
        models (`str`): What people call the models that have it.
        layout (`Layout`): What its batch is.
        attribute (`str`): Where pipelines have it.
        kept_half (`str`): The half that stays where guidance is dropped.
        pipelines_without_callback (`tuple` of `str`): Pipelines that lack `callback_on_step_end`, `num_timesteps` or
            `do_classifier_free_guidance`, but are known to call the denoiser once for each of `scheduler.timesteps` and
            to guide where `guidance_scale > 1`.
        conditional_in (`tuple` of `str`): Pipelines of which the conditional half stays, whatever `kept_half` says.
        second (`str`, *optional*): Where pipelines have another denoiser of the class, which takes over in the loop.
    """

    denoiser_class: str
    models: str
    layout: Layout = field(default_factory=Layout)
    attribute: str = "transformer"
    kept_half: CFGHalf = "conditional"
    pipelines_without_callback: tuple[str, ...] = ()
    conditional_in: tuple[str, ...] = ()
    second: str | None = None
