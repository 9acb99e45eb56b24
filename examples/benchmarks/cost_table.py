"""
What T-GATE costs, without weights: the published table with computed figures beside it, or a row of your own.

    python -m examples.benchmarks.cost_table
    python -m examples.benchmarks.cost_table --model sdxl --steps 25 --gate-step 10 --sp-interval 5 --warm-up 2
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from rich.console import Console
from rich.progress import track

from examples.benchmarks.tables import check_output, print_table, write_table
from tgate_processors import TGateCost, TGateReport, TGateSchedule, estimate_cost

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
MODELS = sorted(path.stem for path in CONFIGS.glob("*.json"))


def load_denoiser(model: str) -> Any:
    """The denoiser of a configuration, without weights."""
    path = CONFIGS / f"{model}.json" if model in MODELS else Path(model)
    if not path.is_file():
        raise typer.BadParameter(f"{model!r} is neither one of {', '.join(MODELS)}, nor the config.json of a denoiser.")
    config = json.loads(path.read_text())
    denoiser_class = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        return denoiser_class.from_config(config)


def forwards(report: TGateReport, guidance: bool) -> str:
    """The forwards of a run, one for each picture and each half of guidance."""
    full, other = report.cross_attention_computed, report.cross_attention_reused
    return f"{full * (2 if guidance else 1)}F+{other}G"


def composed(terms: str, cost: TGateCost, shallow: float) -> float:
    """MACs of the forwards that a text such as `18F+32D` names."""
    each = {"F": cost.full.layers, "G": cost.without_cross_attention.layers, "D": shallow}
    return sum(int(number) * each[kind] for number, kind in re.findall(r"(\d+)([FGD])", terms))


def compute_row(row: dict[str, Any], shallow: float) -> dict[str, Any]:
    """A published row with the computed figures."""
    steps, gate, guidance = row["num_inference_steps"], row.get("gate_step"), row.get("guidance", True)
    cost = estimate_cost(
        load_denoiser(row["model"]), TGateSchedule(gate or 1), steps, do_classifier_free_guidance=guidance
    )
    if "forwards" in row:
        terms, macs, params = row["forwards"], composed(row["forwards"], cost, shallow), None
    elif gate:
        terms, macs, params = forwards(cost.report, guidance), cost.with_tgate.layers, cost.parameters_after_gate
    else:
        terms, macs, params = f"{steps * (2 if guidance else 1)}F", cost.without_tgate.layers, cost.parameters
    published_macs, published_params = row["macs"] * 1e12, number(row["params"])
    return {
        "row": row["row"],
        "model": row["model"],
        "num_inference_steps": steps,
        "gate_step": gate,
        "forwards": terms,
        "note": row.get("note"),
        "macs": macs,
        "published_macs": published_macs,
        "macs_deviation": macs / published_macs - 1,
        "params": params,
        "published_params": published_params,
        "params_deviation": params / published_params - 1 if params and published_params else None,
    }


def number(text: str | None) -> float | None:
    """The number in `859.520M`."""
    return None if text is None else float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]


def show(value: float | None, unit: float, form: str = ".3f") -> str:
    """A figure in a cell of the table."""
    return "-" if value is None else f"{value / unit:{form}}"


Printed = tuple[list[str], list[list[str]]]


def published_table(console: Console) -> tuple[list[dict[str, Any]], Printed]:
    """Print the published table with computed figures beside it."""
    data = json.loads((HERE / "published.json").read_text())
    waiting = track(data["rows"], "Rows", console=console, transient=True)
    rows = [compute_row(row, data["shallow_gmacs"] * 1e9) for row in waiting]
    marks = {name: "*" * (place + 1) for place, name in enumerate(data["notes"])}
    title = "MACs in 1e12 of Linear and Conv layers, Params in millions; computed beside published"
    headings = ["", "gate", "forwards", "MACs", "published", "%", "Params", "published", "%"]
    lines = [
        [
            row["row"] + (f" {marks[row['note']]}" if row["note"] else ""),
            f"{row['gate_step'] or '-'}",
            row["forwards"],
            *(show(row[name], 1e12) for name in ("macs", "published_macs")),
            show(row["macs_deviation"], 0.01, "+.3f"),
            *(show(row[name], 1e6) for name in ("params", "published_params")),
            show(row["params_deviation"], 0.01, "+.3f"),
        ]
        for row in rows
    ]
    print_table(console, title, headings, lines)
    for name, note in data["notes"].items():
        console.print(f"{marks[name]} {note}", soft_wrap=True)
    return rows, (headings, lines)


def own_row(
    console: Console, model: str, schedule: TGateSchedule, steps: int, **settings: Any
) -> tuple[list[dict[str, Any]], Printed]:
    """Print what one schedule costs."""
    cost = estimate_cost(load_denoiser(model), schedule, steps, **settings)
    report = cost.report
    headings = ["", "Linear and Conv", "and attention", "Params in millions"]
    rows = {"without T-GATE": (cost.without_tgate, cost.parameters)}
    rows["with T-GATE"] = (cost.with_tgate, cost.parameters_after_gate)
    lines = [
        [name, show(macs.layers, 1e12), show(macs.total, 1e12), show(params, 1e6)]
        for name, (macs, params) in rows.items()
    ]
    print_table(console, f"{model}, gate at step {report.gate_step} of {steps}, MACs in 1e12", headings, lines)
    console.print(
        f"{report.full_batch_forwards} forwards, {report.half_batch_forwards} at half batch; speed-up bound "
        f"{cost.speedup_bound:.3f}; {report.peak_bytes / 2**20:.1f} MiB held at most."
    )
    figures = {
        "model": model,
        "num_inference_steps": steps,
        "gate_step": report.gate_step,
        **{f"{name}_macs": getattr(cost, name).layers for name in ("without_tgate", "with_tgate")},
        **{f"{name}_total_macs": getattr(cost, name).total for name in ("without_tgate", "with_tgate")},
        "params": cost.parameters,
        "params_after_gate": cost.parameters_after_gate,
        "speedup_bound": cost.speedup_bound,
        "peak_bytes": report.peak_bytes,
    }
    return [figures], (headings, lines)


def main(
    model: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(MODELS)}, or the config.json of a denoiser, for one row.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    gate_step: Annotated[float, typer.Option(help="Number of steps, or a share of them below 1.")] = 10,
    sp_interval: int = 1,
    fi_interval: int = 1,
    warm_up: int = 0,
    guidance: Annotated[bool | None, typer.Option(help="Whether classifier-free guidance is on.")] = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    dtype: Annotated[str, typer.Option(help="The type that held bytes are counted in.")] = "float16",
    figures: Annotated[Path | None, typer.Option("--json", help="A file for the same figures in full.")] = None,
    output: Annotated[Path | None, typer.Option(help="A file for the table, .csv or .md.")] = None,
) -> None:
    """Print the published table with computed figures beside it, or with --model one row for a schedule."""
    check_output(output)
    console = Console()
    if model is None:
        rows, printed = published_table(console)
    else:
        try:
            gate = int(gate_step) if gate_step.is_integer() else gate_step
            schedule = TGateSchedule(gate, sp_interval, fi_interval, warm_up)
            settings = {
                "do_classifier_free_guidance": guidance,
                "height": height,
                "width": width,
                "batch_size": batch_size,
            }
            rows, printed = own_row(console, model, schedule, steps, dtype=getattr(torch, dtype), **settings)
        except (AttributeError, TypeError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
    if output is not None:
        write_table(output, *printed)
    if figures is not None:
        figures.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
