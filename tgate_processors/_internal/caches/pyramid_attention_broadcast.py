"""Pyramid Attention Broadcast: the output of an attention layer is given out again for some steps."""

from __future__ import annotations

from typing import Any

from .diffusers_hooks import DiffusersHookAdapter


class PyramidAttentionBroadcastAdapter(DiffusersHookAdapter):
    """The hook of one attention layer; its state is its own."""

    batch = ("cache",)

    @classmethod
    def knows(cls, hook: Any) -> bool:
        """Whether it is a hook of this kind."""
        state = getattr(hook, "state", None)
        return set(vars(state) if state is not None else ()) == {"cache", "iteration"}

    @property
    def states(self) -> list[Any]:
        """The state."""
        return [self.hook.state]

    def start(self) -> None:
        """Forget what is kept."""
        self.hook.state.reset()
        self._other = {}

    def double(self) -> None:
        """The output of one half alone is none for both: the layer is computed."""
        super().double()
        self.state.cache = None
