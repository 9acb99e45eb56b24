"""Running a `DeepCacheSDHelper` in T-GATE's order; the helper itself stays as the user made it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .companion import Companion


def check_helper(helper: Any, pipe: Any) -> None:
    """Refuse what is not a parametrised helper of this pipeline."""
    if isinstance(helper, type) or not all(
        callable(getattr(helper, name, None)) for name in ("enable", "disable", "set_params")
    ):
        raise TypeError(
            f"deepcache={helper!r} is of type {type(helper).__name__}: give a DeepCacheSDHelper(pipe) "
            "(pip install DeepCache)."
        )
    if getattr(helper, "pipe", None) is not pipe:
        raise ValueError(
            f"deepcache={helper!r} is the helper of another pipeline: give a DeepCacheSDHelper made with this "
            f"{type(pipe).__name__}."
        )
    if not hasattr(helper, "params"):
        raise ValueError(
            f"deepcache={helper!r} has no parameters: call its set_params(cache_interval=3, cache_branch_id=0) first."
        )
    if getattr(pipe, "unet", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no UNet, and DeepCache knows nothing else: leave out `deepcache`.")


class DeepCacheOrder(Companion):
    """
    When a DeepCache helper starts afresh.

    Its cached tensors have the batch of the step that made them, so it starts afresh where guidance ends; at the gate
    step too, because every layer has to be computed there. A helper that is not enabled is enabled for the call only.

    Args:
        helper (`DeepCacheSDHelper`): The user's helper.
    """

    computes_gate = True

    def __init__(self, helper: Any) -> None:
        self.helper = helper

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the helper enabled during a call, and as it was afterwards."""
        given_enabled = bool(getattr(self.helper, "function_dict", None))
        given = dict(vars(self.helper))
        modules = list(self.helper.pipe.unet.modules())
        forwards = {module: module.__dict__["forward"] for module in modules if "forward" in module.__dict__}
        if given_enabled:
            self.start()
        try:
            if not given_enabled:
                self.helper.enable()
            yield
        finally:
            if given_enabled:
                self.start()
            else:
                self._disable(given, modules, forwards)

    def start(self) -> None:
        """Make the next step a full one."""
        self.helper.start_timestep = None
        self.helper.cached_output = {}

    def at_gate(self) -> None:
        """Every layer has to run."""
        self.start()

    def halve(self, kept: int) -> None:
        """Start afresh."""
        self.start()

    def double(self) -> None:
        """Start afresh."""
        self.start()

    def _disable(self, given: dict[str, Any], modules: list[torch.nn.Module], forwards: dict[Any, Any]) -> None:
        """Disable the helper; `disable()` leaves a `forward` on every module that it has touched."""
        self.helper.disable()
        for module in modules:
            module.__dict__.pop("forward", None)
            if module in forwards:
                module.__dict__["forward"] = forwards[module]
        vars(self.helper).clear()
        vars(self.helper).update(given)
