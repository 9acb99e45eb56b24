"""A forward that gives each process a part of the batch (CFG parallelism) is refused in the first guided step."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..attention.compiled import has_compiled_code
from ..attention.layers import attention_modules
from ..caches.forward_origin import owner_of


class SplitBatchCheck:
    """
    Counts the rows that attention layers are given, until a guided step has shown that they get the whole batch.

    Args:
        denoisers (`Sequence` of `torch.nn.Module`): Denoisers of a pipeline.
    """

    def __init__(self, denoisers: Sequence[torch.nn.Module]) -> None:
        self._denoisers = denoisers
        self._rows: Counter[torch.nn.Module] = Counter()
        self._handles: list[Any] = []
        self._thread = threading.get_ident()

    def open(self) -> None:
        """A call of the pipeline begins: hook the attention layers."""
        for denoiser in self._denoisers:
            for layer in attention_modules(denoiser).values():
                self._handles.append(layer.register_forward_pre_hook(self._count, with_kwargs=True))

    def close(self) -> None:
        """The inverse of `open`."""
        while self._handles:
            self._handles.pop().remove()

    def after_forward(self, denoiser: torch.nn.Module, rows: int) -> None:
        """
        A forward has ended.

        Args:
            denoiser (`torch.nn.Module`): The denoiser.
            rows (`int`): The rows of its batch if that is both halves of guidance, one of which may be left out, or 0.

        Raises:
            ValueError: If no attention layer has got as many.
        """
        found = max(self._rows.values(), default=rows)
        self._rows.clear()
        if not (rows and self._handles):
            return
        self.close()
        if found < rows:
            raise ValueError(
                f"T-GATE: {type(denoiser).__name__} got a batch of {rows}, both halves of guidance, and its attention "
                f"layers got {found}, where T-GATE expects {rows}: its forward gives each process a part of the batch "
                "(CFG parallelism), which leaves no half to skip. Give each process its own prompts instead, or skip "
                'whole steps only, by a plan without "H" such as apply_tgate(pipe, "FFF-F-FF"), or call '
                "remove_tgate(pipe) to use this pipeline."
            )

    def _count(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer is called."""
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if given is not None and threading.get_ident() == self._thread:
            self._rows[layer] += len(given)


def split_batch_check(denoisers: Sequence[torch.nn.Module]) -> SplitBatchCheck | None:
    """The check of those denoisers whose forward may split the batch, if there are any and several processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return None
    suspects = [denoiser for denoiser in denoisers if _has_custom_forward(denoiser) and not has_compiled_code(denoiser)]
    return SplitBatchCheck(suspects) if suspects else None


def _has_custom_forward(denoiser: torch.nn.Module) -> bool:
    """Whether the `forward` of a denoiser is not that of a class of diffusers."""
    return "forward" in vars(denoiser) or owner_of(type(denoiser)).__module__.split(".")[0] != "diffusers"
