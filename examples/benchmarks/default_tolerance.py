"""
The default tolerance, from what the yardstick measured at several: which one saves most and is ahead of plain runs.

    for scale in 1 3 5 7; do
        python -m examples.benchmarks.yardstick --guidance-scale $scale --captions 8 --screen 4 --rival none \
            --tolerance 0.1 --tolerance 0.2 --tolerance 0.3 --output runs/grid-sd-$scale
    done
    python -m examples.benchmarks.default_tolerance runs/grid-sd-* --by guidance_scale --output runs/grid.csv
"""

import json
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

from examples.benchmarks.loading import one_of
from examples.benchmarks.tables import check_output, print_table, write_table

WHERE = ["model", "guidance_scale", "solver", "steps"]
# What is written of every run.
FIGURES = ["cost", "full", "half", "forecast", "psnr", "ahead of as many", "ahead of offered", "best offered", "right"]
HEADINGS = ["times fewer MACs", "to as many, dB", "ahead, dB", "ahead in", "of", "least, dB", "right lost, %"]


def read(folders: list[Path]) -> pd.DataFrame:
    """A row for each run of T-GATE in the folders of the yardstick."""
    frames = []
    for folder in folders:
        about, found = (json.loads((folder / name).read_text()) for name in ("settings.json", "results.json"))
        frame = pd.DataFrame(found["comparison"])
        frames.append(frame.assign(model=about["model"], guidance_scale=about["guidance_scale"]))
    found = pd.concat(frames, ignore_index=True)
    return found[found.method == "tgate"]


def by_setting(runs: pd.DataFrame) -> pd.DataFrame:
    """
    Means over all runs of a setting, and how many are ahead of the best plain run at their cost.

    Where even all the steps of a solver are behind it, no setting can be ahead: those runs are left out of the count.
    """
    lead = runs["ahead of offered"].astype(float)
    possible = lead > runs["ahead of as many"]
    parts = pd.DataFrame(
        {
            "setting": runs.setting,
            "times fewer MACs": runs.steps / runs.cost,
            "to as many, dB": runs["ahead of as many"],
            "ahead, dB": lead,
            "ahead in": (lead > 0) & possible,
            "of": possible,
            "least, dB": lead.where(possible),
            "right lost, %": 100 * (runs["right, as many"] - runs.right),
        }
    )
    how = dict.fromkeys(HEADINGS, "mean") | {"ahead in": "sum", "of": "sum", "least, dB": "min"}
    return parts.groupby("setting").agg(how).reset_index()


def chosen(settings: pd.DataFrame) -> str | None:
    """The greatest saving of those that are ahead wherever a run can be."""
    ahead = settings[settings["ahead in"] == settings["of"]]
    return None if ahead.empty else str(ahead.loc[ahead["times fewer MACs"].idxmax()].setting)


def printed(row: pd.Series) -> list[str]:
    """The cells of a line."""
    return [f"{row[name]:.0f}" if name in ("ahead in", "of") else f"{row[name]:.2f}" for name in HEADINGS]


def main(
    folders: Annotated[list[Path], typer.Argument(exists=True, file_okay=False, help="What the yardstick wrote.")],
    by: Annotated[str, typer.Option(help=f"What the lines are for; {', '.join(WHERE)}.")] = "model",
    solver: Annotated[list[str] | None, typer.Option(help="Of the runs that count; all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Every run, as CSV or Markdown.")] = None,
) -> None:
    """Print what each tolerance does, for each testbed and for all, and the one to choose."""
    check_output(output)
    one_of("by", [by], WHERE)
    runs, console = read(folders), Console()
    counted = runs[runs.solver.isin(one_of("solver", solver or [*runs.solver], set(runs.solver)))]
    lines = []
    for name, part in [*counted.groupby(by), ("all", counted)]:
        lines += [[f"{name} {row.setting}", *printed(row)] for _, row in by_setting(part).iterrows()]
    print_table(console, "Tolerances", ["", *HEADINGS], lines)
    console.print(f"Ahead wherever a run can be, with the greatest saving: {chosen(by_setting(counted)) or 'none'}")
    if output is not None:
        rows = runs[["setting", *WHERE, *FIGURES]].sort_values([*WHERE, "setting"])
        cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows.to_numpy()]
        write_table(output, list(rows.columns), cells)


if __name__ == "__main__":
    typer.run(main)
