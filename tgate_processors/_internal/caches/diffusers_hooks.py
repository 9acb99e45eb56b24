"""The caches that diffusers puts into its hook registry: the one place that knows how they keep their states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch

from .adapter import CacheAdapter
from .split import join, split


def stateful_hooks(modules: Iterable[torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, str, Any]]:
    """The hooks of a denoiser's modules that keep something from one forward to the next: module, name and hook."""
    for module in modules:
        registry = vars(module).get("_diffusers_hook")
        for name, hook in getattr(registry, "hooks", {}).items():
            if getattr(hook, "_is_stateful", False):
                yield module, name, hook


class DiffusersHookAdapter(CacheAdapter):
    """
    One hook of a cache, whose state is one of a manager's, by the context that the pipeline is in, or the hook's own.

    Args:
        hook (`ModelHook`): The hook.

    Attributes:
        batch (`tuple` of `str`): The attributes of a state that hold rows of the batch.
        needs (`tuple` of `str`): All that a state has to have, to be one that is known here.
        calls (`tuple` of `int`): Calls that guidance may be made of.
        is_most (`bool`): Whether the modules with such hooks hold most weights of the denoiser.
    """

    batch: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]]
    calls: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.is_most = False
        self._other: dict[str, Any] = {}
        self._kept = 0
        self._left_out = False

    @classmethod
    def knows(cls, hook: Any) -> bool:
        """Whether it is a hook of this kind."""
        manager = _manager_of(hook)
        if manager is None:
            return False
        state = manager._state_cls(*manager._init_args, **manager._init_kwargs)
        return all(hasattr(state, name) for name in (*cls.batch, *cls.needs))

    @property
    def states(self) -> list[Any]:
        """The states of earlier forwards, one for each context."""
        return list(_manager_of(self.hook)._state_cache.values())

    @property
    def state(self) -> Any:
        """The state of the last forward, if there was one, where one call has both halves of guidance."""
        states = self.states
        if len(states) > 1:
            raise ValueError(
                f"T-GATE: {type(self.hook).__name__} keeps {len(states)} states, where one is expected for the calls "
                "of the denoiser with both halves of guidance. Take the cache out, or call remove_tgate(pipe)."
            )
        return states[0] if states else None

    @property
    def ran(self) -> list[Any]:
        """The states of the calls that ran in the last step, where guidance may be two."""
        return self.states[:1] if self._left_out else self.states

    def start(self) -> None:
        """Forget what is kept; the context that the pipeline or its user is in stays."""
        _manager_of(self.hook)._state_cache.clear()
        self._other = {}
        self._left_out = False

    def catch_up(self) -> None:
        """Both calls of guidance run again."""
        self._left_out = False

    def leave_out(self) -> None:
        """The second call of guidance comes now, and does not run."""
        self._left_out = True

    def halve(self, kept: int) -> None:
        """Keep the half that runs, and lay the other one aside."""
        self._kept = kept
        state = self.state
        for name in self.batch if state is not None else ():
            stayed, self._other[name] = split(getattr(state, name), kept)
            setattr(state, name, stayed)

    def double(self) -> None:
        """Put both halves together again, if both are there."""
        state, other = self.state, self._other
        if not other:
            self.start()
            return
        for name in self.batch if state is not None else ():
            setattr(state, name, join(getattr(state, name), other[name], self._kept))
        self._other = {}


def _manager_of(hook: Any) -> Any:
    """What keeps the states of a hook."""
    return next((value for value in vars(hook).values() if hasattr(value, "_state_cache")), None)
