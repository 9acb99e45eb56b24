"""Which settings suit a model: how its cross-attention and its guidance converge from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api import remove_tgate
from ..attention.layers import attention_modules
from ..attention.state import TGateState
from ..denoiser.batch import noise_prediction_of
from ..denoiser.inputs import read_inputs
from ..families import resolve_pipeline
from ..install.guiders import has_guider
from ..install.installation import Installation
from ..install.pipeline import install
from ..install.pipeline_check import validate_pipeline
from ..plan.schedule import TGateSchedule
from ..plan.validation import shown, validate_tolerance
from .calls import half_cost, read_calls, restored
from .probe import ConvergenceProbe

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas as pd


@dataclass(frozen=True)
class TGateConvergence:
    r"""
    The result of [`measure_convergence`].

    Args:
        steps (`pandas.DataFrame`):
            By step: `cross_attention`, the relative change of its outputs since the step before, averaged over the
            layers; `difference`, the same for the difference of the two halves of guidance; `error`, how far off the
            guided output would have been with a difference predicted from the two steps before. Means over the calls;
            empty where there is nothing to compare with, and without guidance.
        layers (`pandas.DataFrame`): By step, the change of each cross-attention layer, a column each.
        settings (`pandas.DataFrame`):
            By `tolerance`: the full steps and the forecast steps that `gate_step="auto"` would have had, the first step
            that is not full, and how many times fewer MACs the denoiser takes. Means over the calls.
    """

    steps: pd.DataFrame
    layers: pd.DataFrame
    settings: pd.DataFrame

    def to_csv(self, path: str | Path) -> None:
        r"""
        Write what was seen by step, a column for every layer too.

        Args:
            path (`str` or `Path`): The file.
        """
        self.steps.join(self.layers).to_csv(path)

    def plot(self) -> matplotlib.figure.Figure:
        r"""
        Draw the changes and the errors over the steps, as Figure 2 of the paper does for cross-attention.

        Returns:
            `matplotlib.figure.Figure`: The figure. Notebooks show it; `.savefig(path)` writes it.
        """
        from ..plan.notebook_figure import NotebookFigure

        figure = NotebookFigure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        axis.plot(self.layers, color="lightgrey", linewidth=0.7)
        for name, label in (
            ("cross_attention", "change of cross-attention (grey: each layer)"),
            ("difference", "change of the difference of guidance"),
            ("error", "error of predicted guidance"),
        ):
            axis.plot(self.steps[name], label=label, marker=".")
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_ylabel("relative to its size")
        axis.legend()
        return figure


def measure_convergence(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    call: Mapping[str, Any] | None = None,
    *,
    tolerances: Sequence[float] = (0.1, 0.2, 0.4, 0.6),
) -> TGateConvergence:
    r"""
    Draw some pictures and measure how cross-attention and guidance settle from step to step.

    Nothing is gated: the pictures are those of the pipeline without T-GATE. If T-GATE was applied, it is applied again
    afterwards, with the same settings. Only the last output of each layer is held. A compiled denoiser is compiled
    again, because its layers are watched by hooks.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        prompts (`list` of `str` or `dict`): What to draw, a call for each: a prompt, or the arguments of the call.
        call (`dict`, *optional*): Arguments that every call gets, such as `num_inference_steps`.
        tolerances (`list` of `float`, *optional*, defaults to `(0.1, 0.2, 0.4, 0.6)`):
            The values of `tolerance` to go through.

    Returns:
        `TGateConvergence`: Changes and errors by step, and what each tolerance would give.

    Raises:
        TypeError: If `pipe` is not a pipeline, or an argument is of the wrong kind (`prompts` as one string).
        ValueError: If the pipeline cannot be gated, there are no prompts, or a tolerance is out of range.
        ImportError: If pandas is missing (`pip install "tgate_processors[probe]"`).

    Example:

    ```py
    >>> from tgate_processors import measure_convergence

    >>> seen = measure_convergence(pipe, [prompt], {"num_inference_steps": 12})
    >>> speedups = seen.settings["speedup"]  # by tolerance
    >>> figure = seen.plot()
    ```

    Source: T-GATE (https://arxiv.org/abs/2404.02747), Section 3 and Figure 2, for cross-attention.
    """
    import pandas as pd

    validate_pipeline(pipe)
    calls = read_calls(prompts, call)
    if not isinstance(tolerances, Iterable):
        raise TypeError(
            f"tolerances={shown(tolerances)} is of type {type(tolerances).__name__}: pass a list of numbers."
        )
    schedules = [TGateSchedule("auto", tolerance=validate_tolerance(each, "tolerances")) for each in tolerances]
    if has_guider(pipe) or resolve_pipeline(pipe).family.layout.calls_per_step > 1:
        raise ValueError(
            f"the guidance of {type(pipe).__name__} is two calls of its denoiser, and the probe watches guidance in "
            'one batch: use gate_step="auto" there, whose report tells the errors.'
        )
    probe = ConvergenceProbe()
    with _probing(pipe, probe):
        for each in pipe.progress_bar(calls):
            pipe(**each)
            probe.on_call_end(schedules)
    steps = pd.DataFrame({name: probe.mean(name) for name in ("cross_attention", "difference", "error")})
    steps = steps.reindex(range(probe.steps)).rename_axis("step")
    layers = pd.DataFrame({name: probe.mean(name) for name in probe.layers}).reindex(range(probe.steps))
    half = half_cost(pipe, calls[0], probe.steps)
    columns = [probe.expect(schedule, half) for schedule in schedules]
    names = ("full_steps", "forecast_steps", "gate_step", "speedup")
    index = pd.Index([schedule.tolerance for schedule in schedules], name="tolerance")
    return TGateConvergence(steps, layers.rename_axis("step"), pd.DataFrame(columns, index=index, columns=list(names)))


@contextmanager
def _probing(pipe: Any, probe: ConvergenceProbe) -> Iterator[None]:
    """Probe the calls of a pipeline without gating anything, and restore it afterwards."""
    found = resolve_pipeline(pipe)
    # A gate that no run reaches. Guidance with a memory cannot be dropped, not even then.
    schedule = TGateSchedule(10**9, guidance="predict" if found.family.layout.has_momentum else None)
    state = TGateState(schedule, by_hand=False)
    state.warned.add("late")
    handles = []
    with restored(pipe):
        remove_tgate(pipe)
        try:
            # Processors of any kind can be gated here, since nothing is reused.
            install(pipe, Installation(state, custom_processors="gate"))
            denoiser, layout = found.denoiser, found.family.layout
            for name, layer in attention_modules(denoiser).items():
                if layout.is_cross_attention(name, layer):
                    probe.layers.append(name.removesuffix(".processor"))
                    handles.append(layer.register_forward_hook(_layer_hook(probe, probe.layers[-1], state)))
            handles.append(denoiser.register_forward_hook(_denoiser_hook(probe, state), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _layer_hook(probe: ConvergenceProbe, name: str, state: TGateState) -> Any:
    """Make a hook that passes the output of a layer to the probe."""

    def hook(module: Any, args: Any, output: Any) -> None:
        run = state.current()
        if run is not None:
            probe.on_layer_output(name, run, output)

    return hook


def _denoiser_hook(probe: ConvergenceProbe, state: TGateState) -> Any:
    """Make a hook that passes the output of the denoiser to the probe."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        run = state.current()
        if run is not None and run.guided:
            probe.on_guided_output(
                noise_prediction_of(output, read_inputs(module, args, kwargs).sample_shape).detach(), run
            )

    return hook
