"""The caches that diffusers puts into its hook registry: the one place that knows how they keep their states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch

from .adapter import CacheAdapter
from .split import join_halves, split_halves


def stateful_hooks(modules: Iterable[torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, str, Any]]:
    """The hooks of a denoiser's modules that have a state: module, name and hook."""
    for module in modules:
        registry = vars(module).get("_diffusers_hook")
        for name, hook in getattr(registry, "hooks", {}).items():
            if getattr(hook, "_is_stateful", False):
                yield module, name, hook


class DiffusersHookAdapter(CacheAdapter):
    """
    Adapts one hook of a cache, with a state for each context in its manager, or a state of its own.

    Args:
        hook (`ModelHook`): The hook.

    Attributes:
        batched_attributes (`tuple` of `str`): The attributes of a state that hold rows of the batch.
        required_attributes (`tuple` of `str`): All other attributes that a state of this kind has.
        supported_calls_per_step (`tuple` of `int`): Calls of the denoiser that guidance may be made of.
        covers_most_weights (`bool`): Whether the modules with such hooks hold most weights of the denoiser.
    """

    batched_attributes: ClassVar[tuple[str, ...]]
    required_attributes: ClassVar[tuple[str, ...]]
    supported_calls_per_step: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.covers_most_weights = False
        self._stashed_half: dict[str, Any] = {}
        self._active_half = 0
        self._second_skipped = False

    @classmethod
    def matches(cls, hook: Any) -> bool:
        """Whether a hook is of this kind."""
        manager = _manager_of(hook)
        if manager is None:
            return False
        state = manager._state_cls(*manager._init_args, **manager._init_kwargs)
        return all(hasattr(state, name) for name in (*cls.batched_attributes, *cls.required_attributes))

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
    def active_states(self) -> list[Any]:
        """The states of the calls that ran in the last step; two with sequential CFG, unless the second was skipped."""
        return self.states[:1] if self._second_skipped else self.states

    def reset(self) -> None:
        """Release cached tensors; the context that the pipeline or its user is in stays."""
        _manager_of(self.hook)._state_cache.clear()
        self._stashed_half = {}
        self._second_skipped = False

    def on_resume_second_call(self) -> None:
        """Both calls of a step run again."""
        self._second_skipped = False

    def on_skip_second_call(self) -> None:
        """The second call of this step is skipped."""
        self._second_skipped = True

    def on_half_batch(self, active_half: int) -> None:
        """Leave the active half in the cache, and stash the other one."""
        self._active_half = active_half
        state = self.state
        for name in self.batched_attributes if state is not None else ():
            active, self._stashed_half[name] = split_halves(getattr(state, name), active_half)
            setattr(state, name, active)

    def on_full_batch(self) -> None:
        """Join both halves again, if both are there."""
        state, stashed = self.state, self._stashed_half
        if not stashed:
            self.reset()
            return
        for name in self.batched_attributes if state is not None else ():
            setattr(state, name, join_halves(getattr(state, name), stashed[name], self._active_half))
        self._stashed_half = {}


def _manager_of(hook: Any) -> Any:
    """The state manager of a hook."""
    return next((value for value in vars(hook).values() if hasattr(value, "_state_cache")), None)
