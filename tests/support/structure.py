"""
How the package is built: folders, what imports what, what is long, and what one half step of a call walks through.

    python -m tests.support.structure
    python -m tests.support.structure --root ../another-checkout    # its package, in the same pipelines
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import CodeType, FrameType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from examples.benchmarks.tables import print_table

HERE = Path(__file__).parents[2]
Arrows = dict[str, set[str]]
Steps = list[tuple[list[CodeType], list[CodeType]]]
_INNER = ("comp>", "expr>")


def modules_of(package: Path) -> dict[str, ast.Module]:
    """What the modules of a package say, by their path in `_internal`."""
    inner = package / "_internal"
    # That of the package itself has a docstring and no more.
    paths = sorted({*inner.rglob("*.py")} - {inner / "__init__.py"})
    return {path.relative_to(inner).as_posix(): ast.parse(path.read_text()) for path in paths}


def imports(modules: dict[str, ast.Module]) -> Arrows:
    """Which modules import from which other ones when they run."""

    def imported(name: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.ImportFrom) and node.level:
            base = Path(*Path(name).parts[: -node.level], *(node.module or "").split("."))
            for path in (base / alias.name for alias in node.names):
                # A module, or a name out of one or out of a folder.
                places = [f"{path.as_posix()}.py", f"{base.as_posix()}.py", (base / "__init__.py").as_posix()]
                yield next(place for place in places if place in modules)
        for child in ast.iter_child_nodes(node):
            yield from imported(name, child)

    return {name: {*imported(name, tree)} - {name} for name, tree in modules.items()}


def room_of(name: str) -> str:
    """The folder of a module, or itself where it lies in none."""
    return Path(name).parts[0]


def rooms(arrows: Arrows) -> Arrows:
    """Which folders import from which other ones."""
    pairs = {(room_of(name), room_of(other)) for name, others in arrows.items() for other in others}
    return {room: {other for one, other in pairs if one == room != other} for room in map(room_of, arrows)}


def floors(arrows: Arrows) -> str:
    """How many of them the longest chain has; or a circle, which has no end."""
    heights: dict[str, int] = {}
    try:
        for name in TopologicalSorter(arrows).static_order():
            heights[name] = 1 + max((heights[other] for other in arrows[name]), default=0)
    except CycleError as error:
        return " <- ".join(error.args[1])
    return str(max(heights.values()))


def lines(node: Any) -> int:
    """Lines of a function or a class, without its docstring."""
    said = node.body[0] if ast.get_docstring(node) else None
    return int(node.end_lineno - node.lineno + 1 - (said.end_lineno - said.lineno + 1 if said else 0))


def run_classes(modules: dict[str, ast.Module]) -> Iterator[tuple[str, int, int]]:
    """The classes of a run, one a subclass of the other, and how many attributes and methods each adds."""
    nodes = (node for name, tree in modules.items() if room_of(name) == "run" for node in tree.body)
    for each in (node for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith("Run")):
        stored = [
            node for node in ast.walk(each) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        ]
        own = {node.attr for node in stored if ast.unparse(node.value) == "self"}
        yield each.name, len(own), sum(isinstance(node, ast.FunctionDef) for node in each.body)


def walk(package: Path, pipe: Any, call: Callable[[], object]) -> Steps:
    """The package's functions that each step of a call enters, in all and within the calls of the denoiser."""
    denoiser, end = getattr(pipe, "unet", None) or pipe.transformer, type(pipe.scheduler).step.__code__
    steps: Steps = [([], [])]
    depth = 0

    def enter(frame: FrameType, event: str, argument: object) -> None:
        nonlocal depth
        code = frame.f_code
        if code is torch.nn.Module._wrapped_call_impl.__code__ and frame.f_locals["self"] is denoiser:
            depth += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and code is end:
            steps.append(([], []))
        # Comprehensions are functions in some versions of Python, and generators are called for each of their things.
        elif event == "call" and code.co_filename.startswith(f"{package}/") and not code.co_name.endswith(_INNER):
            for codes in steps[-1][: 2 if depth else 1]:
                codes.append(code)

    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
    return steps


def half_steps(package: Path) -> Iterator[tuple[str, list[CodeType]]]:
    """What is entered where guidance is one batch, two calls, and a guider."""
    # Not before `main` has said whose package it is.
    from tests.zoo.catalogue import BY_NAME
    from tests.zoo.modular import IS_THERE, MODULAR
    from tgate_processors import apply_tgate

    cases: list[Any] = [BY_NAME["sd"], BY_NAME["wan"], *MODULAR[: int(IS_THERE)]]
    for name, case in zip(("SD", "Wan", "modular SDXL"), cases, strict=False):
        pipe = apply_tgate(case.build(), 3, guidance="predict")
        # The last one that the scheduler ends.
        step, forwards = walk(package, pipe, functools.partial(case.run, pipe))[-2]
        yield from ((f"{name}: half step", step), ("calls of its denoiser", forwards))


def main(root: Annotated[Path, typer.Option(help="A checkout of the package.")] = HERE) -> None:
    """Measure the package of a checkout."""
    sys.path.insert(0, str(root.resolve()))
    package = Path(importlib.import_module("tgate_processors").__file__ or "").parent
    # Everything else is from here.
    sys.path.pop(0)

    def show(title: str, headings: str, rows: Iterable[tuple[object, ...]]) -> None:
        print_table(Console(), title, ["", *headings.split()], [[*map(str, row)] for row in rows])

    modules = modules_of(package)
    arrows = imports(modules)
    between = rooms(arrows)
    sizes = {name: len((package / "_internal" / name).read_text().splitlines()) for name in modules}
    inside = {room: [sizes[name] for name in modules if room_of(name) == room] for room in between}
    inside["all"] = [*sizes.values()]
    show("Rooms: folders, and modules in none", "modules lines", ((room, len(a), sum(a)) for room, a in inside.items()))
    graphs = (("rooms", between), ("modules", arrows))
    counted = ((name, len(each), floors(each), sum(map(len, each.values()))) for name, each in graphs)
    show("Imports", "number floors arrows", counted)
    nodes = [(name, node) for name, tree in modules.items() for node in ast.walk(tree)]
    functions = {f"{name} {node.name}": lines(node) for name, node in nodes if isinstance(node, ast.FunctionDef)}
    for what, each, limit in (("Files", sizes, 250), ("Functions", functions, 50)):
        longest = sorted(each.items(), key=lambda item: -item[1])
        show(f"{what} of more than {limit} lines", "lines", (item for item in longest if item[1] > limit))
    show("The run", "attributes methods", run_classes(modules))
    found = half_steps(package)
    entered = ((what, len(codes), len({*codes}), len({code.co_filename for code in codes})) for what, codes in found)
    show("What one half step enters", "calls functions files", entered)


if __name__ == "__main__":
    typer.run(main)
