"""MagCache: by magnitudes that were measured beforehand, it skips all blocks and adds the residual of the last ones."""

from __future__ import annotations

from .diffusers_hooks import DiffusersHookAdapter


class MagCacheAdapter(DiffusersHookAdapter):
    """Adapts the hook of the first block, which decides."""

    batched_attributes = ("previous_residual",)
    required_attributes = ("accumulated_err", "accumulated_ratio", "accumulated_steps", "should_compute", "step_index")

    def on_full_batch(self) -> None:
        """Have the next step computed, as the residual of one half alone cannot serve both."""
        super().on_full_batch()
        if self.state is not None:
            self.state.previous_residual = None

    def was_hit(self) -> bool:
        """Whether all blocks were skipped in the last forward."""
        return self.state is not None and not self.state.should_compute
