"""FasterCache: it skips the unconditional half itself, inside the denoiser, and self-attention there."""

from __future__ import annotations

from typing import Any

from ..plan.schedule import TGateSchedule
from .diffusers_hooks import DiffusersHookAdapter


class FasterCacheAdapter(DiffusersHookAdapter):
    """
    Adapts the hook of the denoiser or of an attention layer, each with a state of its own.

    FasterCache owns guidance, so T-GATE leaves the batch whole and gates cross-attention alone.
    """

    owns_cfg = True
    computes_gate_step = True

    @classmethod
    def matches(cls, hook: Any) -> bool:
        """Whether a hook is of either kind."""
        state = getattr(hook, "state", None)
        names = set(vars(state) if state is not None else ())
        of_denoiser = {"iteration", "low_frequency_delta", "high_frequency_delta"}
        return names in (of_denoiser, {"iteration", "batch_size", "cache"})

    @classmethod
    def incompatibility(cls, schedule: TGateSchedule, *, gates_cross: bool, cfg_half: str | None) -> str | None:
        """Why T-GATE with these settings has no effect together with FasterCache, if it has none."""
        asked = 'gate_step="auto"' if schedule.is_auto else 'guidance="predict"' if schedule.predicts else None
        asked = asked or (f"cfg_half={cfg_half!r}" if cfg_half is not None else None)
        if not gates_cross:
            return "it leaves out half of the guidance itself, and nothing but guidance would be gated here"
        if asked is None:
            return None
        return (
            f"it leaves out half of the guidance itself, so {asked} has no effect. Give a number of steps and nothing "
            "else, apply_tgate(pipe, 10), to gate cross-attention alone"
        )

    def reset(self) -> None:
        """Release cached tensors."""
        self.hook.state.reset()
