"""
T-GATE and its rivals against the best plain run that costs as much, over solvers and spacings.

    python -m examples.benchmarks.yardstick --output runs/yardstick-sd
    python -m examples.benchmarks.yardstick --model examples/models/shapes-pixart --tolerance 0.2 --tolerance 0.4 \
        --output runs/yardstick-pixart
    python -m examples.benchmarks.yardstick --model examples/models/emoji-sd --captions 200 --guidance-scale 5 \
        --prompts examples/models/emoji-sd/captions.txt --output runs/yardstick-emoji
    python -m examples.benchmarks.yardstick --model examples/models/shapes-wan --prompts clips --rival none \
        --guidance-scale 5 --output runs/yardstick-wan

All are compared with the pictures of many steps of UniPC. What was drawn is kept in the folder: after an interruption
the same command goes on where it stopped, and one with other solvers, steps or settings adds to what is there. After a
change of the package remove `cells/*tgate*`.
"""

import itertools
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.progress import track

from examples.benchmarks.evaluation.cells import Bench, Cell
from examples.benchmarks.evaluation.front import KINDS, compare, contenders, front, refused, summary, table
from examples.benchmarks.evaluation.plots import over_cost
from examples.benchmarks.evaluation.prompts import read_captions
from examples.benchmarks.evaluation.rivals import FIXED, NEED_GUIDANCE, RIVALS
from examples.benchmarks.evaluation.solvers import SOLVERS, own_spacing, solvers_of, spacings_of
from examples.benchmarks.evaluation.store import claim, clear_parts, write_json
from examples.benchmarks.loading import MODELS, check_device, load_pipeline, one_of
from examples.benchmarks.tables import print_table, write_table
from examples.testbeds.shapes.evaluation import draws_videos

GATED_SOLVERS = ["dpm-2", "unipc", "ddim", "euler"]
GATED_STEPS = [8, 10, 13, 16, 20, 25, 32, 40]
PLAIN_STEPS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 22, 25, 28, 32, 40]
# The comparison in print: what names a row, and its figures.
ROW = ["run", "steps", "method", "setting"]
COLUMNS = ["cost", "full", "half", "forecast", "psnr", "ahead of as many"]
COLUMNS += [f"{part} {kind}" for kind in KINDS for part in ("ahead of", "best")] + ["right", "right, as many"]


def load_bench(model: str, device: str, captions: list[str], guidance_scale: float, seed: int, output: Path) -> Bench:
    """The testbed."""
    pipe = load_pipeline(model, check_device(device), "float32")
    return Bench(pipe, captions, guidance_scale, seed, output)


def plain_cells(config: Any, solvers: list[str], steps: list[int]) -> list[Cell]:
    """Every solver with every spacing that it takes."""
    return [Cell(name, place, number) for name in solvers for place in spacings_of(config, name) for number in steps]


def gated_cells(
    config: Any, solvers: list[str], spacings: list[str], steps: list[int], methods: list[tuple[str, str]]
) -> list[Cell]:
    """T-GATE and its rivals."""
    known = {name: spacings_of(config, name) for name in solvers}
    places = [(name, place) for name, place in itertools.product(solvers, spacings) if place in known[name]]
    return [Cell(*where, number, *how) for where, number, how in itertools.product(places, steps, methods)]


