"""The best plain run at a cost, and how far other runs are from it. Rows are runs, figures means over the captions."""

from typing import Any

import numpy as np
import pandas as pd

NAMES = ["solver", "spacing", "kind", "steps", "method", "setting"]
FIGURES = ["cost", "full", "half", "forecast", "psnr", "right"]
KINDS = ("offered", "by hand")


def table(cells: list[dict[str, Any]]) -> pd.DataFrame:
    """A row for each cell that was drawn."""
    drawn = [cell for cell in cells if "error" not in cell]
    rows = [[cell[name] for name in NAMES] + [float(np.mean(cell[name])) for name in FIGURES] for cell in drawn]
    found = pd.DataFrame(rows, columns=NAMES + FIGURES)
    return found.assign(run=found.solver + " " + found.spacing)


def contenders(plain: pd.DataFrame, number: int) -> pd.DataFrame:
    """The best so many plain runs for each kind of spacing and number of steps."""
    return plain.sort_values("psnr", ascending=False, kind="stable").groupby(["kind", "steps"]).head(number)


def front(plain: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The best plain runs with one kind of spacing, by rising cost; what costs more and is no better is left out."""
    best = contenders(plain[plain.kind == kind], 1).sort_values("cost")
    return best[best.psnr > best.psnr.cummax().shift(fill_value=-np.inf)]


def at_cost(best: pd.DataFrame, cost: float, most: float) -> tuple[float, str]:
    """
    Decibels of a front at a cost, between two of its runs, and the nearer one.

    There are none below the cheapest run, nor above `most`, beyond which no plain run was drawn.
    """
    if best.empty or not best.cost.min() <= cost <= most:
        return float("nan"), ""
    nearest = best.iloc[(best.cost - cost).abs().argmin()]
    return float(np.interp(cost, best.cost, best.psnr)), f"{nearest.run} {nearest.steps}"


def compare(rows: pd.DataFrame, plain: pd.DataFrame) -> pd.DataFrame:
    """Beside each run the best plain ones at its cost, and the plain one with its solver, spacing and steps."""
    found = rows.copy()
    for kind in KINDS:
        best = front(plain, kind)
        beside = [at_cost(best, cost, plain.cost.max()) for cost in rows.cost]
        found[f"best {kind}"] = [name for _, name in beside]
        found[f"ahead of {kind}"] = rows.psnr - [value for value, _ in beside]
    same = plain.set_index(["run", "steps"]).reindex(pd.MultiIndex.from_frame(rows[["run", "steps"]]))
    found["ahead of as many"] = rows.psnr - same.psnr.to_numpy()
    found["right, as many"] = same.right.to_numpy()
    return found


def summary(compared: pd.DataFrame) -> pd.DataFrame:
    """A row for each spacing, method and setting: means over its runs, and the worst of them."""
    columns = {"saving": compared.steps / compared.cost, "loss": compared["right, as many"] - compared.right}
    distances = {
        f"{against}, {what}": (f"ahead of {against}", how)
        for against in (*KINDS, "as many")
        for what, how in (("mean", "mean"), ("least", "min"))
    }
    groups = compared.assign(**columns).groupby(["spacing", "method", "setting"], sort=False)
    figures = {
        "runs": ("cost", "size"),
        "times fewer": ("saving", "mean"),
        **distances,
        "right lost, most": ("loss", "max"),
    }
    return groups.agg(**figures).reset_index()


def refused(cells: list[dict[str, Any]]) -> dict[str, str]:
    """Solvers with spacings that no run was possible with, and why."""
    drawn = {(cell["solver"], cell["spacing"]) for cell in cells if "error" not in cell}
    failed = [cell for cell in cells if "error" in cell and (cell["solver"], cell["spacing"]) not in drawn]
    return {f"{cell['solver']} {cell['spacing']}": cell["error"] for cell in failed}
