"""T-GATE in the denoisers of a pipeline: how it is installed, kept up to date, and uninstalled."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..attention.layers import CustomProcessors, GatedLayers
from ..attention.state import TGateState
from ..caches.deepcache import DeepCacheAdapter
from ..caches.detect import detect_caches, reject_caches_on_controlnet
from ..caches.foreign_forwards import CustomForwards, ForeignForwards
from ..denoiser.lock import exclusively, soon
from ..families import ResolvedPipeline, reject_free_noise, resolve_and_check
from ..plan.report import TGateReport
from ..plan.step_plan import CFGHalf
from ..run.guider_run import GuiderRun
from ..run.run import PipelineRun
from .cleanup import Cleanup
from .hooks import DenoiserHooks
from .installed_denoisers import InstalledDenoisers, PreparedCall


class Installation:
    """
    T-GATE as installed in a pipeline, apart from its class. Shallow copies of the pipeline share it.

    When the last of them is gone, it takes itself out of their denoisers.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        cfg_half (`str`, *optional*): The active half that the user has chosen.
        custom_processors (`str`, *optional*): What happens to processors that are not diffusers' own.
        deepcache (`DeepCacheAdapter`, *optional*): The adapter of a DeepCache helper.
        cross_attention (`bool`, *optional*): Whether cross-attention is gated. Defaults to what the family says.
        custom_forwards (`str`, *optional*): What happens where a `forward` is not its class's own.
        batch_arguments (`tuple` of `str`, *optional*): Arguments that its denoiser alone has which are a batch.
    """

    def __init__(
        self,
        state: TGateState,
        cfg_half: CFGHalf | None = None,
        custom_processors: CustomProcessors | None = None,
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
        self.custom_processors = custom_processors
        self.deepcache = deepcache
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a denoiser are made without what is installed in it.
        transient = ("_installed", "_calls", "_reports", "_lock", "_finalizer")
        return {name: value for name, value in vars(self).items() if name not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._installed: list[InstalledDenoisers] = []
        # The calls under way, by pipeline: each by an object of its own, and whether others are wrapped around it.
        self._calls: dict[int, tuple[object, bool]] = {}
        self._reports: weakref.WeakKeyDictionary[Any, TGateReport] = weakref.WeakKeyDictionary()
        # Re-entrant: an interrupt within it does not lock this thread out.
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(self, soon, functools.partial(_remove_all, self._installed))
        self._finalizer.atexit = False

    @property
    def callback(self) -> Installation:
        """What has the `state`, as a callback that is wired by hand has it: scripts that watch a run ask for both."""
        return self

    def is_running(self, pipe: Any) -> bool:
        """Whether a call of the pipeline is under way."""
        return id(pipe) in self._calls

    def begin_call(self, pipe: Any, cleanup: Cleanup, *, wrapped: bool = False) -> None:
        """Note that a call of the pipeline is under way; a pipeline has one scheduler and can be in one at a time."""
        cleanup.add(functools.partial(self._end_call, pipe, cleanup))
        with self._lock:
            if id(pipe) in self._calls:
                raise RuntimeError(
                    f"T-GATE: {type(pipe).__name__} is running already, in another thread or in a call of which this "
                    "is a callback: pass every call that overlaps with another one a pipeline of its own, other = "
                    "copy.copy(pipe) with other.scheduler = copy.deepcopy(pipe.scheduler). It is gated too."
                )
            self._calls[id(pipe)] = cleanup, wrapped

    def _end_call(self, pipe: Any, cleanup: Cleanup) -> None:
        """The inverse of `begin_call`."""
        call, _ = self._calls.get(id(pipe), (None, False))
        if call is cleanup:
            self._calls.pop(id(pipe), None)

    def is_reentrant_call(self, pipe: Any) -> bool:
        """Whether a call is the one under way, re-entered through a wrapper that others have put around it."""
        _, wrapped = self._calls.get(id(pipe), (None, False))
        # In the user's callbacks there is no run.
        return wrapped and self.state.current() is not None

    def report_of(self, pipe: Any) -> TGateReport:
        """What the last call of a pipeline did, and not that of a copy."""
        return self._reports.get(pipe, TGateReport())

    def end_run(
        self, pipe: Any, run: PipelineRun | GuiderRun, layers: Sequence[GatedLayers], *, completed: bool
    ) -> None:
        """A call of a pipeline has ended: release cached tensors, store the report."""
        self._reports[pipe] = run.report
        for each in () if completed else layers:
            exclusively(each.restore_after_error)
        run.finish(completed=completed)

    def attach(self, pipe: Any, found: ResolvedPipeline | None = None) -> None:
        """Install into a pipeline, or refuse it; `found` is given if it was resolved and checked already."""
        self.refresh(pipe, found)

    def attach_copy(self, pipe: Any) -> None:
        """Install into a copy of a pipeline; if that is refused, its first call raises the error."""
        if not self._installed:
            with suppress(ValueError):
                self.attach(pipe)

    def refresh(self, pipe: Any, found: ResolvedPipeline | None = None) -> PreparedCall:
        """Install into the pipeline's present denoisers, and refuse caches and wrappers that T-GATE cannot run with."""
        reject_free_noise(pipe)
        here = next((installed for installed in self._installed if installed.found.is_of(pipe)), None)
        if here is not None:
            found = here.found
        elif found is None:
            found = resolve_and_check(pipe, self.state.schedule, self.cfg_half, self.cross_attention)
        helper = self.deepcache.helper if self.deepcache else None
        layout = found.family.layout
        gates_cross = layout.gates_cross_by_default if self.cross_attention is None else self.cross_attention
        asked: dict[str, Any] = {
            "calls_per_step": layout.calls_per_step,
            "gates_cross": gates_cross,
            "cfg_half": self.cfg_half,
        }
        caches = [detect_caches(denoiser, self.state.schedule, helper, **asked) for denoiser in found.denoisers]
        if self.deepcache is not None:
            caches[0].insert(0, self.deepcache)
        if found.controlnet is not None:
            reject_caches_on_controlnet(found.controlnet)
        called = (*found.denoisers, found.controlnet)
        forwards = ForeignForwards([each for each in called if each is not None], self.custom_forwards)
        forwards.check()
        layers = exclusively(functools.partial(self._install_denoisers, pipe, found))
        return PreparedCall(found, layers, caches, forwards)

    def uninstall(self, pipe: Any) -> None:
        """Uninstall what no other copy of the pipeline uses."""
        exclusively(functools.partial(self._release, pipe))

    def _install_denoisers(self, pipe: Any, found: ResolvedPipeline) -> list[GatedLayers]:
        """Install into the denoisers that were found, and uninstall from all others."""
        # Another copy of the pipeline may have been installed or uninstalled meanwhile.
        here = next((installed for installed in self._installed if installed.found.is_of(pipe)), None)
        self._release(pipe, keep=here)
        if here is not None:
            here.users.add(pipe)
            return here.install()
        # Not `self`, which would keep the pipeline's installation alive.
        state, custom_processors, batch_is_known = self.state, self.custom_processors, self.batch_arguments is not None
        layout = found.family.layout.with_batch_arguments(self.batch_arguments or ())
        hooks = [
            DenoiserHooks(
                state, denoiser, found.controlnet, self.cfg_half, found.default_cfg_half, layout, batch_is_known
            )
            for denoiser in found.denoisers
        ]
        here = InstalledDenoisers(
            found, hooks, lambda denoiser: GatedLayers(denoiser, state, custom_processors, layout)
        )
        here.users.add(pipe)
        self._installed.append(here)
        try:
            return here.install()
        except BaseException:
            self._release(pipe)
            raise

    def _release(self, pipe: Any, keep: InstalledDenoisers | None = None) -> None:
        """Release the denoisers that the pipeline uses, except those of `keep`."""
        for installed in list(self._installed):
            if installed is not keep:
                installed.users.discard(pipe)
                if not installed.users:
                    installed.uninstall()
                    self._installed.remove(installed)


def _remove_all(installed: list[InstalledDenoisers]) -> None:
    """Uninstall everything, as the pipelines are gone."""
    while installed:
        installed[-1].uninstall()
        installed.pop()