def measure_plain(
    bench: Bench, cells: list[Cell], needed: list[Cell], screen: int, number: int, batch_size: int
) -> tuple[pd.DataFrame, dict[str, str]]:
    """All plain runs, or those that few captions show to be the best and those that are needed; what is impossible."""
    everything = range(len(bench.captions))
    impossible = {}
    if screen < len(everything):
        few = everything[:: -(-len(everything) // screen)]
        seen = [bench.measure(cell, few, batch_size, "screen") for cell in track(cells, "Plain, few captions")]
        impossible = refused(seen)
        best = contenders(table(seen), number)[["solver", "spacing", "steps"]]
        cells = [Cell(*row) for row in best.itertuples(index=False)]
    cells = list(dict.fromkeys([*cells, *needed]))
    found = [bench.measure(cell, everything, batch_size) for cell in track(cells, "Plain")]
    return table(found), impossible | refused(found)


def named(frame: pd.DataFrame, parts: list[str]) -> pd.DataFrame:
    """The first column names the rows, in place of its parts."""
    row = frame[parts].astype(str).agg(" ".join, axis=1).str.strip()
    return pd.concat([row.rename("row"), frame.drop(columns=parts)], axis=1)


def printed(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and figures: shares in per cent, distances with their sign."""

    def cell(name: str, value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        if pd.isna(value):
            return ""
        if name.startswith("right"):
            return f"{100 * value:.1f}"
        return f"{value:+.2f}" if name.startswith(("ahead of", "as many", *KINDS)) else f"{value:.2f}"

    names = list(frame.columns)
    return names, [[cell(*each) for each in zip(names, row, strict=True)] for row in frame.itertuples(index=False)]


def report(plain: pd.DataFrame, rows: pd.DataFrame, impossible: dict[str, str], folder: Path, console: Console) -> None:
    """Print the tables, and write them as Markdown, CSV and JSON, with a figure."""
    fronts = pd.concat([front(plain, kind) for kind in KINDS])
    compared = compare(rows, plain)
    summed = summary(compared)
    tables = {
        "front": named(fronts[["run", "steps", "kind", "psnr", "right"]], ["run", "steps"]),
        "comparison": named(compared[[*ROW, *COLUMNS]], ROW),
        "summary": named(summed, ["spacing", "method", "setting"]),
    }
    for title, frame in tables.items():
        headings, lines = printed(frame)
        print_table(console, title, headings, lines)
        for ending in ("md", "csv"):
            write_table(folder / f"{title}.{ending}", headings, lines)
    over_cost(fronts, compared, folder / "front.png")
    found = {"plain": plain, "front": fronts, "comparison": compared, "summary": summed}
    records = {
        title: frame.astype(object).where(frame.notna(), None).to_dict("records") for title, frame in found.items()
    }
    write_json(folder / "results.json", records | {"impossible": impossible})
    for run, reason in impossible.items():
        console.print(f"{run}: {reason}", soft_wrap=True, highlight=False, markup=False)


def main(
    output: Annotated[Path, typer.Option(help="Folder for what is measured.")],
    model: Annotated[str, typer.Option(help="A testbed.")] = str(MODELS / "shapes-sd"),
    guidance_scale: Annotated[float, typer.Option()] = 7.0,
    captions: Annotated[int, typer.Option(min=2, help="Number of captions.")] = 500,
    prompts: Annotated[str, typer.Option(help="'shapes', 'clips', or a text file with a caption a line.")] = "shapes",
    screen: Annotated[int, typer.Option(min=2, help="Captions by which the best plain runs are chosen.")] = 12,
    finalists: Annotated[
        int, typer.Option(min=1, help="Plain runs with each number of steps and kind of spacing that go on to all.")
    ] = 3,
    solver: Annotated[list[str] | None, typer.Option(help=f"Of the gated runs; {', '.join(GATED_SOLVERS)}.")] = None,
    spacing: Annotated[list[str] | None, typer.Option(help="Of the gated runs; the pipeline's own.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=2, help=f"Of the gated runs; {GATED_STEPS}.")] = None,
    tolerance: Annotated[list[float] | None, typer.Option(min=0, help="Of T-GATE; its default.")] = None,
    tgate: Annotated[list[str] | None, typer.Option(help="More of T-GATE: 'gate_step=8,guidance=predict'.")] = None,
    rival: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(RIVALS)}, or none; all.")] = None,
    plain_solver: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(SOLVERS)}; all.")] = None,
    plain_steps: Annotated[list[int] | None, typer.Option(min=1, help=f"{PLAIN_STEPS}")] = None,
    reference_steps: Annotated[int, typer.Option(min=1, help="Of UniPC.")] = 150,
    batch_size: Annotated[int, typer.Option(min=1, help="Of T-GATE and of rivals that decide by the picture.")] = 1,
    plain_batch_size: Annotated[int, typer.Option(min=1, help="Of all other runs.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Picture number i has seed + i.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
) -> None:
    """Draw, measure, and write the front of the plain runs and what is ahead of it."""
    rivals = [name for name in one_of("rival", rival or list(RIVALS), [*RIVALS, "none"]) if name != "none"]
    about = {"model": Path(model).name, "guidance_scale": guidance_scale, "captions": captions, "seed": seed}
    about |= {"prompts": prompts, "screen": screen, "batch_size": batch_size, "reference_steps": reference_steps}
    claim(output, about)
    bench = load_bench(model, device, read_captions(prompts, captions), guidance_scale, seed, output)
    known = solvers_of(bench.config)
    solvers = one_of("solver", solver or [name for name in GATED_SOLVERS if name in known], known)
    plain_solvers = one_of("plain_solver", plain_solver or list(known), known)
    places = spacing or [own_spacing(bench.config)]
    one_of("spacing", places, dict.fromkeys(place for name in solvers for place in spacings_of(bench.config, name)))
    if rivals and draws_videos(bench.pipe):
        raise typer.BadParameter(
            f"rival={rivals!r}, but {model!r} guides by two calls, of which no rival knows: pass none"
        )
    output.mkdir(parents=True, exist_ok=True)
    clear_parts(output)
    write_json(output / "settings.json", about)

    methods = [
        ("tgate", setting) for setting in [*(f"tolerance={value:g}" for value in tolerance or []), *(tgate or [])]
    ]
    methods = methods or [("tgate", "")]
    usable = [name for name in rivals if guidance_scale > 1 or name not in NEED_GUIDANCE]
    methods += [(name, f"{value:g}") for name in usable for value in RIVALS[name][1]]
    gated = gated_cells(bench.config, solvers, places, steps or GATED_STEPS, methods)
    bench.refer(reference_steps, plain_batch_size)
    needed = [Cell(cell.solver, cell.spacing, cell.steps) for cell in gated]
    cells = plain_cells(bench.config, plain_solvers, plain_steps or PLAIN_STEPS)
    plain, impossible = measure_plain(bench, cells, needed, screen, finalists, plain_batch_size)
    sizes = dict.fromkeys(FIXED, plain_batch_size)
    rows = [
        bench.measure(cell, range(captions), sizes.get(cell.method, batch_size))
        for cell in track(gated, "T-GATE and rivals")
    ]
    report(plain, table(rows), impossible, output, Console())


if __name__ == "__main__":
    typer.run(main)
