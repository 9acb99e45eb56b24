"""One call of a pipeline whose calls of the denoiser can be left out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..denoiser.inputs import DenoiserInputs, read_arguments, read_inputs
from ..denoiser.spec import AuxiliaryScale
from ..plan.step_plan import CFGHalf, Level
from ..plan.steps import StepCounter
from .continuity import SkippableControlNet, settings_of
from .run import PipelineRun


class InterceptedRun(PipelineRun):
    """
    One call of a pipeline, which sees each call of its denoisers and of its ControlNet before it begins.

    It takes what `PipelineRun` takes.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._controlnet = SkippableControlNet()
        # The arguments that are no tensors, of the first call in the last computed step.
        self._settings: dict[str, Any] = {}
        # Whether a call of the denoiser runs whose output the pipeline gets.
        self._awaits_output = False
        # A further call that runs: its inputs, what is the same in each of its runs, and its scales.
        self._auxiliary: tuple[DenoiserInputs, Any, list[float]] | None = None

    def before_forward(
        self,
        inputs: DenoiserInputs,
        active_half: CFGHalf = "unconditional",
        *,
        may_halve: bool = True,
        is_halved: bool = False,
        denoiser: Any = None,
    ) -> None:
        """The denoiser is called: plan what it and its layers do."""
        if self._controlnet.was_skipped:
            raise ValueError(
                f"T-GATE: the ControlNet was left out in step {self.step_index}, which was to be forecast, but the "
                "denoiser has to run, because its inputs are not those of the steps before (another size, other "
                "settings). Change them in callback_on_step_end, or call apply_tgate(pipe, "
                "TGateSchedule(forecast=False))."
            )
        if self._can_forecast and (self._loop is None or not self._loop.forwards_in_pass):
            # Now, as some denoisers take their arguments apart.
            self._settings = settings_of(inputs.arguments)
        self._awaits_output = True
        super().before_forward(inputs, active_half, may_halve=may_halve, is_halved=is_halved, denoiser=denoiser)

    def skip_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """
        A module is called.

        Args:
            module (`torch.nn.Module`): The denoiser, or a ControlNet.
            args (`tuple`): Its arguments.
            kwargs (`dict`): Its keyword arguments.

        Returns:
            What the pipeline gets in place of its output, if the call is left out; else `None`.
        """
        loop = self._loop
        if loop is None:
            return None
        if self.denoisers.find(module) is None:
            forecasts = self._is_forecast_step(loop) and self.call.do_cfg_now() == self._guided
            return self._controlnet.skip(read_arguments(module, args, kwargs)) if forecasts else None
        if module is not self.denoisers.active.layers.denoiser:
            return None
        if self._cfg.skips_call and loop.forwards_in_pass == 1:
            return self._take_skipped_output(loop)
        if self._planner.plan.level is Level.FORECAST and loop.forwards_in_pass:
            inputs = read_inputs(module, args, kwargs)
            if self._auxiliary_scale(inputs) is None:
                return None
            return self._cfg.forecast_auxiliary(self._computed_call(loop, None, inputs), _settings_of_auxiliary(inputs))
        if not self._is_forecast_step(loop):
            return None
        inputs = read_inputs(module, args, kwargs)
        return self._forecast(loop, inputs) if self._continues(loop, inputs) else None

    def after_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """
        A module has been called, and the pipeline gets its output.

        Args:
            module (`torch.nn.Module`): The denoiser, or a ControlNet.
            args (`tuple`): Its arguments.
            kwargs (`dict`): Its keyword arguments.
            output (`torch.Tensor` or container): What it has given.
        """
        loop = self._loop
        if self.denoisers.find(module) is None:
            if loop is not None and loop.has_forecast_steps_left:
                self._controlnet.record(read_arguments(module, args, kwargs), output)
            return
        auxiliary, self._auxiliary = self._auxiliary, None
        if auxiliary is not None and loop is not None:
            inputs, settings, scales = auxiliary
            self._cfg.observe_auxiliary(self._computed_call(loop, output, inputs), settings, scales)
            return
        awaited, self._awaits_output = self._awaits_output, False
        if not awaited or loop is None or self._inputs is None:
            return
        if loop.has_forecast_steps_left:
            self._cfg.observe_output(self._computed_call(loop, output, self._inputs))
        is_second = self.denoisers.call_index > 0
        skips_second = self._cfg.skips_call
        if self._counts_forwards and not skips_second and (is_second or not (self._guided and self._is_sequential)):
            self.on_step_end()

    def on_auxiliary_call(self, inputs: DenoiserInputs) -> None:
        """The denoiser is called once more in a step, for guidance of another kind: it is computed."""
        scale, loop = self._auxiliary_scale(inputs), self._loop
        if scale is None or not self._can_forecast:
            return
        scales = self.call.auxiliary_scales(scale)
        in_computed_step = loop is not None and loop.forwards_in_pass and self._planner.plan.level is not Level.FORECAST
        if scales is not None and in_computed_step:
            self._auxiliary = inputs, _settings_of_auxiliary(inputs), scales
            return
        # What comes as a surprise cannot have been measured.
        self._can_forecast = False
        if loop is not None:
            loop.forbid_forecasts()

    def on_step_end(
        self,
        index: int | None = None,
        latents: Any = None,
        tensors: dict[str, Any] | None = None,
        exchanged: Collection[str] = (),
    ) -> None:
        """A pass of the loop has ended."""
        super().on_step_end(index, latents, tensors, exchanged)
        self._controlnet.end_step()

    def finish(self, *, completed: bool = True) -> None:
        """The call has ended, however it ended: release cached tensors, store the report."""
        super().finish(completed=completed)
        self._controlnet.reset()

    def _end_loop(self, loop: StepCounter) -> None:
        """All passes have ended."""
        super()._end_loop(loop)
        self._controlnet.reset()

    def _auxiliary_scale(self, inputs: DenoiserInputs) -> AuxiliaryScale | None:
        """The scale of a further call; `None` if these inputs are not those of one."""
        return self.denoisers.active.layers.layout.auxiliary_scale_of(inputs.arguments)

    def _is_forecast_step(self, loop: StepCounter) -> bool:
        """Whether the step that begins now is a forecast one, if its inputs are as those of the step before."""
        begins = self._can_forecast and loop.pass_index > 0 and loop.forwards_in_pass == 0
        known = begins and self._cfg.can_forecast and not self._planner.is_invalidated
        return known and self._planner.step_plan(loop, is_split=self.guided).level is Level.FORECAST

    def _continues(self, loop: StepCounter, inputs: DenoiserInputs) -> bool:
        """Whether inputs are as those of the step before, but for the time and the latents."""
        before = self._inputs
        if (
            before is None
            or self._controlnet.was_computed
            or self.denoisers.active.layers.layout.is_auxiliary_call(inputs.arguments)
        ):
            return False
        guided = self._is_guided(loop, inputs)
        same = (before.batch_size, before.sample_shape) == (inputs.batch_size, inputs.sample_shape)
        if guided != self._guided or not same or self._settings != settings_of(inputs.arguments):
            return False
        self._check_batch(loop, inputs, guided)
        self._check_prompt_embeds(inputs.encoder_hidden_states, loop, guided, self._controlnet.was_skipped)
        return not self._planner.is_invalidated

    def _forecast(self, loop: StepCounter, inputs: DenoiserInputs) -> Any:
        """The output of the first call of a forecast step."""
        loop.begin_forward(guided=self._guided)
        self._inputs = inputs
        self.denoisers.call_index = 0
        self._planner.skip_forward()
        output = self._cfg.forecast(self._computed_call(loop, None, inputs))
        if self._counts_forwards and not self._cfg.skips_call:
            self.on_step_end()
        return output

    def _take_skipped_output(self, loop: StepCounter) -> Any:
        """The output of the second call, which is skipped."""
        loop.begin_forward(guided=True)
        self._caches.on_skip_second_call()
        output = self._cfg.take_output()
        if self._counts_forwards:
            self.on_step_end()
        return output


def _settings_of_auxiliary(inputs: DenoiserInputs) -> Any:
    """What is the same in every run of a further call: its settings, and the shape of its batch."""
    return settings_of(inputs.arguments), inputs.batch_size, inputs.sample_shape
