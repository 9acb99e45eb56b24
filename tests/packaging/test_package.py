"""Wheel and sdist: what is in them, what a package index shows, and that what is installed does its work."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest

import tgate_processors
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def call(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The wheel, built from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def metadata(dist):
    with zipfile.ZipFile(dist[0]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def test_the_wheel_is_the_package_and_nothing_else(dist):
    call(sys.executable, "-m", "check_wheel_contents", dist[0])
    with zipfile.ZipFile(dist[0]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = ROOT / "tgate_processors"
    assert names == {str(file.relative_to(ROOT)) for pattern in ("*.py", "py.typed") for file in source.rglob(pattern)}


def test_the_sdist_is_the_whole_repository(dist):
    call(sys.executable, "-m", "twine", "check", "--strict", *dist)
    # A package index takes 100 MB by default.
    assert dist[1].stat().st_size < 60e6
    with tarfile.open(dist[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    model = ROOT / "examples/models/shapes-sd"
    assert {str(file.relative_to(ROOT)) for file in model.rglob("*") if file.is_file()} <= names
    assert {"README.md", "noxfile.py", "constraints.txt", "CONTRIBUTING.md", ".ci/run", "tests/conftest.py"} <= names
    assert not [name for name in names if re.match(r"\.git$|\.nox/|dist/|.*__pycache__", name)]
    if (ROOT / ".git").exists():
        known = call("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
        assert names - {"PKG-INFO"} == {name for name in known if (ROOT / name).exists()}


@pytest.mark.slow
def test_what_readme_and_contributing_say_runs_in_the_sdist(dist, tmp_path):
    with tarfile.open(dist[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    environment = {**os.environ, "PYTHONPATH": str(tree)}

    def run(*arguments):
        return call(sys.executable, "-m", *arguments, cwd=tree, env=environment)

    assert "test_package.py" in run("pytest", "-q", "-m", "", "--collect-only", "-p", "no:cacheprovider")
    assert " passed" in run("pytest", "-q", "tests/unit/plan", "tests/packaging/test_repo_metadata.py")
    run("examples.benchmarks.comparison", "--steps", "4", "--output", str(tree / "new.png"))
    assert (tree / "new.png").stat().st_size > 10000


def test_a_package_index_shows_the_readme_with_no_link_that_leads_nowhere(metadata):
    page = metadata.get_payload()
    targets = re.findall(r"\]\(([^)]*)\)|(?:src|href|srcset)=[\"']?([^\"'>\s]*)", page)
    assert [target for target in targets if not "".join(target).startswith(("https://", "#"))] == []
    readme = (ROOT / "README.md").read_text()
    # Nothing else is left out, the code least of all.
    assert re.findall(r"^```.*?^```", page, flags=re.DOTALL | re.MULTILINE) == re.findall(
        r"^```.*?^```", readme, flags=re.DOTALL | re.MULTILINE
    )
    words = [re.findall(r"\w+", re.sub(r"!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)", "", text)) for text in (page, readme)]
    assert words[0] == words[1]


def test_there_is_no_address_before_there_is_one(metadata):
    urls = metadata.get_all("Project-URL") or []
    named = "hatch.metadata.hooks.fancy-pypi-readme" in (ROOT / "pyproject.toml").read_text()
    assert named
    assert ("urls" in PROJECT) == bool(urls)
    # Both or neither: the address of the project's pages, and of the files that the README leads to.
    leads_to_files = re.search(r"\]\(https://[^)]*/(?:blob|raw)/[^)]*\)", metadata.get_payload()) is not None
    assert bool(urls) == leads_to_files


def test_extras_are_for_what_the_wheel_can_do(metadata):
    assert sorted(metadata.get_all("Provides-Extra")) == ["deepcache", "probe"]
    assert metadata["Version"] == tgate_processors.__version__


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """A Python in which the wheel is installed, and what it needs is borrowed from this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    call(sys.executable, "-m", "pip", "--python", folder, "install", "--no-deps", "--no-index", dist[0])
    (packages,) = folder.glob("lib/python*/site-packages")
    # Not a `.pth` file that such a path holds: the checkout is not on it.
    (packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["snippets", "quickstart"])
def test_the_installed_wheel(what, dist, installed):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    call(installed, "-W", "error", ROOT / "tests/support/installed.py", what, dist[1], env=environment)
