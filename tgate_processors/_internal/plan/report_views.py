"""A report in lines, as a table and as a figure."""

from __future__ import annotations

from html import escape
from statistics import median
from typing import TYPE_CHECKING

from .step_plan import Level

if TYPE_CHECKING:
    import matplotlib.figure

    from .report import TGateReport

_LEVELS = {Level.FULL: ("full", "#2f5d8a"), Level.HALF: ("half", "#8fb8de"), Level.FORECAST: ("forecast", "#e9e4d8")}


def rows_of(report: TGateReport) -> dict[str, str]:
    """What is worth reading of a report, by what it is about."""
    rows = {
        "Plan": f"{report.num_inference_steps} steps, {report.levels}",
        "Denoiser": _forwards(report),
        "Errors": _errors(report),
        "Memory": _memory(report),
    }
    return {name: text for name, text in rows.items() if text}


def text_of(report: TGateReport) -> str:
    """A report in at most four lines."""
    if not report.num_inference_steps:
        return "T-GATE: no run yet."
    plan, *others = rows_of(report).items()
    return "\n".join([f"T-GATE: {plan[1]}", *(f"  {name.lower()}: {text}" for name, text in others)])


def html_of(report: TGateReport) -> str:
    """A report as a table, for notebooks."""
    if not report.num_inference_steps:
        return f"<p>{text_of(report)}</p>"
    cell = '<td style="text-align: left">'
    rows = (f"<tr>{cell}<b>{name}</b></td>{cell}{escape(text)}</td></tr>" for name, text in rows_of(report).items())
    return f"<table><caption>T-GATE</caption>{''.join(rows)}</table>"


def figure_of(report: TGateReport) -> matplotlib.figure.Figure:
    """The levels of a report as coloured bars, and its errors over the steps."""
    from .notebook_figure import NotebookFigure

    if not report.num_inference_steps:
        raise ValueError("the report must be of a run, got one without steps. Call the pipeline first.")
    figure = NotebookFigure(figsize=(7, 3.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(5, 1))
    for label, errors in (("forecast", report.forecast_errors), ("predicted guidance", report.prediction_errors)):
        if errors:
            above.plot(*zip(*errors, strict=True), label=f"error of {label}", marker=".")
    if report.tolerance is not None:
        above.axhline(report.tolerance, label=f"tolerance {report.tolerance:g}", color="black", linestyle="--")
    if above.get_legend_handles_labels()[0]:
        above.legend()
    above.set_ylabel("relative error")
    for level, (label, colour) in _LEVELS.items():
        steps = [step for step, letter in enumerate(report.levels) if letter == level.value]
        if steps:
            below.bar(steps, [1] * len(steps), width=1, color=colour, edgecolor="white", label=f"{len(steps)} {label}")
    below.set(xlabel="step", yticks=[])
    figure.legend(handles=below.get_legend_handles_labels()[0], loc="outside lower center", ncols=len(_LEVELS))
    return figure


def _forwards(report: TGateReport) -> str:
    """The forwards of each kind, and what they come to."""
    full, half, forecast = report.full_batch_forwards, report.half_batch_forwards, report.forecast_forwards
    forwards, cost = full + half + forecast, full + half / 2
    found = f"{full} full, {half} half and {forecast} forecast of {forwards} forwards"
    if report.cross_attention_reused > half:
        found += f", {report.cross_attention_reused} with reused cross-attention"
    return f"{found}, about {forwards / cost:.1f}x less work" if cost < forwards and cost else found


def _errors(report: TGateReport) -> str:
    """The errors of each kind: the usual one, and the largest, which is most often that of an early step."""
    kinds = (("forecasts", report.forecast_errors), ("guidance", report.prediction_errors))
    found = []
    for name, errors in kinds:
        if errors:
            step, largest = max(errors, key=lambda each: each[1])
            usual = median(error for _, error in errors)
            found.append(f"{name} median {usual:.2g}, largest {largest:.2g} (step {step})")
    if found and report.tolerance is not None:
        found.append(f"tolerance {report.tolerance:g}")
    return "; ".join(found)


def _memory(report: TGateReport) -> str:
    """What was held, and what was not."""
    found = f"{report.peak_bytes / 2**20:.1f} MiB stored at most"
    if report.kept_layers < report.cross_attention_layers:
        found += f", cross-attention of {report.kept_layers} of {report.cross_attention_layers} layers"
    if report.cross_attention_bytes:
        found += f"; cross_attention=True would store {report.cross_attention_bytes / 2**20:.1f} MiB more"
    return found
