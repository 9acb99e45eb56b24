"""What T-GATE did in a call of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .report_views import figure_of, html_of, text_of

if TYPE_CHECKING:
    import matplotlib.figure


@dataclass(frozen=True)
class TGateReport:
    r"""
    What T-GATE did in the last call of a pipeline, counted by what the gated attention layers really did.

    Counts are denoiser forwards: one per step, two per step with Heun or KDPM2. Where some layers computed and others
    reused in one forward, the forward counts as both. Layers inside compiled code do not report; their forwards count
    as what they were told to do. Where guidance is two calls of the denoiser (Wan), the two count as one
    forward, at half the batch if the second one is left out.

    Args:
        num_inference_steps (`int`):
            Steps of the run, interrupted or not. Where a call runs several loops (FreeInit), those of all of them.
            0 before the first run.
        gate_step (`int`): First step of the fidelity-improving phase.
        cross_attention_computed (`int`): Forwards in which gated layers computed cross-attention.
        cross_attention_reused (`int`): Forwards in which gated layers reused their stored cross-attention.
        self_attention_computed (`int`): Forwards in which gated layers computed self-attention.
        self_attention_reused (`int`): Forwards in which gated layers reused their stored self-attention.
        full_batch_forwards (`int`): Forwards at the batch that the pipeline asked for.
        half_batch_forwards (`int`): Forwards at half that batch, with guidance dropped or predicted.
        forecast_forwards (`int`): Forwards that were left out, and their output forecast.
        levels (`str`):
            How much of each step was computed: `"F"` all of it, `"H"` half of the batch, `"-"` nothing. A run with
            `levels` of its own does the same again.
        full_steps (`tuple` of `int`): The steps that ran on the whole batch that the pipeline gave.
        prediction_errors (`tuple` of `tuple`):
            With `gate_step="auto"`, `(step, error)` for every full step whose guidance had been predicted too: how far
            off the guided output would have been, relative to that output, for the worst sample of the batch.
        forecast_errors (`tuple` of `tuple`):
            The same for every computed step of which a forecast would have been possible, and its output.
        peak_bytes (`int`): Most bytes held in stored outputs and differences of guidance at the end of a step.
        kept_layers (`int`): Layers that kept their cross-attention, at the end of the step in which most did.
        cross_attention_layers (`int`): Layers that could have; `max_memory` may leave some out. 0 without any to keep.
        cross_attention_bytes (`int`):
            Where guidance alone is gated, the bytes that `cross_attention=True` would hold. 0 elsewhere, where
            attention is joint or guidance a guider, and for layers inside compiled code. [`estimate_cost`] tells what
            it would save.
        ranks (`int`): Processes that agreed on their errors, and on the layers that `max_memory` leaves out, because
            they share the denoiser. 1 if each decided for itself.
        tolerance (`float`, *optional*): The error that was accepted, with `gate_step="auto"`.
    """

    num_inference_steps: int = 0
    gate_step: int = 0
    cross_attention_computed: int = 0
    cross_attention_reused: int = 0
    self_attention_computed: int = 0
    self_attention_reused: int = 0
    full_batch_forwards: int = 0
    half_batch_forwards: int = 0
    forecast_forwards: int = 0
    levels: str = ""
    full_steps: tuple[int, ...] = ()
    prediction_errors: tuple[tuple[int, float], ...] = ()
    forecast_errors: tuple[tuple[int, float], ...] = ()
    peak_bytes: int = 0
    kept_layers: int = 0
    cross_attention_layers: int = 0
    cross_attention_bytes: int = 0
    ranks: int = 1
    tolerance: float | None = None

    def __str__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        return html_of(self)

    def plot(self) -> matplotlib.figure.Figure:
        r"""
        Draw the level of each step as a bar, and the measured errors over the steps.

        Returns:
            `matplotlib.figure.Figure`: The figure; `.savefig(path)` writes it.
        """
        return figure_of(self)
