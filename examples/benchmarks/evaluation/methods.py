"""What each method does to a pipeline and how it is undone."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from examples.testbeds.shapes.evaluation import draws_videos
from tgate_processors import TGateSchedule, apply_tgate, remove_tgate

from .caches import CACHES, cache_dit, diffusers_cache
from .cutoff import cut_off

# The settings of the published implementation's README: sp_interval and warm_up of T-GATE v2 by denoiser.
V2 = {"unet": {"sp_interval": 5, "warm_up": 2}, "transformer": {"sp_interval": 3, "warm_up": 2}}
DEEPCACHE = {"cache_interval": 3, "cache_branch_id": 0}
TOME_RATIO = 0.5


@dataclass(frozen=True)
class Entry:
    """
    A row of the table: a method with its settings, 0 where it has none.

    `interval` is that of full steps. `cache` is the interval or the threshold of a cache, 0 for its default here.
    """

    method: str
    steps: int
    gate: int = 0
    interval: int = 0
    tolerance: float = 0.0
    cache: float = 0.0

    @property
    def name(self) -> str:
        """A name that is a folder too."""
        if self.method in ("fewer-steps", "reference"):
            return f"{self.steps}-steps"
        settings = (self.cache, self.gate, self.interval, self.tolerance)
        return self.method + "".join(f"-{value:g}" for value in settings if value)


# T-GATE deciding by itself, with half steps alone and with forecast steps too.
DECIDING = ("auto", "forecast")


def denoiser_kind(pipe: Any) -> str:
    """`unet` or `transformer`."""
    return "transformer" if hasattr(pipe, "transformer") else "unet"


@contextlib.contextmanager
def plain(pipe: Any, entry: Entry) -> Iterator[dict[str, Any]]:
    """Nothing: the baseline, and fewer steps."""
    yield {}


@contextlib.contextmanager
def cutoff(pipe: Any, entry: Entry) -> Iterator[dict[str, Any]]:
    """Guidance alone stops at the gate."""
    with cut_off(pipe, entry.gate) as options:
        yield options


def tgate_settings(pipe: Any, entry: Entry) -> dict[str, Any]:
    """The arguments of `apply_tgate`: guidance dropped at the gate (v2 reuses self-attention too), or predicted."""
    if entry.method in DECIDING:
        return {"gate_step": TGateSchedule(tolerance=entry.tolerance, forecast=entry.method == "forecast")}
    if entry.method == "predict":
        return {"gate_step": TGateSchedule(entry.gate, guidance="predict", cfg_interval=entry.interval)}
    v2 = V2[denoiser_kind(pipe)] if entry.method == "tgate-v2" else {}
    settings = {"gate_step": TGateSchedule(entry.gate, **v2)}
    # On a video pipeline the default is guidance alone; this is the published method.
    return settings | ({"cross_attention": True} if draws_videos(pipe) else {})


@contextlib.contextmanager
def tgate(pipe: Any, entry: Entry) -> Iterator[dict[str, Any]]:
    """T-GATE of every kind."""
    apply_tgate(pipe, **tgate_settings(pipe, entry))
    try:
        yield {}
    finally:
        remove_tgate(pipe)


@contextlib.contextmanager
def deepcache(pipe: Any, entry: Entry) -> Iterator[dict[str, Any]]:
    """DeepCache, and together with T-GATE where there is a gate."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe)
    helper.set_params(**DEEPCACHE | ({"cache_interval": int(entry.cache)} if entry.cache else {}))
    gate = entry.gate or ("auto" if entry.tolerance else None)
    if gate is None:
        helper.enable()
    else:
        deciding = {"tolerance": entry.tolerance, "forecast": False} if gate == "auto" else {}
        apply_tgate(pipe, TGateSchedule(gate, **deciding), deepcache=helper)
    try:
        yield {}
    finally:
        if gate is None:
            helper.disable()
        else:
            remove_tgate(pipe)


@contextlib.contextmanager
def cache_and_auto(pipe: Any, entry: Entry) -> Iterator[dict[str, Any]]:
    """A cache for transformers together with the default of T-GATE."""
    alone = replace(entry, method=entry.method.removesuffix("-auto"))
    with METHODS[alone.method](pipe, alone), tgate(pipe, replace(entry, method="auto")) as options:
        yield options


@contextlib.contextmanager
def tome(pipe: Any, entry: Entry) -> Iterator[dict[str, Any]]:
    """Token merging."""
    import tomesd

    tomesd.apply_patch(pipe, ratio=TOME_RATIO)
    try:
        yield {}
    finally:
        tomesd.remove_patch(pipe)


