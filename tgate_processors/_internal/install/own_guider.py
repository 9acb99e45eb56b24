"""A guider with T-GATE that users give their pipelines. Imports diffusers' guiders, so nothing imports it early."""

from __future__ import annotations

from typing import Any

try:
    from diffusers.configuration_utils import register_to_config
    from diffusers.guiders import ClassifierFreeGuidance
except ImportError as error:
    raise ImportError(
        "TGateGuidance needs diffusers' guiders, and this diffusers has none. Install a newer one, or use apply_tgate."
    ) from error

from ..attention.layers import CustomProcessors
from ..attention.state import TGateState
from ..caches.foreign_forwards import CustomForwards, ForeignForwards, validate_custom_forwards
from ..logs import logger
from ..plan.report import TGateReport
from ..plan.schedule import TGateSchedule
from ..plan.validation import is_choice, unlike
from ..run.guider_call import GuiderPipelineCall
from ..run.guider_run import GuiderRun
from ..run.ranks import agreement_of
from .gated_guider import GatedGuider
from .guiders import reject_caches, ungated_processors


class _UnknownCall(GuiderPipelineCall):
    """A call of a pipeline of which nothing is known but its guider."""

    @property
    def pipeline_name(self) -> str:
        """What messages call the pipeline."""
        return "this pipeline"

    @property
    def remedy(self) -> str:
        """What to do where the steps of a pipeline cannot be followed."""
        return "Use diffusers' ClassifierFreeGuidance with it."


class TGateGuidance(GatedGuider, ClassifierFreeGuidance):  # type: ignore[misc]
    r"""
    Classifier-free guidance with T-GATE, for pipelines whose guidance is a guider.

    It does what [`apply_tgate`] does to such a pipeline, as a component of it: the pipeline saves and loads it as
    `guider_config.json`. Needs a diffusers with guiders.

    Args:
        guidance_scale (`float`, *optional*, defaults to `7.5`):
            What the difference of the halves is multiplied with. This and the next five are as in
            `ClassifierFreeGuidance`.
        guidance_rescale (`float`, *optional*, defaults to `0.0`): How much of the rescaled output is mixed in.
        use_original_formulation (`bool`, *optional*, defaults to `False`):
            Whether guidance starts from the conditional half.
        start (`float`, *optional*, defaults to `0.0`): The share of the steps after which guidance begins.
        stop (`float`, *optional*, defaults to `1.0`): The share of the steps after which it ends.
        enabled (`bool`, *optional*, defaults to `True`): Whether there is guidance.
        tolerance (`float`, *optional*):
            The accepted error of the guided output. This and the next four are as in [`apply_tgate`].
        forecast (`bool`, *optional*): Whether steps are forecast. Defaults to `True`.
        levels (`str`, *optional*): A fixed plan in the place of `tolerance`, such as `"FFFF-F--FH"`.
        custom_processors (`str`, *optional*):
            What happens to attention processors that are not diffusers' own, `"leave"` or `"gate"`.
        custom_forwards (`str`, *optional*):
            What happens where a `forward` of the denoiser is not that of its class: by default it is refused, with
            `"gate"` it is not.

    Attributes:
        report (`TGateReport`): What was done in the last call.

    Raises:
        TypeError: If a setting is of the wrong kind.
        ValueError: If a setting is out of range, or has no meaning together with the others.

    Example:

    ```py
    >>> from tgate_processors import TGateGuidance

    >>> guider = TGateGuidance(guidance_scale=7.0, tolerance=0.1)
    >>> guider.new(guidance_scale=5.0).config["tolerance"]
    0.1

    ```
    """

    # diffusers finds it by this name, in the configuration of a saved pipeline.
    __module__ = "tgate_processors"
    # diffusers saves the guiders that it has loaded from somewhere; this one is saved wherever it is from.
    _diffusers_load_id = "null|null|null|null"
    # The one that has been looked at in this call.
    _denoiser: Any

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        *,
        tolerance: float | None = None,
        forecast: bool | None = None,
        levels: str | None = None,
        custom_processors: CustomProcessors | None = None,
        custom_forwards: CustomForwards | None = None,
    ) -> None:
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        if not is_choice("custom_processors", custom_processors, "leave", "gate"):
            raise ValueError(unlike("custom_processors", '"leave" or "gate"', custom_processors))
        self._custom_processors, self._custom_forwards = custom_processors, validate_custom_forwards(custom_forwards)
        schedule = TGateSchedule(tolerance=tolerance, forecast=forecast, levels=levels)
        self._tgate = TGateState(schedule, by_hand=False)
        self._asks = False
        self._renew()

    @property
    def report(self) -> TGateReport:
        """What was done in the last call, or so far in this one."""
        return self._run.report if self._run.report.num_inference_steps else self._tgate.report

    @property
    def num_conditions(self) -> int:
        """How many predictions a step takes."""
        # Pipelines ask before the first step too, whatever the last call has left when it was interrupted.
        count: int = super().num_conditions if self._asks else super(GatedGuider, self).num_conditions
        return count

    def new(self, **changed: Any) -> TGateGuidance:
        """Make another guider with these settings."""
        guider: TGateGuidance = type(self).from_config(self.config, **changed)
        return guider

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """A step begins."""
        if step == 0 or not self._run.continues(step, num_inference_steps):
            before = self._run.next_step
            self._renew()
            if step:
                self._run.join(step, num_inference_steps)
            if step and before is not None and self._tgate.warn_once("steps"):
                logger.warning(
                    "T-GATE: TGateGuidance got step %s of %s where it expected the beginning or the end of step %s. "
                    "It begins again with full steps. If no call was interrupted, nothing is gated: every step has to "
                    "call its set_state once, with the steps of a loop counted from 0, and then the guider itself.",
                    step,
                    num_inference_steps,
                    before,
                )
        super().set_state(step, num_inference_steps, timestep)

    def prepare_models(self, denoiser: Any) -> None:
        """The denoiser is about to be called."""
        super().prepare_models(denoiser)
        if denoiser is self._denoiser:
            return
        try:
            reject_caches(denoiser, self._tgate.schedule)
            ungated = ungated_processors(denoiser, self._tgate, self._custom_processors)
            forwards = ForeignForwards([denoiser], self._custom_forwards)
            self._run.see_denoiser(forwards, ungated, agreement_of([denoiser]))
        except ValueError as error:
            error.add_note("Here these are settings of TGateGuidance, and ClassifierFreeGuidance is without T-GATE.")
            raise
        self._denoiser = denoiser

    def prepare_inputs(self, data: Any) -> Any:
        """Prepare the inputs of the halves that the step asks for."""
        with _Asking(self):
            return super().prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> Any:
        """Prepare the inputs of the halves that the step asks for, from a block's state."""
        with _Asking(self):
            return super().prepare_inputs_from_block_state(data, input_fields)

    def __call__(self, data: Any) -> Any:
        """Compute the guided output of the step."""
        with _Asking(self):
            output = super().__call__(data)
        if self._run.is_finished:
            run = self._run
            self._renew()
            run.finish()
        return output

    def _renew(self) -> None:
        """Forget the last call: a new run begins with the next step."""
        self._run = GuiderRun(self._tgate, _UnknownCall(None), ForeignForwards(()))
        self._denoiser = None


class _Asking:
    """While a guider asks for the halves of a step, it counts those that the step takes."""

    def __init__(self, guider: TGateGuidance) -> None:
        self._guider = guider

    def __enter__(self) -> None:
        self._guider._asks = True

    def __exit__(self, *error: object) -> None:
        self._guider._asks = False
