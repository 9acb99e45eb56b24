"""Pyramid Attention Broadcast: the output of an attention layer is reused for some steps."""

from __future__ import annotations

from typing import Any

from .diffusers_hooks import DiffusersHookAdapter


class PyramidAttentionBroadcastAdapter(DiffusersHookAdapter):
    """Adapts the hook of one attention layer, which has a state of its own."""

    batched_attributes = ("cache",)

    @classmethod
    def matches(cls, hook: Any) -> bool:
        """Whether a hook is of this kind."""
        state = getattr(hook, "state", None)
        return set(vars(state) if state is not None else ()) == {"cache", "iteration"}

    @property
    def states(self) -> list[Any]:
        """The one state of the hook."""
        return [self.hook.state]

    def reset(self) -> None:
        """Release cached tensors."""
        self.hook.state.reset()
        self._stashed_half = {}

    def on_full_batch(self) -> None:
        """Have the layer computed, as the output of one half alone cannot serve both."""
        super().on_full_batch()
        self.state.cache = None
