"""The script that measures how the package is built."""

import itertools
from pathlib import Path

import pytest

from tests.support.structure import HERE, floors, half_steps, imports, lines, main, modules_of, rooms
from tests.zoo.modular import IS_THERE

PACKAGE = HERE / "tgate_processors"
MODULES = {
    "__init__.py": "",
    "top.py": "import os\nfrom .low import bottom\nfrom .low.middle import name, other\n",
    "low/__init__.py": "shared = 1\n",
    "low/middle.py": "from . import shared\n\n\ndef late():\n    from ..side import name\n",
    "low/bottom.py": "if TYPE_CHECKING:\n    from ..top import name\n",
    "side.py": "",
}


@pytest.fixture
def house(tmp_path):
    def build(**changed):
        for name, text in {**MODULES, **changed}.items():
            path = tmp_path / "_internal" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return modules_of(tmp_path)

    return build


def test_imports_are_followed_to_modules_and_folders(house):
    arrows = imports(house())
    assert arrows == {
        "top.py": {"low/bottom.py", "low/middle.py"},
        "low/__init__.py": set(),
        "low/middle.py": {"low/__init__.py", "side.py"},
        "low/bottom.py": set(),
        "side.py": set(),
    }
    assert rooms(arrows) == {"top.py": {"low"}, "low": {"side.py"}, "side.py": set()}
    assert floors(arrows) == floors(rooms(arrows)) == "3"


def test_a_circle_is_named(house):
    arrows = rooms(imports(house(**{"side.py": "from .top import name\n"})))
    assert {*floors(arrows).split(" <- ")} == {"top.py", "low", "side.py"}


def test_a_docstring_makes_no_function_longer(house):
    text = 'def one():\n    """Long.\n\n    Longer."""\n    return 1\n'
    assert lines(house(**{"side.py": text})["side.py"].body[0]) == 2


def test_a_half_step_enters_the_gates_and_the_clock():
    found = itertools.islice(half_steps(PACKAGE), 2)
    step, forward = ({Path(code.co_filename).name for code in codes} for _, codes in found)
    assert forward < step
    assert "processor.py" in forward
    assert "callback_chain.py" in step - forward


@pytest.mark.slow
@pytest.mark.skipif(not IS_THERE, reason="this diffusers has no modular pipelines")
def test_the_script_prints_folders_without_a_circle_and_every_pipeline(capsys):
    main()
    printed = capsys.readouterr().out
    assert " <- " not in printed
    assert all(f"{name}: half step" in printed for name in ("SD", "Wan", "modular SDXL"))