Switch = Callable[[Any, Entry], contextlib.AbstractContextManager[dict[str, Any]]]
METHODS: dict[str, Switch] = {
    "baseline": plain,
    "reference": plain,
    "fewer-steps": plain,
    "cutoff": cutoff,
    **dict.fromkeys(("tgate", "tgate-v2", "predict", *DECIDING), tgate),
    "deepcache": deepcache,
    "deepcache-tgate": deepcache,
    "deepcache-auto": deepcache,
    "tome": tome,
    "cache-dit": cache_dit,
    **dict.fromkeys(CACHES, diffusers_cache),
    **dict.fromkeys(("taylorseer-auto", "first-block-cache-auto", "cache-dit-auto"), cache_and_auto),
}
# The reference is drawn where its steps are given.
CHOICES = [method for method in METHODS if method != "reference"]
GATED = ("cutoff", "tgate", "tgate-v2", "deepcache-tgate")
FOR_UNET = ("deepcache", "deepcache-auto", "deepcache-tgate", "tome")
FOR_TRANSFORMER = ("cache-dit", *CACHES, "taylorseer-auto", "first-block-cache-auto", "cache-dit-auto")
# What these take differs from picture to picture.
COUNTED = ("first-block-cache", "cache-dit", *(method for method in METHODS if method.endswith("-auto")))


def unsuited(method: str, pipe: Any) -> str | None:
    """Why a method is not for a pipeline, or nothing."""
    kind = denoiser_kind(pipe)
    if method in FOR_UNET and kind == "transformer":
        return "works on a UNet"
    if method in FOR_TRANSFORMER and kind == "unet":
        return "works on a transformer"
    return None


@dataclass(frozen=True)
class Settings:
    """
    The settings of the methods.

    `tuned` are the gates of the methods that have other settings besides: T-GATE v2, predicted guidance, DeepCache with
    T-GATE. `cache_intervals` are those of DeepCache and TaylorSeer, `cache_thresholds` those of First Block Cache
    and cache-dit.
    """

    gates: tuple[int, ...] = ()
    tuned: tuple[int, ...] = ()
    intervals: tuple[int, ...] = ()
    tolerances: tuple[float, ...] = ()
    cache_intervals: tuple[int, ...] = (0,)
    cache_thresholds: tuple[float, ...] = (0.0,)

    def of_tgate(self, method: str) -> tuple[float, ...]:
        """The tolerances of T-GATE, alone or together with a cache."""
        return self.tolerances or ((0.2,) if method == "forecast" else (0.6,))

    def of_cache(self, method: str) -> tuple[float, ...]:
        """The settings of a cache, alone or together with T-GATE; 0 is its own default."""
        if method.startswith(("deepcache", "taylorseer")):
            return self.cache_intervals
        return self.cache_thresholds if method.startswith(("first-block-cache", "cache-dit")) else (0,)


def entries(methods: list[str], steps: int, settings: Settings, reference: int | None = None) -> list[Entry]:
    """
    The rows of one table, the baseline first, and last the run of many steps that the others are compared with.

    Fewer steps are as many as cost what a run with the gate costs, `m` guided steps and `steps - m` at half batch.
    """
    found = {Entry("baseline", steps): None}
    gates, tuned = ([gate for gate in given if gate < steps] for given in (settings.gates, settings.tuned))
    for method in methods:
        if method == "fewer-steps":
            found |= dict.fromkeys(Entry(method, (steps + gate) // 2) for gate in gates)
        elif method in DECIDING:
            found |= dict.fromkeys(Entry(method, steps, tolerance=each) for each in settings.of_tgate(method))
        elif method == "predict":
            found |= dict.fromkeys(Entry(method, steps, gate, each) for gate in tuned for each in settings.intervals)
        elif method in ("tgate-v2", "deepcache-tgate"):
            found |= dict.fromkeys(Entry(method, steps, gate) for gate in tuned)
        elif method.endswith("-auto"):
            pairs = itertools.product(settings.of_cache(method), settings.of_tgate(method))
            found |= dict.fromkeys(Entry(method, steps, tolerance=each, cache=cache) for cache, each in pairs)
        elif method in GATED:
            found |= dict.fromkeys(Entry(method, steps, gate) for gate in gates)
        else:
            found |= dict.fromkeys(Entry(method, steps, cache=cache) for cache in settings.of_cache(method))
    if reference is not None:
        found[Entry("reference", reference)] = None
    return list(found)
