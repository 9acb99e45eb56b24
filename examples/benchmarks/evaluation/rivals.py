"""Other ways to leave out halves of steps or whole ones, each in the place of the denoiser's forward."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .cutoff import half_of
from .drawing import denoiser_of

# Steps that are computed before an output is reused or forecast.
LEAD = 3


class Rival:
    """One call of a pipeline. It counts as `TGateReport` does."""

    def __init__(self, forward: Callable[..., Any], steps: int, setting: float):
        self.forward, self.steps, self.setting = forward, steps, setting
        self.step = 0
        self.full_batch_forwards = self.half_batch_forwards = self.forecast_forwards = 0

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        output = self.output(args, kwargs)
        self.step += 1
        return (output,)

    def output(self, args: Any, kwargs: Any) -> torch.Tensor:
        """Both halves of the output."""
        raise NotImplementedError

    def both_halves(self, args: Any, kwargs: Any) -> torch.Tensor:
        """A full step."""
        self.full_batch_forwards += 1
        return self.forward(*args, **kwargs)[0]

    def conditional_half(self, args: Any, kwargs: Any) -> torch.Tensor:
        """A half step."""
        self.half_batch_forwards += 1
        whole = len(args[0])
        return self.forward(*half_of(args, whole), **half_of(kwargs, whole))[0]

    def may_leave_out(self) -> bool:
        """Whether the step is neither one of the first nor the last."""
        return LEAD <= self.step < self.steps - 1


class Held(Rival):
    """From a share of the steps on, the difference of the halves is the last one that was computed."""

    def output(self, args: Any, kwargs: Any) -> torch.Tensor:
        """Both halves of the output."""
        if self.step < max(1, round(self.setting * self.steps)):
            found = self.both_halves(args, kwargs)
            negative, positive = found.chunk(2)
            self.difference = positive - negative
            return found
        positive = self.conditional_half(args, kwargs)
        return torch.cat([positive - self.difference, positive])


class Alternate(Rival):
    """Only every so many steps are guided."""

    def output(self, args: Any, kwargs: Any) -> torch.Tensor:
        """Both halves of the output."""
        if self.step % int(self.setting) == 0:
            return self.both_halves(args, kwargs)
        positive = self.conditional_half(args, kwargs)
        return torch.cat([positive, positive])


class Reuse(Rival):
    """
    As EasyCache: the last output, while its change stays below a threshold.

    The change is that of the input, times what the output changed by for that of the input when both were computed,
    relative to the output, and summed up over the steps left out.
    """

    def output(self, args: Any, kwargs: Any) -> torch.Tensor:
        """Both halves of the output."""
        given = args[0]
        if self.may_leave_out():
            self.change += self.rate * (given - self.given).norm() / self.last.norm()
            if self.change < self.setting:
                self.forecast_forwards += 1
                self.given = given
                return self.last
        found = self.both_halves(args, kwargs)
        if self.step:
            self.rate = (found - self.last).norm() / (given - self.computed).norm()
        self.last, self.computed, self.given, self.change = found, given, given, 0.0
        return found


class Interval(Rival):
    """One step of so many is computed, the others are extrapolated linearly from the last two computed ones."""

    def output(self, args: Any, kwargs: Any) -> torch.Tensor:
        """Both halves of the output."""
        if self.may_leave_out() and self.step % int(self.setting):
            self.forecast_forwards += 1
            (before, older), (at, newer) = self.past
            return newer + (self.step - at) / (at - before) * (newer - older)
        found = self.both_halves(args, kwargs)
        self.past = [*(self.past[-1:] if self.step else []), (self.step, found)]
        return found


# With their settings: a share of the steps, an interval, a threshold, an interval.
RIVALS: dict[str, tuple[type[Rival], tuple[float, ...]]] = {
    "held": (Held, (0.2, 0.4)),
    "alternate": (Alternate, (2,)),
    "reuse": (Reuse, (0.1, 0.2, 0.4)),
    "interval": (Interval, (2, 3)),
}
NEED_GUIDANCE = ("held", "alternate")
# What these leave out is the same for every picture, so that they may be drawn in batches of any size.
FIXED = ("held", "alternate", "interval")


@contextlib.contextmanager
def in_place_of_forward(pipe: Any, name: str, setting: float, steps: int) -> Iterator[Rival]:
    """A rival at work in one call."""
    denoiser = denoiser_of(pipe)
    rival = RIVALS[name][0](denoiser.forward, steps, setting)
    denoiser.forward = rival
    try:
        yield rival
    finally:
        del denoiser.forward
