"""
What a user does with the installed package, away from the checkout; run by the Python that it is installed for.

    python tests/support/installed.py snippets dist/tgate_processors-0.1.0.tar.gz     # those of the README
    python tests/support/installed.py quickstart dist/tgate_processors-0.1.0.tar.gz   # the sdist's
    python tests/support/installed.py types                                           # mypy on a user's scripts
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import tgate_processors

TYPED = Path(__file__).parents[1] / "typed"


def unpack(sdist: str, folder: Path) -> Path:
    """The tree of the sdist without the package, which is to be found where it is installed."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    shutil.rmtree(tree / "tgate_processors")
    return tree


def snippets(sdist: str, folder: Path) -> None:
    """Run the Python of the README, where the files that it names are."""
    tree = unpack(sdist, folder)
    found = re.findall(r"^```python\n(.*?)^```", (tree / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert found
    os.chdir(tree)
    exec(compile("\n".join(found), "README.md", "exec"), {})


def quickstart(sdist: str, folder: Path) -> None:
    """Run the quickstart."""
    tree = unpack(sdist, folder)
    few = ("--steps", "6", "--gate-step", "2", "--seeds", "1", "--output", str(folder / "pictures.png"))
    subprocess.run([sys.executable, str(tree / "examples" / "quickstart.py"), *few], check=True, cwd=folder)
    assert (folder / "pictures.png").stat().st_size > 10000


def types(folder: Path) -> None:
    """Let mypy look at a user's scripts as it does by default, with all of diffusers and this package."""
    for script in TYPED.glob("*.py"):
        shutil.copy(script, folder)
    options = ("--strict", "--config-file=", "--exclude-gitignore")
    subprocess.run([sys.executable, "-m", "mypy", *options, "."], check=True, cwd=folder)


def main(what: str, *arguments: str) -> None:
    """Do one of the above with the installed package."""
    place = Path(tgate_processors.__file__)
    assert place.parent.parent.name == "site-packages", f"this is not the installed package: {place}"
    with tempfile.TemporaryDirectory() as folder:
        {"snippets": snippets, "quickstart": quickstart, "types": types}[what](*arguments, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
