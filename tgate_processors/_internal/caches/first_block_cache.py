"""First Block Cache: if the first block gives about what it gave, the others are skipped and their residual kept."""

from __future__ import annotations

from .diffusers_hooks import DiffusersHookAdapter


class FirstBlockCacheAdapter(DiffusersHookAdapter):
    """
    The hook of the first block, which decides.

    The cache goes by what has changed since it last computed. Of the half that was left out that is more than usual, so
    a full step after half steps is one that it rather computes. Where guidance is two calls, it does so for each.
    """

    calls = (1, 2)

    batch = ("head_block_residual", "tail_block_residuals")
    needs = ("should_compute", "head_block_output")

    def repeated(self) -> bool:
        """Whether all blocks but the first were skipped."""
        ran = self.ran
        return bool(ran) and not any(state.should_compute for state in ran)
