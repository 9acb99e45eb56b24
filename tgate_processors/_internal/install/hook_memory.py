"""What the hooks of a denoiser remember from one call of a module to the next, separately for each run."""

from __future__ import annotations

from typing import Any

from ..denoiser.inputs import DenoiserInputs
from ..plan.step_plan import CFGHalf


class HookMemory:
    """
    The step that runs, as its hooks remember it: what the ControlNet ran on, and the arguments that were sliced.

    Attributes:
        guess_mode (`bool`): Whether the ControlNet sees the conditional half alone, whatever T-GATE does.
        ran_on_half (`bool`): Whether T-GATE has sliced the ControlNet's batch.
        is_announced (`bool`): Whether the run knows of the denoiser's forward already.
        original (`OriginalArguments`, *optional*): The whole arguments of a forward that runs on half of them.
    """

    def __init__(self) -> None:
        self.guess_mode = False
        self.ran_on_half = False
        self.is_announced = False
        self.original: OriginalArguments | None = None
        self._rows = 0

    def before_controlnet(self, rows: int) -> None:
        """The ControlNet is called with so many samples."""
        self._rows = rows

    def read_residuals(self, rows: int | None) -> None:
        """The denoiser, on its whole batch, is given residuals of so many rows: find out whether it is `guess_mode`."""
        if rows is not None:
            # In `guess_mode` it sees the conditional half, and the pipeline adds zeros for the other.
            self.guess_mode = 2 * self._rows == rows


class OriginalArguments:
    """The whole arguments of a forward that runs on half of them."""

    def __init__(
        self,
        inputs: DenoiserInputs,
        active_half: CFGHalf,
        args: Any,
        kwargs: dict[str, Any],
        now_args: list[Any],
        now_kwargs: Any,
    ) -> None:
        self.inputs = inputs
        self.rows = inputs.batch_size // 2
        self.active_half = active_half
        self._args, self._kwargs = args, kwargs
        self._now_args, self._now_kwargs = now_args, now_kwargs

    def restore(self) -> None:
        """Restore the whole arguments for the user's forward hooks."""
        self._now_args[:] = self._args
        self._now_kwargs.update(self._kwargs)
