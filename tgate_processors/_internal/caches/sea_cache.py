"""SeaCache: if the latents have changed little, all blocks are skipped and their residual is kept or extrapolated."""

from __future__ import annotations

from .diffusers_hooks import DiffusersHookAdapter


class SeaCacheAdapter(DiffusersHookAdapter):
    """
    The hook of the denoiser, which decides.

    It compares a step with the one before, and warns of a gap. Of diffusers' pipelines, only those whose guidance is
    two calls tell it the step.
    """

    calls = (2,)
    batch = ("history",)
    needs = ("gate_should_compute", "previous_indicator", "reset_trajectory")

    def catch_up(self) -> None:
        """Have the next step computed, in each of its calls."""
        super().catch_up()
        for state in self.states:
            state.reset_trajectory()

    def repeated(self) -> bool:
        """Whether all blocks were skipped in the last step."""
        ran = self.ran
        return bool(ran) and not any(state.gate_should_compute for state in ran)
