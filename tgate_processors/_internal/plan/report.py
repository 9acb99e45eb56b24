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
    What T-GATE did in the last call of a pipeline, as counted by the gated attention layers.

    Counts are denoiser forwards: one per step, two per step with Heun or KDPM2. A forward in which some layers computed
    and others reused counts as both. Layers inside compiled code cannot report; for them the plan is counted. If
    guidance is two calls of the denoiser (Wan), both count as one forward, and as one at half the batch if the second
    call is skipped.

    Args:
        num_inference_steps (`int`):
            Number of steps, also if the run was interrupted; with several loops (FreeInit), their sum. 0 before the
            first run.
        gate_step (`int`): First step of the fidelity-improving phase.
        cross_attention_computed (`int`): Forwards in which gated layers computed cross-attention.
        cross_attention_reused (`int`): Forwards in which gated layers reused their stored cross-attention.
        self_attention_computed (`int`): Forwards in which gated layers computed self-attention.
        self_attention_reused (`int`): Forwards in which gated layers reused their stored self-attention.
        full_batch_forwards (`int`): Forwards at the batch that the pipeline asked for.
        half_batch_forwards (`int`): Forwards at half that batch, with guidance dropped or predicted.
        forecast_forwards (`int`): Forwards that were skipped, with their output forecast.
        levels (`str`):
            The level of each step: `"F"` full, `"H"` half of the batch, `"-"` forecast. It is a plan that
            [`apply_tgate`] takes.
        full_steps (`tuple` of `int`): The steps that ran on the whole batch.
        prediction_errors (`tuple` of `tuple`):
            With `gate_step="auto"`, `(step, error)` for every full step whose guidance could have been predicted: the
            relative error that the prediction would have caused in the guided output, for the worst sample.
        forecast_errors (`tuple` of `tuple`):
            The same for every computed step whose output could have been forecast.
        peak_bytes (`int`): Maximum bytes stored at the end of a step, in outputs and differences of guidance.
        kept_layers (`int`): Number of layers with stored cross-attention, at the end of the step with the most.
        cross_attention_layers (`int`):
            Number of cross-attention layers; with `max_memory` some may not be stored. 0 if there are none.
        cross_attention_bytes (`int`):
            If only guidance is gated, the bytes that `cross_attention=True` would store. 0 otherwise, with joint
            attention or a guider, and for layers inside compiled code. [`estimate_cost`] shows what it would save.
        ranks (`int`):
            Number of processes that share the denoiser, and so agreed on errors and on the layers within `max_memory`.
            1 if the process decided for itself.
        tolerance (`float`, *optional*): The accepted error, with `gate_step="auto"`.
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
            `matplotlib.figure.Figure`: The figure. Notebooks show it; `.savefig(path)` writes it.
        """
        return figure_of(self)
