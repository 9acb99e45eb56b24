"""Forecast what a call of the denoiser would give, from what the last two have given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..denoiser.batch import map_tensors
from ..denoiser.inputs import iter_tensors
from ..plan.adaptive import MIN_HISTORY


class Output(NamedTuple):
    """
    A part of a denoiser's output, in one pass of the loop.

    Args:
        position (`int`): The pass.
        value (`torch.Tensor`): The part.
    """

    position: int
    value: torch.Tensor


def extrapolate(history: Sequence[Output], position: int) -> torch.Tensor:
    """
    Extrapolate linearly from the last two outputs of a history; a single one is held.

    Args:
        history (`Sequence` of `Output`): The last one or two, in order.
        position (`int`): The pass.

    Returns:
        `torch.Tensor`: The output, of the shape and type of those in the history.
    """
    last = history[-1]
    if len(history) == 1:
        return last.value
    before = history[-2]
    weight = (position - last.position) / (last.position - before.position)
    return torch.lerp(before.value.float(), last.value.float(), 1 + weight).to(last.value.dtype)


class OutputForecaster:
    """The last outputs of one of the calls of a step, and the forecast of the next one."""

    def __init__(self) -> None:
        # Of each computed call, the parts of its output.
        self._history: list[list[Output]] = []
        self._template: Any = None
        self._covers_template = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = sum(part.value.nbytes for parts in self._history for part in parts)
        return held + (0 if self._covers_template else sum(each.nbytes for each in iter_tensors(self._template)))

    @property
    def history(self) -> list[tuple[int, list[torch.Tensor]]]:
        """The passes in which an output was computed, and its parts."""
        return [(parts[0].position, [each.value for each in parts]) for parts in self._history]

    @history.setter
    def history(self, history: Sequence[tuple[int, Sequence[torch.Tensor]]]) -> None:
        """Go on from what another one has recorded."""
        self._history = [[Output(position, each) for each in parts] for position, parts in history]

    @property
    def has_history(self) -> bool:
        """Whether the next output that is computed has a forecast to be compared with."""
        return len(self._history) >= MIN_HISTORY

    @property
    def can_forecast(self) -> bool:
        """Whether anything is known to forecast from."""
        return bool(self._history)

    def forecast_parts(self, position: int) -> list[torch.Tensor]:
        """Forecast the parts of the output of a later pass."""
        return [extrapolate(known, position) for known in zip(*self._history, strict=True)]

    def record(self, position: int, parts: Sequence[torch.Tensor]) -> None:
        """Record the parts of an output that was computed."""
        shapes = [part.shape for part in parts]
        if self._history and [part.value.shape for part in self._history[-1]] != shapes:
            self._history.clear()
        if self._history and self._history[-1][0].position == position:
            # Calls before the loop count as part of its first pass.
            self._history.pop()
        # Copies: compiled code may give out one buffer again and again.
        self._history = [*self._history[1 - MIN_HISTORY :], [Output(position, part.clone()) for part in parts]]

    def record_template(self, output: Any, parts: Sequence[torch.Tensor]) -> None:
        """Record the form of an output, and what of it is no part of guidance (a variance)."""
        covered = sum(part.numel() for part in parts)
        self._covers_template = covered == sum(tensor.numel() for tensor in iter_tensors(output))
        self._template = map_tensors(output, _shape_of if self._covers_template else torch.clone)

    def make_output(self, fill: Callable[[Any], None]) -> Any:
        """Make an output of the recorded form; `fill` writes the parts into it."""
        output = map_tensors(self._template, _empty_like if self._covers_template else torch.clone)
        fill(output)
        return output


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape that takes the memory of one number."""
    return tensor.new_empty(()).expand(tensor.shape)


def _empty_like(shape: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape, to be filled."""
    return torch.empty(shape.shape, dtype=shape.dtype, device=shape.device)
