"""The ControlNet that runs before the denoiser in every step."""

from __future__ import annotations


class ControlNetBatch:
    """
    What the ControlNet ran on in this step: how many rows, and whether they are one half of guidance.

    Attributes:
        conditional_only (`bool`): Whether it sees the conditional half alone, whatever T-GATE does.
        halved (`bool`): Whether T-GATE has left one half out.
        announced (`bool`): Whether the run knows of the denoiser's forward already.
    """

    def __init__(self) -> None:
        self.conditional_only = False
        self.halved = False
        self.announced = False
        self._rows = 0

    def enter(self, rows: int) -> None:
        """The ControlNet is called."""
        self._rows = rows

    def see(self, residual_rows: int | None) -> None:
        """The denoiser, on its whole batch, is given what the ControlNet gave."""
        if residual_rows is not None:
            # In `guess_mode` it sees the conditional half, and the pipeline adds zeros for the other.
            self.conditional_only = 2 * self._rows == residual_rows
