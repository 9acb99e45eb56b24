"""The tables that say what is supported. `nox -s tables` writes them into the pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import diffusers

from tests.support.ranks import CHECKS
from tests.zoo.addons import HOSTS
from tests.zoo.catalogue import BY_NAME, CROSS_ATTENTION, JOINT_ATTENTION, SEQUENTIAL
from tests.zoo.inventory import AS_ANOTHER, forecast_only
from tgate_processors._internal.families import FAMILIES
from tgate_processors._internal.families.family import Family

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs/pipelines.md", ROOT / "docs/devices.md")
CALLS = {1: "batch", 2: "two calls"}
# Ways to split a denoiser: the checks of them in `tests/support/ranks.py`, and where a denoiser has its plan.
SPLITS = {
    "context parallelism": (("ring", "ulysses"), "_cp_plan"),
    "tensor parallelism": (("tensor",), "_tp_plan"),
    "`fully_shard`": (("sharded",), ""),
    "`device_map`": (("mapped",), ""),
}
NO_HALVES = {
    "its guidance is distilled into it": "guidance is distilled into the denoiser",
    "is not two halves": "guidance has several parts",
    "cannot be gated with guider=AdaptiveProjectedMixGuidance": "its guider is not plain guidance",
}


def table(*headings: str, rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [" | ".join(row) for row in (headings, *rows)]
    return "\n".join([f"| {lines[0]} |", "|" + "---|" * len(headings), *(f"| {line} |" for line in lines[1:])])


def pipelines(*headings: str, rows: Mapping[str, str]) -> str:
    """A table with a row for each pipeline class, by their names."""
    return table(*headings, rows=((f"`{name}`", rows[name]) for name in sorted(rows, key=str.lower)))


def skipped(family: Family) -> str:
    """What half steps leave out, in the words of the README."""
    if family.layout.joint:
        return "half of guidance"
    return "half of guidance, and cross-attention" + (
        "" if family.layout.gates_cross_by_default else " if you ask for it"
    )


def models() -> str:
    """Families by what half steps leave out."""
    groups: dict[str, list[str]] = {}
    for family in FAMILIES:
        groups.setdefault(skipped(family), []).append(family.models)
    return table("models", "half steps skip", rows=((", ".join(names), what) for what, names in groups.items()))


def held(kind: str) -> str | None:
    """The class of the denoiser that a pipeline class has, by the types of its arguments."""
    pipeline = getattr(diffusers, kind, None)
    if pipeline is None:
        return None
    init = next(vars(base)["__init__"] for base in pipeline.__mro__ if "__init__" in vars(base))
    named = {str(init.__annotations__.get(name)) for name in ("unet", "transformer")}
    found = [family.denoiser_class for family in FAMILIES if re.search(rf"\b{family.denoiser_class}\b", str(named))]
    # ControlNet-XS takes the plain UNet too, and makes its own of it.
    return found[-1]


def denoisers() -> str:
    """Every family, and the pipelines that are tested with it."""
    around: dict[str | None, set[str]] = {}
    for kind in [*CROSS_ATTENTION, *SEQUENTIAL, *JOINT_ATTENTION]:
        around.setdefault(held(kind.pipeline), set()).add(kind.pipeline)
    gated = {True: "yes", False: "on request"}
    rows = (
        (
            family.models,
            f"`{family.denoiser_class}`",
            ", ".join(f"`{name}`" for name in sorted(around.get(family.denoiser_class, ()), key=str.lower)) or "below",
            CALLS[family.layout.calls_per_step],
            "no" if family.layout.joint else gated[family.layout.gates_cross_by_default],
        )
        for family in FAMILIES
    )
    return table("models", "denoiser", "tested pipelines", "guidance", "cross-attention", rows=rows)


def as_another() -> str:
    """Pipelines that stand on the strength of another one."""
    return pipelines("pipeline class", "as", rows={name: f"`{other}`" for name, other in AS_ANOTHER.items()})


def forecast() -> str:
    """Pipelines without half steps."""
    rows = {name: NO_HALVES[reason] for name, reason in forecast_only().items()}
    return pipelines("pipeline class", "why there are no half steps", rows=rows)


def hosts() -> str:
    """What people build around a denoiser. The class of such a pipeline is known once it is made."""
    rows = ((f"`{type(host.build()).__name__}`", host.row, host.stays) for host in HOSTS)
    return table("pipeline class", "what", "half that stays", rows=rows)


def splits() -> str:
    """Ways to split a denoiser over devices: those that are tested, and those that diffusers has a plan for."""
    tested = set()
    for check in CHECKS:
        way, _, name = check.rpartition("-")
        parts = BY_NAME[name].denoisers(BY_NAME[name].build())
        tested |= {(way, type(part).__name__) for part in parts.values()}

    def cell(denoiser: str, ways: tuple[str, ...], plan: str) -> str:
        if any((way, denoiser) in tested for way in ways):
            return "tested"
        # Where there is no word for a plan, none is needed.
        has_plan = not plan or getattr(getattr(diffusers, denoiser, None), plan, None)
        return (plan and "plan") or "yes" if has_plan else "no"

    rows = []
    for family in FAMILIES:
        cells = [cell(family.denoiser_class, *way) for way in SPLITS.values()]
        if {"tested", "plan"} & {*cells}:
            rows.append((f"`{family.denoiser_class}`", *cells))
    return table("denoiser", *SPLITS, rows=[*rows, ("all others", "no", "no", "yes", "yes")])


def all_are_there() -> bool:
    """Whether this diffusers has all pipelines; without some of them the table of denoisers cannot be made."""
    return all(map(held, (kind.pipeline for kind in [*CROSS_ATTENTION, *SEQUENTIAL, *JOINT_ATTENTION])))


TABLES = {each.__name__: each for each in (models, denoisers, forecast, as_another, splits)}
# Those that an older diffusers, which lacks some of what they name, cannot make.
NEED_ALL = ("denoisers", "splits")


def rewritten(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A page with these tables as they should be."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)",
        lambda found: f"{found[1]}{tables[found[2]]()}{found[3]}" if found[2] in tables else found[0],
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rewritten(path.read_text(), TABLES | {"hosts": hosts}))
