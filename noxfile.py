"""Sessions: `nox -l` lists them, `nox -s NAME` runs one."""

import re
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.error_on_external_run = True
nox.options.reuse_existing_virtualenvs = True

PROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINED = ("-c", "constraints.txt")
# A worker for every core, and a thread for every worker: more wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Seconds for a test that takes long, on a busy machine.
PATIENCE = "--timeout=3600"


def needs(*groups: str) -> tuple[str, ...]:
    """What some dependency groups ask for."""
    return nox.project.dependency_groups(PROJECT, *groups)


def install_for_tests(session: nox.Session) -> None:
    """The package and all that its tests need."""
    session.install(*CONSTRAINED, *needs("test", "quantise", "cache-dit"), "-e", ".[probe]")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and which way imports go."""
    session.install(*needs("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", "--no-cache")


@nox.session
def types(session: nox.Session) -> None:
    """Types."""
    session.install(*CONSTRAINED, *needs("types"), "-e", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in site/, without a warning; `-- serve` shows it while you write."""
    session.install(*needs("docs", "lint"))
    session.run("mkdocs", *(session.posargs or ["build"]), "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def changelog(session: nox.Session) -> None:
    """What changes/ says, printed; `-- --version 1.2.0` moves it into CHANGELOG.md."""
    session.install(*needs("changelog"))
    session.run("towncrier", "build", "--yes", *(session.posargs or ["--draft", "--version", "Unreleased"]))


@nox.session
def package(session: nox.Session) -> None:
    """Wheel and sdist: built, checked, and used in an environment that has nothing else."""
    shutil.rmtree("dist", ignore_errors=True)
    session.install(*CONSTRAINED, *needs("package", "types"))
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))
    (wheel,), (sdist,) = Path("dist").glob("*.whl"), Path("dist").glob("*.tar.gz")
    session.run("check-wheel-contents", str(wheel))
    session.install(*CONSTRAINED, str(wheel))
    session.run("python", "-W", "error", "tests/support/installed.py", "snippets", str(sdist))
    session.run("python", "tests/support/installed.py", "types")
    session.install(*CONSTRAINED, *needs("examples"))
    session.run("python", "tests/support/installed.py", "quickstart", str(sdist))


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the slow ones; arguments after `--` go to pytest."""
    install_for_tests(session)
    session.run("pytest", *(session.posargs or ["-n", "auto"]), env=ONE_THREAD)


@nox.session
def tables(session: nox.Session) -> None:
    """Write what is supported into the tables of README and docs."""
    install_for_tests(session)
    session.run("python", "-m", "tests.support.tables", env=ONE_THREAD)


@nox.session(venv_backend="none")
def slow(session: nox.Session) -> None:
    """The slow tests, in the environment of `tests`; arguments after `--` go to pytest."""
    session.notify("tests", ["-m", "slow and not thorough", PATIENCE, *(session.posargs or ["-n", "auto"])])


@nox.session(venv_backend="none")
def coverage(session: nox.Session) -> None:
    """Which lines the tests but the slow ones reach, in the environment of `tests`; fails below the floor."""
    session.notify("tests", ["--cov", *(session.posargs or ["-n", "auto"])])


@nox.session(venv_backend="none")
def thorough(session: nox.Session) -> None:
    """Every law for every family, where CI runs some rows; in the environment of `tests`."""
    session.notify("tests", ["-m", "thorough", PATIENCE, *(session.posargs or ["-n", "auto"])])


@nox.session
def minimums(session: nox.Session) -> None:
    """All tests, slow ones too, with the oldest supported versions, as pyproject.toml states them."""
    floors = [re.sub(r">=([\d.]+)$", r"~=\1.0", dependency) for dependency in PROJECT["project"]["dependencies"]]
    session.install(*floors, *needs("test"), "-e", ".[probe]")
    session.run("pytest", "-m", "", PATIENCE, *(session.posargs or ["-n", "auto"]), env=ONE_THREAD)


@nox.session
def newest(session: nox.Session) -> None:
    """All tests but the slow ones, with the newest versions of everything; arguments after `--` go to pytest."""
    session.install("--upgrade", "--upgrade-strategy=eager", *needs("test", "cache-dit"), "-e", ".[probe]")
    session.run("pytest", *(session.posargs or ["-n", "auto"]), env=ONE_THREAD)


@nox.session
def quickstart(session: nox.Session) -> None:
    """The main job: pictures with and without T-GATE; arguments after `--` go to examples/quickstart.py."""
    session.install(*CONSTRAINED, *needs("examples"), "-e", ".")
    session.run("python", "examples/quickstart.py", *session.posargs)


@nox.session
def notebook(session: nox.Session) -> None:
    """Run examples/tgate.ipynb and render it, with its outputs, as the page docs/notebook.md."""
    session.install(*CONSTRAINED, "nbconvert", "ipykernel", *needs("examples"), "-e", ".")
    session.run("python", "docs/site/render_notebook.py")
