"""SeaCache: if the latents have changed little, all blocks are skipped and their residual is kept or extrapolated."""

from __future__ import annotations

from .diffusers_hooks import DiffusersHookAdapter


class SeaCacheAdapter(DiffusersHookAdapter):
    """
    Adapts the hook of the denoiser, which decides.

    The hook compares a step with the one before, and warns of a gap. Of diffusers' pipelines, only those with
    sequential CFG pass it the step.
    """

    supported_calls_per_step = (2,)
    batched_attributes = ("history",)
    required_attributes = ("gate_should_compute", "previous_indicator", "reset_trajectory")

    def on_resume_second_call(self) -> None:
        """Have the next step computed, in each of its calls."""
        super().on_resume_second_call()
        for state in self.states:
            state.reset_trajectory()

    def was_hit(self) -> bool:
        """Whether all blocks were skipped in the last step."""
        states = self.active_states
        return bool(states) and not any(state.gate_should_compute for state in states)
