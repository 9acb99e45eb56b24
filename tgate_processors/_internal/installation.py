"""What is put into the denoisers of a pipeline, and how it is taken out again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .callback import StepClock
from .companions.deepcache import DeepCacheOrder
from .companions.others import check_others
from .families import Found, check_guidance, check_half, check_mode, find_family
from .hooks import DenoiserHooks
from .layers import CustomProcessors, Layers
from .schedule import CFGHalf


class Place:
    """The gates and hooks of one pipeline in its denoiser, or in both that it has."""

    def __init__(self, found: Found, hooks: list[DenoiserHooks], layers: list[Layers]) -> None:
        self.found = found
        self.hooks = hooks
        self.layers = layers

    def install(self) -> None:
        """Put in what is not there yet."""
        for layers, hooks in zip(self.layers, self.hooks, strict=True):
            layers.follow()
            hooks.install()

    def follow(self) -> None:
        """A call starts: processors and hooks may have come since the last one."""
        for layers, hooks in zip(self.layers, self.hooks, strict=True):
            layers.follow()
            hooks.stand_inside()

    def recover(self) -> None:
        """After a failure, put back what the pipeline itself exchanges for a call."""
        for layers in self.layers:
            layers.recover()

    def remove(self) -> None:
        """The inverse of `install`."""
        for layers, hooks in zip(self.layers, self.hooks, strict=True):
            hooks.remove()
            layers.remove()


class Installation:
    """
    What is installed in a pipeline besides its class. Shallow copies of the pipeline share it.

    When the last of them is gone, it takes itself out of their denoisers.

    Args:
        callback (`StepClock`): The clock.
        cfg_half (`str`, *optional*): The half of guidance that stays.
        custom (`str`, *optional*): What becomes of processors that are not diffusers' own.
        deepcache (`DeepCacheOrder`, *optional*): The order of a DeepCache helper.
        cross_attention (`bool`, *optional*): Whether cross-attention is gated. Defaults to what the family says.
        batch_arguments (`tuple` of `str`, *optional*): Arguments that its denoiser alone has which are a batch.
    """

    def __init__(
        self,
        callback: StepClock,
        cfg_half: CFGHalf | None = None,
        custom: CustomProcessors | None = None,
        deepcache: DeepCacheOrder | None = None,
        cross_attention: bool | None = None,
        batch_arguments: tuple[str, ...] | None = None,
    ) -> None:
        self.cross_attention = cross_attention
        self.batch_arguments = batch_arguments
        self.callback = callback
        self.cfg_half = cfg_half
        self.custom = custom
        self.deepcache = deepcache
        self.__setstate__({"_places": []})

    def __getstate__(self) -> dict[str, Any]:
        transient = ("_owners", "_calls", "_wrapped", "_lock", "_finalizer")
        return {name: value for name, value in vars(self).items() if name not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._places: list[Place]
        # Pipelines, by place: one of them may still use what another no longer does.
        self._owners: list[weakref.WeakSet[Any]] = [weakref.WeakSet() for _ in self._places]
        self._calls: set[int] = set()
        self._wrapped: set[int] = set()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _remove_all, self._places)
        self._finalizer.atexit = False

    def is_running(self, pipe: Any) -> bool:
        """Whether a call of the pipeline is under way."""
        return id(pipe) in self._calls

    @contextmanager
    def running(self, pipe: Any, *, wrapped: bool = False) -> Iterator[None]:
        """Note that a call of the pipeline is under way; a pipeline has one scheduler and can be in one at a time."""
        with self._lock:
            if id(pipe) in self._calls:
                raise RuntimeError(
                    f"T-GATE: {type(pipe).__name__} is running already, in another thread or in a call of which this "
                    "is a callback: give every call that overlaps with another one a pipeline of its own, other = "
                    "copy.copy(pipe) with other.scheduler = copy.deepcopy(pipe.scheduler). It is gated too."
                )
            self._calls.add(id(pipe))
        if wrapped:
            self._wrapped.add(id(pipe))
        try:
            yield
        finally:
            for calls in (self._calls, self._wrapped):
                calls.discard(id(pipe))

    def comes_back(self, pipe: Any) -> bool:
        """Whether a call is the one that was begun, come back by way of what others have wrapped around it."""
        # In the user's callbacks there is no run.
        return id(pipe) in self._wrapped and self.callback.state.current() is not None

    def enter(self, pipe: Any) -> None:
        """Come into a pipeline, or refuse it."""
        self.follow(pipe)

    def follow(self, pipe: Any) -> Place:
        """Be where the pipeline's denoiser is now, and refuse what has come beside T-GATE."""
        check_mode(pipe)
        here = next((place for place in self._places if place.found.is_of(pipe)), None)
        found = here.found if here is not None else find_family(pipe, self.cross_attention)
        state = self.callback.state
        helper = self.deepcache.helper if self.deepcache else None
        layout = found.family.layout
        gates_cross = layout.keeps_cross if self.cross_attention is None else self.cross_attention
        asked: dict[str, Any] = {"calls": layout.calls, "gates_cross": gates_cross, "cfg_half": self.cfg_half}
        for denoiser in found.denoisers:
            check_others(denoiser, state.schedule, helper, **asked)
        self._let_go(pipe, but=here)
        if here is not None:
            self._owners[self._places.index(here)].add(pipe)
            here.follow()
            return here
        check_half(pipe, found, self.cfg_half)
        check_guidance(pipe, found, state.schedule, self.cross_attention)
        told = self.batch_arguments is not None
        layout = layout.with_own(self.batch_arguments or ())
        hooks = [
            DenoiserHooks(state, denoiser, found.controlnet, self.cfg_half, found.kept_half, layout, told)
            for denoiser in found.denoisers
        ]
        here = Place(found, hooks, [Layers(denoiser, state, self.custom, layout) for denoiser in found.denoisers])
        self._places.append(here)
        self._owners.append(weakref.WeakSet([pipe]))
        try:
            here.install()
        except BaseException:
            self._let_go(pipe)
            raise
        return here

    def remove(self, pipe: Any) -> None:
        """Take out what no other copy of the pipeline uses."""
        self._let_go(pipe)

    def _let_go(self, pipe: Any, but: Place | None = None) -> None:
        """The pipeline does not use its places any more, but for one."""
        for place, owners in list(zip(self._places, self._owners, strict=True)):
            owners.discard(pipe)
            if place is not but and not owners:
                index = self._places.index(place)
                del self._places[index], self._owners[index]
                place.remove()


def _remove_all(places: list[Place]) -> None:
    """The pipelines are gone."""
    while places:
        places.pop().remove()
