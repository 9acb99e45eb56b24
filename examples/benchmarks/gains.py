"""
What there is to gain on large models, without weights: how much of a run is cross-attention, and what T-GATE holds.

    python -m examples.benchmarks.gains
    python -m examples.benchmarks.gains --model Sana --output gains.md
"""

import json
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from rich.console import Console
from rich.progress import track

from examples.benchmarks.tables import check_output, print_table, write_table
from tgate_processors import TGateCost, TGateSchedule, estimate_cost

ROWS = json.loads(Path(__file__).with_suffix(".json").read_text())
# What of cross-attention is kept within so much.
BUDGET = "2GB"
HEADINGS = [
    "",
    "steps",
    "cross-attention, %",
    "guidance alone",
    "with it",
    "GiB held",
    BUDGET,
    "layers",
    "auto, at most",
]


def estimates(row: dict[str, Any], gate: float) -> tuple[TGateCost, TGateCost, TGateCost, TGateCost]:
    """A gate for guidance alone, for cross-attention too, within a budget, and the fewest full steps of the default."""
    with torch.device("meta"):
        denoiser = getattr(diffusers, row["class"])(**row["config"])

    def cost(schedule: TGateSchedule, **choice: Any) -> TGateCost:
        given = {"dtype": torch.bfloat16, **choice, **row["size"]}
        return estimate_cost(denoiser, schedule, row["steps"], **given)

    fixed = TGateSchedule(gate)
    within = cost(fixed, max_memory=BUDGET)
    return cost(fixed, cross_attention=False), cost(fixed, cross_attention=True), within, cost(TGateSchedule())


def line(row: dict[str, Any], gate: float) -> list[str]:
    """The figures of a model; attention's own products are counted."""
    alone, both, within, auto = estimates(row, gate)
    share = 1 - both.without_cross_attention.total / both.full.total
    bounds = [f"{cost.without_tgate.total / cost.with_tgate.total:.3f}" for cost in (alone, both, within, auto)]
    held = both.report.peak_bytes / 2**30
    layers = f"{within.report.kept_layers} of {within.report.cross_attention_layers}"
    return [
        row["model"],
        str(row["steps"]),
        f"{100 * share:.1f}",
        *bounds[:2],
        f"{held:.2f}",
        bounds[2],
        layers,
        bounds[3],
    ]


def main(
    model: Annotated[str, typer.Option(help="Only models with this in their name.")] = "",
    gate: Annotated[float, typer.Option(help="The gate, as a share of the steps.")] = 0.4,
    output: Annotated[Path | None, typer.Option(help="A file for the table, .csv or .md.")] = None,
) -> None:
    """Print how many times fewer MACs a run takes."""
    check_output(output)
    rows = [row for row in ROWS if model in row["model"]]
    if not rows:
        raise typer.BadParameter(f"model={model!r} is in none of: {'; '.join(row['model'] for row in ROWS)}.")
    console = Console()
    lines = [line(row, gate) for row in track(rows, "Models", console=console, transient=True)]
    print_table(console, f"Times fewer MACs, gate at {gate:g} of the steps", HEADINGS, lines)
    if output is not None:
        write_table(output, HEADINGS, lines)


if __name__ == "__main__":
    typer.run(main)
