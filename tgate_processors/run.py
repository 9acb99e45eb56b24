"""What a pipeline tells about the call that it is in: its timesteps, and whether it guides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class PipelineRun:
    """
    One call of a pipeline, read without a copy to the host.

    Args:
        pipe (`DiffusionPipeline`): The pipeline that runs.
        arguments (`Mapping`, *optional*):
            The arguments of the call, for pipelines that keep in local variables what others tell.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any] | None = None) -> None:
        self._pipe = pipe
        self._arguments = arguments or {}
        self._guided: bool | None = None
        self._seen_scale: Any = None
        self._timesteps: Any = None

    def timeline(self) -> tuple[int, int, int]:
        """Passes of the loop, passes per step, and first passes that repeat step 0."""
        scheduler = self._pipe.scheduler
        self._timesteps = scheduler.timesteps
        scheduled = len(scheduler.timesteps)
        order = getattr(scheduler, "order", 1)
        steps = getattr(scheduler, "num_inference_steps", None) or scheduled
        # The same difference as in the pipelines' `num_warmup_steps`; a shortened loop keeps it.
        repeats = max(0, scheduled - steps * order)
        tells = hasattr(type(self._pipe), "num_timesteps")
        iterations = self._pipe.num_timesteps if tells else self._until(self._arguments.get("denoising_end"))
        return iterations, order, repeats

    def _until(self, denoising_end: Any) -> int:
        """Number of timesteps up to a share of the noise schedule, as SDXL's pipelines cut it off."""
        timesteps = self._pipe.scheduler.timesteps
        if not isinstance(denoising_end, float) or not 0 < denoising_end < 1:
            return len(timesteps)
        trained = self._pipe.scheduler.config.num_train_timesteps
        return int((timesteps >= round(trained - denoising_end * trained)).sum())

    def is_over(self) -> bool:
        """Whether the scheduler was set up anew since the loop began: another call has started."""
        return self._pipe.scheduler.timesteps is not self._timesteps

    def guided(self) -> bool:
        """Whether the denoiser's batch holds both halves of classifier-free guidance now."""
        if not hasattr(type(self._pipe), "do_classifier_free_guidance"):
            scale = self._arguments.get("guidance_scale")
            return scale is not None and scale > 1
        # Callbacks may change the scale between two steps. Where it is a tensor (SVD), asking the pipeline waits for
        # the device, so ask only when it is another one.
        scale = getattr(self._pipe, "_guidance_scale", None)
        if self._guided is None or scale is not self._seen_scale:
            self._guided = bool(self._pipe.do_classifier_free_guidance)
            self._seen_scale = scale
        return self._guided
