"""First Block Cache: if the output of the first block has changed little, the others are skipped."""

from __future__ import annotations

from .diffusers_hooks import DiffusersHookAdapter


class FirstBlockCacheAdapter(DiffusersHookAdapter):
    """
    Adapts the hook of the first block, which decides.

    The cache goes by what has changed since it last computed. For the skipped half that is more than usual, so it tends
    to compute a full step after half steps. With sequential CFG, it decides for each call.
    """

    supported_calls_per_step = (1, 2)

    batched_attributes = ("head_block_residual", "tail_block_residuals")
    required_attributes = ("should_compute", "head_block_output")

    def was_hit(self) -> bool:
        """Whether all blocks but the first were skipped in the last step."""
        states = self.active_states
        return bool(states) and not any(state.should_compute for state in states)
