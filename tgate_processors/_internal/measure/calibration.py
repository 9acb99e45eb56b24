"""A fixed plan for a model, calibrated on some prompts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..api import apply_tgate, get_tgate_report
from ..install.pipeline_check import validate_pipeline
from ..logs import logger
from ..plan.adaptive import StepErrors
from ..plan.calibration import improve_levels, plan_levels
from ..plan.schedule import TGateSchedule
from ..plan.validation import shown, validate_float, validate_int
from .calls import half_cost, read_calls, restored


def calibrate_schedule(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    call: Mapping[str, Any] | None = None,
    *,
    budget: float,
    trials: int = 16,
    seed: int = 0,
    cross_attention: bool | None = None,
) -> TGateSchedule:
    r"""
    Find a fixed plan of levels for a model, at no more than a given cost.

    The prompts are drawn in full, which measures the errors of all predictions. The plan with the least errors is then
    improved by trial: steps are exchanged as long as the outputs come closer to those of the full runs. So it takes
    `trials + 2` calls for each prompt. If T-GATE was applied, it is applied again afterwards, with the same settings.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        prompts (`list` of `str` or `dict`): What to draw, a call for each: a prompt, or the arguments of the call.
        call (`dict`, *optional*):
            Arguments that every call gets. The plan is for its `num_inference_steps`, scheduler and guidance scale.
            Outputs are compared as latents, unless it has an `output_type` such as `"pt"`.
        budget (`float`): The most that a run may cost, in full steps of the denoiser: `10` of 25 steps.
        trials (`int`, *optional*, defaults to `16`): Plans that are tried on all prompts beside the first one.
        seed (`int`, *optional*, defaults to `0`):
            Prompt number `i` is drawn with the seed `seed + i`, unless its call has a `generator` or `latents`.
        cross_attention (`bool`, *optional*): Whether cross-attention is gated, as in [`apply_tgate`].

    Returns:
        `TGateSchedule`: The plan, for [`apply_tgate`]; its `levels` are a string.

    Raises:
        TypeError: If `pipe` is not a pipeline, or an argument is of the wrong kind.
        ValueError:
            If the pipeline cannot be gated, there are no prompts, their calls differ in their steps, no plan is within
            the budget, or the outputs are no tensors.

    Example:

    ```py
    >>> from tgate_processors import apply_tgate, calibrate_schedule

    >>> schedule = calibrate_schedule(pipe, [prompt], {"num_inference_steps": 12}, budget=6, trials=2)
    >>> pipe = apply_tgate(pipe, schedule)
    ```
    """
    validate_pipeline(pipe)
    calls = [_with_defaults(pipe, each, seed + index) for index, each in enumerate(read_calls(prompts, call))]
    trials = validate_int("trials", trials, 0)
    budget = validate_float("budget", budget, "a number of full steps of at least 0", 0)
    with restored(pipe):
        apply_tgate(pipe, tolerance=0, cross_attention=cross_attention)
        expected, errors, steps = [], [], set()
        for each in calls:
            expected.append(_draw(pipe, each))
            report = get_tgate_report(pipe)
            steps.add(report.num_inference_steps)
            errors.append((dict(report.prediction_errors), dict(report.forecast_errors)))
        if len(steps) > 1:
            raise ValueError(f"the calls have {sorted(steps)} steps, and a plan is for one number: pass all the same.")
        (number,) = steps
        share = half_cost(pipe, calls[0], number, cross_attention)

        def distance(levels: str) -> float:
            apply_tgate(pipe, levels, cross_attention=cross_attention)
            apart = [_distance(_draw(pipe, each), value) for each, value in zip(calls, expected, strict=True)]
            return _root_mean_square(apart)

        plan = plan_levels(_mean_errors(errors, number), budget, share)
        levels, apart = improve_levels(plan, distance, budget, share, trials, seed)
    logger.info("T-GATE: the plan %s is at a relative distance of %.3g from full runs.", levels, apart)
    return TGateSchedule(levels=levels)


def _with_defaults(pipe: Any, call: dict[str, Any], seed: int) -> dict[str, Any]:
    """A call that gives latents, with a seed of its own."""
    taken = inspect.signature(pipe.__call__).parameters
    defaults: dict[str, Any] = {"output_type": "latent"} if "output_type" in taken else {}
    if call.get("generator") is None and call.get("latents") is None and "generator" in taken:
        defaults["generator"] = torch.Generator("cpu").manual_seed(seed)
    return {**defaults, **call}


def _draw(pipe: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """The output of a call, whose generators are left as they were."""
    given = call.get("generator")
    generators = given if isinstance(given, list) else [given] if given is not None else []
    states = [generator.get_state() for generator in generators]
    try:
        output = pipe(**call)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
    value = output if isinstance(output, torch.Tensor) else output[0]
    if isinstance(value, list) and all(isinstance(each, torch.Tensor) for each in value):
        value = torch.stack(value)
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"the pipeline gives {shown(value)}, and tensors are needed to compare runs: pass a call with "
            'output_type="latent" or "pt".'
        )
    return value.float()


def _distance(output: torch.Tensor, expected: torch.Tensor) -> float:
    """How far an output is off, relative to its length."""
    return float((output - expected).norm() / expected.norm())


def _mean_errors(errors: Sequence[tuple[dict[int, float], dict[int, float]]], steps: int) -> list[StepErrors]:
    """The errors of each step in all calls together; `None` where there are none."""

    def mean(part: int, step: int) -> float | None:
        found = [each[part][step] for each in errors if step in each[part]]
        return _root_mean_square(found) if found else None

    return [StepErrors(mean(0, step), mean(1, step)) for step in range(steps)]


def _root_mean_square(values: Sequence[float]) -> float:
    """A mean in which the large ones count."""
    return math.sqrt(sum(value**2 for value in values) / len(values))
