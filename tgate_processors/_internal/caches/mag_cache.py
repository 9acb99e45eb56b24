"""MagCache: by magnitudes that were measured beforehand, it skips all blocks and adds the residual of the last ones."""

from __future__ import annotations

from .diffusers_hooks import DiffusersHookAdapter


class MagCacheAdapter(DiffusersHookAdapter):
    """The hook of the first block, which decides."""

    batch = ("previous_residual",)
    needs = ("accumulated_err", "accumulated_ratio", "accumulated_steps", "should_compute", "step_index")

    def double(self) -> None:
        """The residual of one half alone is none for both: the next step is computed."""
        super().double()
        if self.state is not None:
            self.state.previous_residual = None

    def repeated(self) -> bool:
        """Whether all blocks were skipped."""
        return self.state is not None and not self.state.should_compute
