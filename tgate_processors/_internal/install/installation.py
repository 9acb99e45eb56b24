"""What is put into the denoisers of a pipeline, and how it is taken out again."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from ..attention.layers import CustomProcessors, GatedLayers
from ..attention.state import TGateState
from ..caches.adapter import CacheAdapter
from ..caches.deepcache import DeepCacheAdapter
from ..caches.detect import detect_caches, reject_caches_on_controlnet
from ..caches.foreign_forwards import CustomForwards, ForeignForwards
from ..denoiser.lock import exclusively, soon
from ..families import ResolvedPipeline, check_guidance, check_half, check_mode, resolve_pipeline
from ..plan.report import TGateReport
from ..plan.step_plan import CFGHalf
from ..run.guider_run import GuiderRun
from ..run.run import PipelineRun
from .cleanup import Cleanup
from .hooks import DenoiserHooks


class PreparedCall(NamedTuple):
    """What a call of a pipeline begins with: its denoisers, their layers and caches, and what they do when called."""

    found: ResolvedPipeline
    layers: list[GatedLayers]
    caches: list[list[CacheAdapter]]
    forwards: ForeignForwards


class InstalledDenoisers:
    """
    The gates and hooks of one pipeline in its denoiser, or in both that it has.

    Args:
        found (`ResolvedPipeline`): The denoisers, and how they are gated.
        hooks (`list` of `DenoiserHooks`): The hooks of each.
        new_layers (`Callable`): Makes the `GatedLayers` of a denoiser for one call.

    Attributes:
        owners (`WeakSet`): The copies of the pipeline that use it: one may still do so when another no longer does.
    """

    def __init__(
        self, found: ResolvedPipeline, hooks: list[DenoiserHooks], new_layers: Callable[[torch.nn.Module], GatedLayers]
    ) -> None:
        self.found = found
        self.hooks = hooks
        self.owners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._new_layers = new_layers

    def install(self) -> list[GatedLayers]:
        """Put in what is not there: all of it, or what has to stand in front of processors and hooks that have come."""
        all_layers = [self._new_layers(denoiser) for denoiser in self.found.denoisers]
        for layers, hooks in zip(all_layers, self.hooks, strict=True):
            layers.gate_all()
            hooks.install()
        return all_layers

    def remove(self) -> None:
        """The inverse of `install`, of whatever part of it is there."""
        for denoiser, hooks in zip(self.found.denoisers, self.hooks, strict=True):
            hooks.remove()
            self._new_layers(denoiser).ungate_all()


class Installation:
    """
    What is installed in a pipeline besides its class. Shallow copies of the pipeline share it.

    When the last of them is gone, it takes itself out of their denoisers.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        cfg_half (`str`, *optional*): The half of guidance that stays.
        custom (`str`, *optional*): What becomes of processors that are not diffusers' own.
        deepcache (`DeepCacheAdapter`, *optional*): The order of a DeepCache helper.
        cross_attention (`bool`, *optional*): Whether cross-attention is gated. Defaults to what the family says.
        custom_forwards (`str`, *optional*): What becomes of a `forward` that is not its class's own.
        batch_arguments (`tuple` of `str`, *optional*): Arguments that its denoiser alone has which are a batch.
    """

    def __init__(
        self,
        state: TGateState,
        cfg_half: CFGHalf | None = None,
        custom: CustomProcessors | None = None,
        deepcache: DeepCacheAdapter | None = None,
        cross_attention: bool | None = None,
        custom_forwards: CustomForwards | None = None,
        batch_arguments: tuple[str, ...] | None = None,
    ) -> None:
        self.custom_forwards = custom_forwards
        self.cross_attention = cross_attention
        self.batch_arguments = batch_arguments
        self.state = state
        self.cfg_half = cfg_half
        self.custom = custom
        self.deepcache = deepcache
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a denoiser are made without what is installed in it.
        transient = ("_places", "_calls", "_reports", "_lock", "_finalizer")
        return {name: value for name, value in vars(self).items() if name not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._places: list[InstalledDenoisers] = []
        # The calls under way, by pipeline: each by an object of its own, and whether others are wrapped around it.
        self._calls: dict[int, tuple[object, bool]] = {}
        self._reports: weakref.WeakKeyDictionary[Any, TGateReport] = weakref.WeakKeyDictionary()
        # Re-entrant: an interrupt within it does not lock this thread out.
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(self, soon, functools.partial(_remove_all, self._places))
        self._finalizer.atexit = False

    def is_running(self, pipe: Any) -> bool:
        """Whether a call of the pipeline is under way."""
        return id(pipe) in self._calls

    def begin_call(self, pipe: Any, ending: Cleanup, *, wrapped: bool = False) -> None:
        """Note that a call of the pipeline is under way; a pipeline has one scheduler and can be in one at a time."""
        ending.undo(functools.partial(self._end_call, pipe, ending))
        with self._lock:
            if id(pipe) in self._calls:
                raise RuntimeError(
                    f"T-GATE: {type(pipe).__name__} is running already, in another thread or in a call of which this "
                    "is a callback: give every call that overlaps with another one a pipeline of its own, other = "
                    "copy.copy(pipe) with other.scheduler = copy.deepcopy(pipe.scheduler). It is gated too."
                )
            self._calls[id(pipe)] = ending, wrapped

    def _end_call(self, pipe: Any, ending: Cleanup) -> None:
        """The inverse of `begin_call`."""
        call, _ = self._calls.get(id(pipe), (None, False))
        if call is ending:
            self._calls.pop(id(pipe), None)

    def comes_back(self, pipe: Any) -> bool:
        """Whether a call is the one that was begun, come back by way of what others have wrapped around it."""
        _, wrapped = self._calls.get(id(pipe), (None, False))
        # In the user's callbacks there is no run.
        return wrapped and self.state.current() is not None

    def report_of(self, pipe: Any) -> TGateReport:
        """What the last call of a pipeline did, and not that of a copy."""
        return self._reports.get(pipe, TGateReport())

    def end_run(
        self, pipe: Any, run: PipelineRun | GuiderRun, layers: Sequence[GatedLayers], *, completed: bool
    ) -> None:
        """A call of a pipeline has ended: hold nothing, and leave the report."""
        self._reports[pipe] = run.report
        for each in () if completed else layers:
            exclusively(each.restore_after_error)
        run.finish(completed=completed)

    def enter(self, pipe: Any, found: ResolvedPipeline | None = None) -> None:
        """Come into a pipeline, or refuse it. What it was resolved to may be known, and checked, already."""
        self.follow(pipe, found)

    def come_along(self, pipe: Any) -> None:
        """Come into a copy of a pipeline. What stands against it is said by its first call."""
        if not self._places:
            with suppress(ValueError):
                self.enter(pipe)

    def follow(self, pipe: Any, found: ResolvedPipeline | None = None) -> PreparedCall:
        """Be where the pipeline's denoiser is now, and refuse what has come beside T-GATE."""
        check_mode(pipe)
        here = next((place for place in self._places if place.found.is_of(pipe)), None)
        if here is not None:
            found = here.found
        elif found is None:
            found = resolve_pipeline(pipe, self.cross_attention)
            check_half(pipe, found, self.cfg_half)
            check_guidance(pipe, found, self.state.schedule, self.cross_attention)
        helper = self.deepcache.helper if self.deepcache else None
        layout = found.family.layout
        gates_cross = layout.keeps_cross if self.cross_attention is None else self.cross_attention
        asked: dict[str, Any] = {"calls_per_step": layout.calls, "gates_cross": gates_cross, "cfg_half": self.cfg_half}
        caches = [detect_caches(denoiser, self.state.schedule, helper, **asked) for denoiser in found.denoisers]
        if self.deepcache is not None:
            caches[0].insert(0, self.deepcache)
        if found.controlnet is not None:
            reject_caches_on_controlnet(found.controlnet)
        called = (*found.denoisers, found.controlnet)
        forwards = ForeignForwards([each for each in called if each is not None], self.custom_forwards)
        forwards.check()
        layers = exclusively(functools.partial(self._settle, pipe, found))
        return PreparedCall(found, layers, caches, forwards)

    def remove(self, pipe: Any) -> None:
        """Take out what no other copy of the pipeline uses."""
        exclusively(functools.partial(self._let_go, pipe))

    def _settle(self, pipe: Any, found: ResolvedPipeline) -> list[GatedLayers]:
        """Be in the denoisers that were found, and in no other ones."""
        # Another copy of the pipeline may have come here or gone meanwhile.
        here = next((place for place in self._places if place.found.is_of(pipe)), None)
        self._let_go(pipe, but=here)
        if here is not None:
            here.owners.add(pipe)
            return here.install()
        # Not `self` in the place, which would keep the pipeline's installation alive.
        state, custom, told = self.state, self.custom, self.batch_arguments is not None
        layout = found.family.layout.with_own(self.batch_arguments or ())
        hooks = [
            DenoiserHooks(state, denoiser, found.controlnet, self.cfg_half, found.kept_half, layout, told)
            for denoiser in found.denoisers
        ]
        here = InstalledDenoisers(found, hooks, lambda denoiser: GatedLayers(denoiser, state, custom, layout))
        here.owners.add(pipe)
        self._places.append(here)
        try:
            return here.install()
        except BaseException:
            self._let_go(pipe)
            raise

    def _let_go(self, pipe: Any, but: InstalledDenoisers | None = None) -> None:
        """The pipeline does not use its places any more, but for one."""
        for place in list(self._places):
            if place is not but:
                place.owners.discard(pipe)
                if not place.owners:
                    place.remove()
                    self._places.remove(place)


def _remove_all(places: list[InstalledDenoisers]) -> None:
    """The pipelines are gone."""
    while places:
        places[-1].remove()
        places.pop()
