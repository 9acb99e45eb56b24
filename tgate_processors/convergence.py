"""Which settings suit a model: how its cross-attention and its guidance settle from step to step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .callback import StepClock
from .cost import estimate_cost
from .families import find_family
from .halving import sample_of
from .installation import Installation
from .layers import attention_modules
from .layout import see
from .pace import Pace
from .patch import check_pipeline, remove_tgate
from .pipeline import install, installed
from .prediction import Difference, guided_output, predict, relative_error
from .run import Run
from .schedule import TGateSchedule

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas as pd


@dataclass(frozen=True)
class TGateConvergence:
    r"""
    What [`measure_convergence`] has seen.

    Args:
        steps (`pandas.DataFrame`):
            By step: `cross_attention`, the change of its outputs against the step before, relative to them, the mean of
            all layers; `difference`, that of the difference of the two halves of guidance; `error`, how far the guided
            output would have been off with a difference predicted from the two steps before. Means over the calls;
            empty where there is nothing to compare with, and without guidance.
        layers (`pandas.DataFrame`): By step, the change of each cross-attention layer, a column each.
        settings (`pandas.DataFrame`):
            By `tolerance`: the steps that `gate_step="auto"` would have made full, the first half step, and how many
            times fewer MACs of the denoiser that takes. Means over the calls.
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
            `matplotlib.figure.Figure`: The figure; `.savefig(path)` writes it.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
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
    tolerances: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
) -> TGateConvergence:
    r"""
    Draw some pictures as ever, and tell how cross-attention and guidance settle from step to step.

    Nothing is gated: the pictures are those of the pipeline without T-GATE. What was applied to it is applied again
    afterwards. Of the layers only the last output is held. A compiled denoiser is compiled anew, because its layers are
    watched by hooks.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        prompts (`list` of `str` or `dict`): What to draw, a call for each: a prompt, or the arguments of the call.
        call (`dict`, *optional*): Arguments that every call gets, such as `num_inference_steps`.
        tolerances (`list` of `float`, *optional*, defaults to `(0.05, 0.1, 0.2, 0.4)`):
            Values of `tolerance` to tell the settings of.

    Returns:
        `TGateConvergence`: Changes and errors by step, and what each tolerance would give.

    Raises:
        TypeError: If `pipe` is not a pipeline, or `prompts` is one string.
        ValueError: If the pipeline cannot be gated, or there are no prompts.
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

    check_pipeline(pipe)
    if isinstance(prompts, (str, Mapping)):
        raise TypeError(f"prompts={prompts!r} is a {type(prompts).__name__}: give a list, with a prompt for each call.")
    calls = [{"prompt": each} if isinstance(each, str) else dict(each) for each in prompts]
    if not calls:
        raise ValueError(f"prompts={prompts!r} is empty: give some prompts, with a call for each.")
    schedules = [TGateSchedule("auto", tolerance=tolerance) for tolerance in tolerances]
    probe = _Probe()
    with _watched(pipe, probe):
        for each in pipe.progress_bar(calls):
            pipe(**{**(call or {}), **each})
            probe.end_call(schedules)
    steps = pd.DataFrame({name: probe.mean(name) for name in ("cross_attention", "difference", "error")})
    steps = steps.reindex(range(probe.steps)).rename_axis("step")
    layers = pd.DataFrame({name: probe.mean(name) for name in probe.layers}).reindex(range(probe.steps))
    half = _half_share(pipe, {**(call or {}), **calls[0]}, probe.steps)
    columns = [probe.setting(schedule, half) for schedule in schedules]
    names = ("full_steps", "gate_step", "speedup")
    index = pd.Index([schedule.tolerance for schedule in schedules], name="tolerance")
    return TGateConvergence(steps, layers.rename_axis("step"), pd.DataFrame(columns, index=index, columns=list(names)))


class _Probe:
    """What is seen: sums by what changes and by step, and the differences of one call."""

    def __init__(self) -> None:
        self.steps = 0
        self.layers: list[str] = []
        # Step and pass of the forward that runs: PixArt's has ended when its hooks come.
        self._now = (0, 0)
        self._changes: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._before: dict[str, torch.Tensor] = {}
        # The passes of every loop of a call.
        self._loops: list[list[_Pass]] = [[]]
        self._plans: dict[float | None, list[tuple[int, int]]] = defaultdict(list)

    def mean(self, name: str) -> dict[int, float]:
        """Mean change by step."""
        return {step: sum(values) / len(values) for step, values in sorted(self._changes[name].items())}

    def layer(self, name: str, run: Run, output: torch.Tensor) -> None:
        """A layer with cross-attention has given its output."""
        step = run.step_index
        if run.passes < self._now[1]:
            # Another loop of the call begins (FreeInit).
            self._before.clear()
            self._loops.append([])
        self._now = (step, run.passes)
        self.steps = max(self.steps, step + 1)
        before = self._before.get(name)
        if before is not None and before.shape == output.shape:
            change = _change(before, output)
            self._changes[name][step].append(change)
            self._changes["cross_attention"][step].append(change)
        self._before[name] = output.detach().clone()

    def both_halves(self, prediction: torch.Tensor, run: Run) -> None:
        """The denoiser has given both halves of guidance."""
        (step, number), halves = self._now, prediction.chunk(2)
        difference = Difference(number, halves[1] - halves[0])
        scale = run.call.scale()
        now = _Pass(step, difference, guided_output(halves, 0 if run.batch.unconditional_first else 1, scale), scale)
        passes = self._loops[-1]
        if passes and passes[-1].difference.position == number:
            # What runs before the loop is counted to its first pass.
            passes.pop()
        if passes and passes[-1].difference.value.shape != difference.value.shape:
            # As another loop: the run begins anew there.
            self._loops.append(passes := [])
        if passes:
            self._changes["difference"][step].append(_change(passes[-1].difference.value, difference.value))
        if len(passes) > 1:
            self._changes["error"][step].append(now.error([each.difference for each in passes[-2:]]))
        passes.append(now)

    def end_call(self, schedules: Sequence[TGateSchedule]) -> None:
        """A call has ended: see what each tolerance would have given, and let go of what it held."""
        for schedule in schedules:
            halves = [step for passes in self._loops for step in self._half_steps(schedule, passes)]
            plan = self.steps - len(halves), min(halves, default=self.steps)
            self._plans[schedule.tolerance].append(plan)
        self._loops = [[]]
        self._before.clear()
        self._now = (0, 0)

    def setting(self, schedule: TGateSchedule, half: float) -> tuple[float, float, float]:
        """Full steps, the first half step, and the speed-up, the means of all calls."""
        plans = self._plans[schedule.tolerance]
        full, gate = (sum(values) / len(plans) for values in zip(*plans, strict=True))
        return full, gate, self.steps / (full + (self.steps - full) * half)

    @staticmethod
    def _half_steps(schedule: TGateSchedule, passes: Sequence[_Pass]) -> list[int]:
        """The steps of a loop that would have been half ones."""
        assert schedule.tolerance is not None
        pace, halves = Pace(schedule.tolerance), []
        known: list[Difference] = []
        for step in sorted({each.step for each in passes}):
            if not pace.full:
                halves.append(step)
                pace.end_half_step()
                continue
            errors = []
            for each in (each for each in passes if each.step == step):
                if len(known) > 1:
                    errors.append(each.error(known))
                known = [*known[-1:], each.difference]
            pace.end_full_step(max(errors, default=None))
        return halves


@dataclass(frozen=True)
class _Pass:
    """A forward with both halves of guidance."""

    step: int
    difference: Difference
    guided: torch.Tensor
    scale: Any

    def error(self, known: Sequence[Difference]) -> float:
        """How far a prediction would have been off, for the worst picture of the batch."""
        predicted = predict(known, self.difference.position)
        return float(relative_error(predicted, self.difference.value, self.guided, self.scale).max())


def _change(before: torch.Tensor, now: torch.Tensor) -> float:
    """How far two tensors are apart, relative to the later one; the mean of the samples."""
    apart = (now.float() - before.float()).flatten(1).norm(dim=1)
    return float((apart / now.float().flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)).mean())


@contextmanager
def _watched(pipe: Any, probe: _Probe) -> Iterator[None]:
    """Have T-GATE follow the calls of a pipeline without gating anything, and everything as it was afterwards."""
    before = installed(pipe)
    remove_tgate(pipe)
    # A gate that no run comes to.
    clock = StepClock(TGateSchedule(10**9))
    clock.state.said.add("late")
    handles = []
    try:
        # Processors of any kind compute as ever, for nothing is reused.
        install(pipe, Installation(clock, custom="gate"))
        denoiser = find_family(pipe).denoiser
        for name, layer in attention_modules(denoiser).items():
            if getattr(layer, "is_cross_attention", False):
                probe.layers.append(name.removesuffix(".processor"))
                handles.append(layer.register_forward_hook(_layer_hook(probe, probe.layers[-1], clock)))
        handles.append(denoiser.register_forward_hook(_denoiser_hook(probe, clock), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        remove_tgate(pipe)
        if before is not None:
            install(pipe, before)


def _layer_hook(probe: _Probe, name: str, clock: StepClock) -> Any:
    """Tell the probe what a layer gives out."""

    def hook(module: Any, args: Any, output: Any) -> None:
        run = clock.state.current()
        if run is not None:
            probe.layer(name, run, output)

    return hook


def _denoiser_hook(probe: _Probe, clock: StepClock) -> Any:
    """Tell the probe what the denoiser gives out."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        run = clock.state.current()
        if run is not None and run.guided:
            probe.both_halves(sample_of(output, see(module, args, kwargs).shape).detach(), run)

    return hook


def _half_share(pipe: Any, call: Mapping[str, Any], steps: int) -> float:
    """What a half step takes of the MACs of a full one."""
    size = {name: call[name] for name in ("height", "width", "max_sequence_length", "num_frames") if call.get(name)}
    try:
        cost = estimate_cost(pipe, TGateSchedule(1), steps, **size)
    except ValueError:
        # Adapters and the like: at least one half is left out.
        return 0.5
    return cost.without_cross_attention.total / (2 * cost.full.total)
