"""T-GATE for denoising loops of one's own: which halves of guidance a step computes, and what stands for the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, SupportsFloat, SupportsIndex

import torch

from ..plan.adaptive import StepErrors
from ..plan.report import TGateReport
from ..plan.report_builder import NO_LAYER_COUNTS, ReportBuilder
from ..plan.schedule import TGateSchedule
from ..plan.step_plan import Level
from ..plan.steps import StepCounter, Timeline
from ..plan.validation import shown, validate_guidance_scale, validate_int
from .given_halves import check_halves
from .halves_cfg import HalvesCFG

LevelLetter = Literal["F", "H", "-"]

_SETTINGS = ("num_inference_steps", "tolerance", "forecast", "plan")
_DONE = ("levels", "prediction_errors", "forecast_errors", "peak_bytes")
_STATE = (*_SETTINGS, *_DONE, "guidance_scale", "guided", "known_from", "shape")


class TGateLoop:
    r"""
    T-GATE for one request in a denoising loop of your own, without a pipeline.

    In every step, call [`begin_step`], compute what it asks for, and pass that to [`end_step`], which returns both
    halves of guidance:

    | level | what you compute |
    |---|---|
    | `"F"`, a full step | both halves of guidance, in one batch or in two calls; without guidance, the prediction |
    | `"H"`, a half step | the conditional half |
    | `"-"`, a forecast step | nothing |

    What you do not compute is predicted as [`apply_tgate`] predicts it, and the levels are those of
    `apply_tgate(pipe, cross_attention=False)`. Attention is not touched. All state is in this object, so requests that
    run at once have one object each.

    Args:
        num_inference_steps (`int`): Steps of the loop: so often [`begin_step`] is called.
        guidance_scale (`float` or `torch.Tensor`, *optional*):
            What your guidance multiplies the difference of the halves with, as in
            `uncond + guidance_scale * (cond - uncond)`. Errors are measured with it. Guidance is on if it is a number
            above 1 or a tensor. It is an attribute too: set it between two steps where guidance changes.
        tolerance (`float`, *optional*):
            The accepted error of the guided output, relative to that output. Smaller values make more steps full, `0`
            all of them. Defaults to `0.2`, and with `forecast=False` to `0.6`.
        forecast (`bool`, *optional*): Whether steps are forecast. Defaults to `True`.
        levels (`str`, *optional*):
            A fixed plan in the place of `tolerance`: a letter for each step, such as `"FFFF-F--FH"`.

    Raises:
        TypeError: If a setting is of the wrong kind.
        ValueError: If a setting is out of range, or has no meaning together with the others.

    Example:

    ```py
    >>> import torch
    >>> from tgate_processors import TGateLoop

    >>> latents, prompt, negative = torch.randn(3, 1, 4, 8, 8)
    >>> loop = TGateLoop(6, guidance_scale=5.0, levels="FF-FH-")
    >>> for _ in range(6):
    ...     level, cond, uncond = loop.begin_step(), None, None
    ...     if level != "-":
    ...         cond = latents * prompt  # the denoiser, with the prompt
    ...     if level == "F":
    ...         uncond = latents * negative  # the denoiser, with the negative prompt
    ...     cond, uncond = loop.end_step(cond, uncond)
    ...     latents = latents - 0.1 * (uncond + 5.0 * (cond - uncond))
    >>> loop.report.full_batch_forwards, loop.report.half_batch_forwards, loop.report.forecast_forwards
    (3, 1, 2)

    ```
    """

    def __init__(
        self,
        num_inference_steps: SupportsIndex,
        guidance_scale: SupportsFloat | torch.Tensor | None = None,
        *,
        tolerance: SupportsFloat | None = None,
        forecast: bool | None = None,
        levels: str | None = None,
    ) -> None:
        settings: Any = {"tolerance": tolerance, "forecast": forecast, "levels": levels}
        self._schedule = TGateSchedule(**settings)
        self._num_steps = validate_int("num_inference_steps", num_inference_steps, 1)
        self.guidance_scale = guidance_scale
        self._start()

    def _start(self) -> None:
        """Begin with the first step, and know nothing."""
        forecast = bool(self._schedule.forecast)
        self._counter = StepCounter(self._schedule, Timeline(self._num_steps), can_forecast=forecast)
        self._cfg = HalvesCFG(self._schedule)
        self._cfg.begin(can_forecast=forecast)
        self._report_builder = ReportBuilder(tolerance=self._schedule.tolerance)
        # The level of the step that runs.
        self._level: Level | None = None
        # Whether guidance is on in the step that runs, or has run last.
        self._guided: bool | None = None
        # The step from which on something is known, and the shape of the halves since then.
        self._known_from = 0
        self._shape: torch.Size | None = None

    @property
    def guidance_scale(self) -> float | torch.Tensor | None:
        """What guidance multiplies the difference of its halves with."""
        return self._scale

    @guidance_scale.setter
    def guidance_scale(self, scale: SupportsFloat | torch.Tensor | None) -> None:
        self._scale = scale if isinstance(scale, torch.Tensor) else validate_guidance_scale(scale)

    @property
    def report(self) -> TGateReport:
        """What was computed so far, as a [`TGateReport`]: the levels, and the errors that were measured."""
        return self._report_builder.report

    def begin_step(self) -> LevelLetter:
        r"""
        Begin a step.

        Returns:
            `str`: Its level, which says what to compute: `"F"`, `"H"` or `"-"`.

        Raises:
            ValueError: If the step before has not ended, or if all steps have.
        """
        step = self._counter.pass_index
        if self._level is not None:
            raise ValueError(
                f"T-GATE: begin_step was called twice in step {step}. Call end_step once in every step, in forecast "
                "steps too."
            )
        if self._counter.is_finished:
            raise ValueError(
                f"T-GATE: begin_step was called after the last of {self._num_steps} steps. Make one TGateLoop for each "
                "request, with the number of its steps as num_inference_steps."
            )
        guided = isinstance(self._scale, torch.Tensor) or (self._scale is not None and self._scale > 1)
        if self._guided is not None and guided is not self._guided:
            self.forget()
        self._guided = guided
        self._level = self._cfg.level_of(self._counter, guided=guided, was_guided=guided)
        return self._level.value

    def end_step(
        self, cond: torch.Tensor | None = None, uncond: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        End a step: pass what was computed, and get both halves.

        Args:
            cond (`torch.Tensor`, *optional*):
                The conditional half, or the prediction of a step without guidance; nothing in a forecast step. Its
                first dimension is the batch. The sample with the largest error decides for all.
            uncond (`torch.Tensor`, *optional*): The unconditional half of a full step with guidance.

        Returns:
            `tuple` of `torch.Tensor`: The conditional half and the unconditional one, for your own guidance. A half
            that you passed is the same object. Without guidance both are the same.

        Raises:
            TypeError: If a half is not a tensor.
            ValueError: If no step has begun, or if the halves are not those that its level asks for, or of another
                shape than before.
        """
        level, guided = self._level, bool(self._guided)
        if level is None:
            raise ValueError(
                "T-GATE: end_step was called without begin_step. Call begin_step once before it, and compute what the "
                "level that it returns asks for."
            )
        what = f'step {self._counter.pass_index} has level "{level.value}" with guidance {"on" if guided else "off"}'
        self._shape = check_halves(what, cond, uncond, level=level, guided=guided, shape=self._shape)
        # What is kept holds no graph.
        first, second = (None if half is None else half.detach() for half in (cond, uncond))
        halves = self._cfg.complete_step(self._counter, level, first, second, self._scale, guided=guided)
        self._count_step(level, self._cfg.read_errors())
        self._level = None
        if self._counter.is_finished:
            self._cfg.release()
        cond = halves[0] if cond is None else cond
        other = halves[1] if uncond is None else uncond
        return cond, cond if other is None else other

    def forget(self) -> None:
        r"""
        Forget what earlier steps have shown, and go on with full steps until enough is known again.

        Call it between two steps where something else than the time and the latents changes: the prompt, the denoiser
        (Wan 2.2 has two), the size, or the latents themselves if they are not those that the step before led to. Where
        `guidance_scale` turns guidance on or off, this is done for you.

        Raises:
            ValueError: If called between [`begin_step`] and [`end_step`].
        """
        self._check_between_steps("forget")
        self._known_from, self._shape = self._counter.pass_index, None
        self._counter.restart_controller()
        self._cfg.begin(can_forecast=bool(self._schedule.forecast))
        self._cfg.needs_history = self._known_from > 0

    def state_dict(self) -> dict[str, Any]:
        r"""
        Give the settings and the state, to go on later or elsewhere.

        Returns:
            `dict`: Tensors, numbers and strings, in lists and tuples. `torch.save` takes it, and
            `torch.load(weights_only=True)` returns it.

        Raises:
            ValueError: If called between [`begin_step`] and [`end_step`].
        """
        self._check_between_steps("state_dict")
        report = self.report
        return {
            **self._settings(),
            "guidance_scale": self._scale,
            "guided": self._guided,
            "known_from": self._known_from,
            "shape": None if self._shape is None else tuple(self._shape),
            **{name: getattr(report, name) for name in _DONE},
            **self._cfg.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        r"""
        Go on where another object was.

        Args:
            state_dict (`dict`): What its [`state_dict`] gave. The tensors have to be on the device of the loop.

        Raises:
            ValueError: If it lacks something, or is of other settings than these.
        """
        expected = {*_STATE, *self._cfg.state_dict()}
        if expected != set(state_dict):
            odd = sorted(expected ^ set(state_dict))
            raise ValueError(f"T-GATE: state_dict lacks or adds {odd}. Pass what TGateLoop.state_dict() gave.")
        for name, value in self._settings().items():
            if state_dict[name] != value:
                raise ValueError(
                    f"T-GATE: state_dict is of {name}={shown(state_dict[name])}, and this TGateLoop has "
                    f"{name}={shown(value)}. Make it with the same settings."
                )
        self._start()
        self.guidance_scale = state_dict["guidance_scale"]
        self._guided, self._known_from = state_dict["guided"], state_dict["known_from"]
        errors = [dict(state_dict[name]) for name in ("prediction_errors", "forecast_errors")]
        # What the controller knows follows from the steps so far.
        for step, letter in enumerate(state_dict["levels"]):
            if step == self._known_from:
                self._counter.restart_controller()
            self._count_step(Level(letter), StepErrors(*(each.get(step) for each in errors)), state_dict["peak_bytes"])
        if self._known_from == self._counter.pass_index:
            self._counter.restart_controller()
        self._cfg.load_state_dict(state_dict)
        self._shape = None if state_dict["shape"] is None else torch.Size(state_dict["shape"])

    def _settings(self) -> dict[str, Any]:
        """What has to be the same where a state is loaded."""
        schedule = self._schedule
        values = (self._num_steps, schedule.tolerance, schedule.forecast, schedule.levels)
        return dict(zip(_SETTINGS, values, strict=True))

    def _count_step(self, level: Level, errors: StepErrors, held: int | None = None) -> None:
        """A step has ended: add it to the report, and let the next one follow."""
        step = self._counter.pass_index
        self._report_builder.add_errors(step, errors)
        self._counter.begin_forward()
        self._counter.end_pass(level=level, errors=errors)
        self._cfg.end_step()
        nbytes = self._cfg.nbytes if held is None else held
        self._report_builder.add_pass(self._counter, step, level=level, counts=NO_LAYER_COUNTS, cached_bytes=nbytes)

    def _check_between_steps(self, name: str) -> None:
        """Refuse a call within a step."""
        if self._level is not None:
            raise ValueError(
                f"T-GATE: {name} was called within step {self._counter.pass_index}. Call it after end_step and before "
                "the next begin_step."
            )
