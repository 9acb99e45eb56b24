"""What a call of a pipeline whose guidance is a guider reports."""

from __future__ import annotations

import torch

from .call import PipelineCall


class GuiderPipelineCall(PipelineCall):
    """A call of a pipeline whose guidance is a guider, as messages describe it."""

    def do_cfg_now(self) -> bool:
        """Whether guidance is on: asked only in steps in which it is."""
        return True

    @property
    def cfg_hint(self) -> str:
        """What a call needs to guide."""
        return "a guider that is enabled and has a guidance_scale other than 1"

    @property
    def remedy(self) -> str:
        """What to do where the steps of a pipeline cannot be followed."""
        return "Call remove_tgate(pipe) to use this pipeline."

    def wrong_step(self, step: int, expected: int | None) -> ValueError:
        """The error for a step that is not the one that comes next; without one, the step before has not ended."""
        return ValueError(
            f"T-GATE: {self.pipeline_name} passes step {step} to its guider, where T-GATE expects "
            f"{'the guided output of the step before' if expected is None else f'step {expected}'}: every step has to "
            "call the guider's set_state once, with the steps of a loop counted from 0, and then the guider itself. "
            f"{self.remedy}"
        )

    def wrong_shape(self, output: torch.Tensor, step: int, before: torch.Size | None) -> ValueError:
        """The error for a half that is not as large as those before."""
        return ValueError(
            f"T-GATE: the denoiser's output has the shape {tuple(output.shape)} in step {step}, and had "
            f"{tuple(before or ())} in the full steps before: guidance of another size cannot be predicted. "
            f"{self.remedy}"
        )

    def without_step(self) -> ValueError:
        """The error for a guided output that belongs to no step."""
        return ValueError(
            f"T-GATE: {self.pipeline_name} calls its guider without a step, where T-GATE expects its set_state before "
            f"every call (windows, several predictions). {self.remedy}"
        )
