"""Running a `DeepCacheSDHelper` in T-GATE's order; the helper itself stays as the user made it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..plan.validation import unlike
from .adapter import CacheAdapter
from .split import split_halves


def validate_helper(helper: Any, pipe: Any) -> None:
    """Validate `deepcache`: a helper of this pipeline, with its parameters set."""
    if isinstance(helper, type) or not all(
        callable(getattr(helper, name, None)) for name in ("enable", "disable", "set_params")
    ):
        raise TypeError(
            unlike("deepcache", "a DeepCacheSDHelper(pipe) from `pip install DeepCache`", helper, of_type=True)
        )
    if getattr(helper, "pipe", None) is not pipe:
        raise ValueError(
            f"deepcache={helper!r} is the helper of another pipeline: pass a DeepCacheSDHelper made with this "
            f"{type(pipe).__name__}."
        )
    if not hasattr(helper, "params"):
        raise ValueError(
            f"deepcache={helper!r} has no parameters: call its set_params(cache_interval=3, cache_branch_id=0) first."
        )
    if getattr(pipe, "unet", None) is None:
        raise ValueError(
            f"{type(pipe).__name__} has no UNet, and DeepCache supports nothing else: leave out `deepcache`."
        )


class DeepCacheAdapter(CacheAdapter):
    """
    Adapts a DeepCache helper.

    Its cached tensors have the batch of the step that made them. Where guidance is dropped, the helper is reset where
    the batch changes, and in the gate step too, in which every layer is computed: that is the published order. Where
    guidance is predicted, the batch changes often, so what is cached is halved with it. A helper that is not enabled is
    enabled for the call only.

    Args:
        helper (`DeepCacheSDHelper`): The user's helper.
        halves_cache (`bool`, *optional*, defaults to `False`): Whether what is cached is halved with the batch.
    """

    def __init__(self, helper: Any, *, halves_cache: bool = False) -> None:
        self.helper = helper
        self.computes_gate_step = not halves_cache
        self._before_call: _HelperBeforeCall | None = None

    def begin_call(self) -> None:
        """Enable the helper, or reset it if it is enabled."""
        if getattr(self.helper, "function_dict", None):
            self.reset()
            return
        modules = list(self.helper.pipe.unet.modules())
        forwards = {module: module.__dict__["forward"] for module in modules if "forward" in module.__dict__}
        self._before_call = _HelperBeforeCall(dict(vars(self.helper)), modules, forwards)
        self.helper.enable()

    def end_call(self) -> None:
        """Restore the helper as it was before the call."""
        if self._before_call is None:
            self.reset()
        else:
            self._disable(self._before_call)
            self._before_call = None

    def reset(self) -> None:
        """Make the next step a full one."""
        self.helper.start_timestep = None
        self.helper.cached_output = {}

    def on_gate_step(self) -> None:
        """Reset the helper where every layer has to run."""
        if self.computes_gate_step:
            self.reset()

    def on_half_batch(self, active_half: int) -> None:
        """Reset the helper, or leave the active half in its cache."""
        if self.computes_gate_step:
            self.reset()
        else:
            self.helper.cached_output, _ = split_halves(self.helper.cached_output, active_half)

    def on_full_batch(self) -> None:
        """Reset the helper."""
        self.reset()

    def will_hit(self) -> bool:
        """Whether the next forward skips the inner blocks."""
        helper = self.helper
        if self.computes_gate_step or not helper.cached_output:
            return False
        helper.cur_timestep += 1
        skips = helper.is_skip_step(0, 0, "mid")
        helper.cur_timestep -= 1
        return bool(skips)

    def was_hit(self) -> bool:
        """Whether the last forward skipped the inner blocks."""
        return not self.computes_gate_step and bool(self.helper.is_skip_step(0, 0, "mid"))

    def _disable(self, before: _HelperBeforeCall) -> None:
        """Disable the helper; its own `disable()` leaves a `forward` on every module that it has touched."""
        for module in before.modules:
            module.__dict__.pop("forward", None)
            if module in before.forwards:
                module.__dict__["forward"] = before.forwards[module]
        for name in [name for name in vars(self.helper) if name not in before.attributes]:
            delattr(self.helper, name)
        vars(self.helper).update(before.attributes)


class _HelperBeforeCall(NamedTuple):
    """A helper that is not enabled, and the modules of its denoiser, before a call."""

    attributes: dict[str, Any]
    modules: list[torch.nn.Module]
    forwards: dict[torch.nn.Module, Any]
