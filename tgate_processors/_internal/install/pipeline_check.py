"""What is refused before anything is installed: what is no pipeline, and plans that it cannot follow."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import diffusers
import torch

from ..plan.schedule import TGateSchedule
from ..plan.validation import shown
from .guiders import is_modular

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class PipelineStub(Protocol):
    """
    What mypy sees in `from diffusers import StableDiffusionPipeline`: the stand-in for machines without torch.

    Its arguments of any kind set it apart from diffusers' models, which have the method too.
    """

    @classmethod
    def from_config(cls, *args: object, **kwargs: object) -> Any: ...


Pipeline = TypeVar("Pipeline", bound="DiffusionPipeline | PipelineStub")


def validate_pipeline(pipe: Any, gate_step: Any = None) -> None:
    """Refuse what is not a pipeline, and say what it is."""
    if isinstance(pipe, diffusers.DiffusionPipeline) or is_modular(pipe):
        return
    if isinstance(gate_step, diffusers.DiffusionPipeline) or is_modular(gate_step):
        raise TypeError(f"the arguments are swapped: write apply_tgate(pipe, gate_step={pipe!r}).")
    if isinstance(pipe, type):
        what, remedy = f"the class {pipe.__name__}", f"make a pipeline of it, {pipe.__name__}.from_pretrained(...)"
    elif isinstance(pipe, (str, os.PathLike)):
        what, remedy = f"the name {str(pipe)!r}", f"load it, DiffusionPipeline.from_pretrained({str(pipe)!r})"
    elif isinstance(pipe, torch.nn.Module):
        what, remedy = f"of type {type(pipe).__name__}", "pass the DiffusionPipeline that it is a part of"
    else:
        what, remedy = f"{shown(pipe)}, of type {type(pipe).__name__}", "pass a DiffusionPipeline"
    raise TypeError(f"pipe is {what}, not a diffusers pipeline: {remedy}.")


def reject_forecasts(schedule: TGateSchedule, reason: str) -> None:
    """Refuse a plan with forecast steps where no call of the denoiser can be left out."""
    if schedule.levels is not None and schedule.forecast:
        raise ValueError(
            f'T-GATE: levels={shown(schedule.levels)} has forecast steps ("-"), and {reason}: pass a plan of full and '
            "half steps."
        )
