"""Sessions: `nox -l` lists them, `nox -s NAME` runs one."""

import re
import tomllib
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.error_on_external_run = True
nox.options.reuse_existing_virtualenvs = True

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())
CONSTRAINED = ("-c", "constraints.txt")
# A worker for every core, and a thread for every worker: more wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Seconds for a test that takes long, on a busy machine.
PATIENCE = "--timeout=3600"


def install_for_tests(session: nox.Session) -> None:
    """The package and all that its tests need."""
    groups = PROJECT["dependency-groups"]
    extras = ".[cache-dit,evaluate,examples,probe]"
    session.install(*CONSTRAINED, *groups["test"], *groups["quantise"], "-e", extras)


@nox.session
def lint(session: nox.Session) -> None:
    """Style."""
    session.install(*PROJECT["dependency-groups"]["lint"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types."""
    session.install(*CONSTRAINED, *PROJECT["dependency-groups"]["types"], "-e", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in site/, without a warning; `-- serve` shows it while you write."""
    session.install(*PROJECT["dependency-groups"]["docs"], *PROJECT["dependency-groups"]["lint"])
    session.run("mkdocs", *(session.posargs or ["build"]), "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the slow ones; arguments after `--` go to pytest."""
    install_for_tests(session)
    session.run("pytest", *(session.posargs or ["-n", "auto"]), env=ONE_THREAD)


@nox.session
def slow(session: nox.Session) -> None:
    """The slow tests; arguments after `--` go to pytest."""
    install_for_tests(session)
    session.run("pytest", "-m", "slow", PATIENCE, *(session.posargs or ["-n", "auto"]), env=ONE_THREAD)


@nox.session
def minimums(session: nox.Session) -> None:
    """All tests, slow ones too, with the oldest supported versions, as pyproject.toml states them."""
    floors = [re.sub(r">=([\d.]+)$", r"~=\1.0", dependency) for dependency in PROJECT["project"]["dependencies"]]
    session.install(*floors, *PROJECT["dependency-groups"]["test"], "-e", ".[evaluate,examples,probe]")
    session.run("pytest", "-m", "", PATIENCE, *(session.posargs or ["-n", "auto"]), env=ONE_THREAD)


@nox.session
def quickstart(session: nox.Session) -> None:
    """The main job: pictures with and without T-GATE; arguments after `--` go to examples/quickstart.py."""
    session.install(*CONSTRAINED, "-e", ".[examples]")
    session.run("python", "examples/quickstart.py", *session.posargs)


@nox.session
def notebook(session: nox.Session) -> None:
    """Run examples/tgate.ipynb and render it, with its outputs, as the page docs/notebook.md."""
    session.install(*CONSTRAINED, "nbconvert", "ipykernel", "-e", ".[examples]")
    session.run("python", "examples/render_notebook.py")
