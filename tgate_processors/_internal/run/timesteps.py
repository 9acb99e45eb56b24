"""What a pipeline and its scheduler report of the loop that runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..plan.steps import Timeline


class TimestepReader:
    """
    The timesteps of a call, read without a copy to the host.

    Args:
        pipe (`DiffusionPipeline`): The pipeline that runs.
        arguments (`Mapping`, *optional*): The arguments of the call.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any] | None = None) -> None:
        self._pipe = pipe
        self._arguments = arguments or {}
        self._timesteps: Any = None
        self._num_run: int | None = None

    def read_timeline(self) -> Timeline:
        """The timeline of the loop, as the pipeline reports it now."""
        scheduler = self._pipe.scheduler
        if scheduler.timesteps is not self._timesteps:
            self._timesteps, self._num_run = scheduler.timesteps, None
        scheduled = self._num_scheduled()
        order = getattr(scheduler, "order", 1)
        steps = getattr(scheduler, "num_inference_steps", None) or scheduled
        # The same difference as in the pipelines' `num_warmup_steps`; a shortened loop keeps it.
        warmup_passes = max(0, scheduled - steps * order)
        passes, is_reported = self._num_passes(), True
        if passes is None:
            passes, is_reported = scheduled, False
        return Timeline(passes, order, warmup_passes, is_reported)

    def _num_scheduled(self) -> int:
        """Passes that the scheduler has prepared; with SCM the last timestep is only the end of the last pass."""
        scheduler = self._pipe.scheduler
        return len(scheduler.timesteps) - (type(scheduler).__name__ == "SCMScheduler")

    def _num_passes(self) -> int | None:
        """Passes of the loop, if the pipeline reports them."""
        if hasattr(type(self._pipe), "num_timesteps"):
            # A custom loop may never set what it inherits.
            reported = getattr(self._pipe, "_num_timesteps", None) or getattr(self._pipe, "num_timesteps", None)
            return self._num_scheduled() if reported is not None and self._reports_request(reported) else reported
        if self._num_run is None:
            self._num_run = self._num_before(self._arguments.get("denoising_end")) - self._num_skipped()
        return self._num_run

    def _reports_request(self, reported: int) -> bool:
        """Whether the pipeline reports the steps it was asked for, although `timesteps` gives others (ACE-Step)."""
        given, asked = self._arguments.get("timesteps"), self._arguments.get("num_inference_steps")
        return given is not None and reported == asked != len(given) and "strength" not in self._arguments

    def _num_skipped(self) -> int:
        """Timesteps that are skipped, because the call starts from a video that is noised in part."""
        strength, steps = self._arguments.get("strength"), self._arguments.get("num_inference_steps")
        if strength is None or steps is None:
            return 0
        return int(steps - min(int(steps * strength), steps)) * int(getattr(self._pipe.scheduler, "order", 1))

    def _num_before(self, denoising_end: Any) -> int:
        """Number of timesteps up to a share of the noise schedule, as SDXL's pipelines cut it off."""
        timesteps = self._pipe.scheduler.timesteps
        if not isinstance(denoising_end, float) or not 0 < denoising_end < 1:
            return self._num_scheduled()
        trained = self._pipe.scheduler.config.num_train_timesteps
        return int((timesteps >= round(trained - denoising_end * trained)).sum())

    @property
    def has_no_steps(self) -> bool:
        """Whether the pipeline reports that its loop has no passes at all (a strength near zero)."""
        timesteps = getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)
        nothing = timesteps is not None and len(timesteps) == 0
        return nothing or getattr(self._pipe, "_num_timesteps", None) == 0

    def is_stale(self) -> bool:
        """Whether the scheduler was set up anew since the loop began: another call has started."""
        return self._pipe.scheduler.timesteps is not self._timesteps

    def check_timestep(self, timestep: Any, index: int) -> None:
        """For a custom loop without step callbacks: check that this forward belongs to the pass that is counted."""
        timesteps = self._pipe.scheduler.timesteps
        expected = timesteps[index] if index < len(timesteps) else None
        value = timestep.flatten()[0] if isinstance(timestep, torch.Tensor) and timestep.numel() else timestep
        if expected is None or value is None or float(value) != float(expected):
            raise ValueError(
                f"T-GATE: {type(self._pipe).__name__} has a loop of its own without callback_on_step_end, so T-GATE "
                f"counts the calls of its denoiser: call {index} should be for timestep "
                f"{None if expected is None else float(expected)}, but is for {None if value is None else float(value)}"
                ". Call callback_on_step_end in that loop, or call remove_tgate(pipe) to use it."
            )
