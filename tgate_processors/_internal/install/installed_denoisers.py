"""The gates and hooks of one pipeline in its denoisers, and what a call of it begins with."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..attention.layers import GatedLayers
from ..caches.adapter import CacheAdapter
from ..caches.foreign_forwards import ForeignForwards
from ..families import ResolvedPipeline
from .hooks import DenoiserHooks


class PreparedCall(NamedTuple):
    """What a call of a pipeline begins with: its denoisers, their layers and caches, the check of their `forward`."""

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
        users (`WeakSet`): The copies of the pipeline that use it: one may still do so when another no longer does.
    """

    def __init__(
        self, found: ResolvedPipeline, hooks: list[DenoiserHooks], new_layers: Callable[[torch.nn.Module], GatedLayers]
    ) -> None:
        self.found = found
        self.hooks = hooks
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._new_layers = new_layers

    def install(self) -> list[GatedLayers]:
        """Install what is missing: all of it, or gates and hooks for layers and hooks that were added."""
        all_layers = [self._new_layers(denoiser) for denoiser in self.found.denoisers]
        for layers, hooks in zip(all_layers, self.hooks, strict=True):
            layers.gate_all()
            hooks.install()
        return all_layers

    def uninstall(self) -> None:
        """The inverse of `install`, also of a part of it."""
        for denoiser, hooks in zip(self.found.denoisers, self.hooks, strict=True):
            hooks.uninstall()
            self._new_layers(denoiser).ungate_all()
