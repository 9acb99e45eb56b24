"""The notebook runs from top to bottom, and git holds no outputs of it."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import ROOT

FILE = ROOT / "examples" / "tgate.ipynb"


def test_no_outputs_are_stored():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # The tensors are small: threads that wait for a busy core would take longer than they save.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(FILE, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(FILE.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "T-GATE: 16 steps" in printed
    assert "s without, " in printed
    # What the notebook opens with: half the work, and closer than a plain run that does as much.
    gated, plain = (
        tuple(map(float, re.search(rf"{name}: .*?([\d.]+) GMACs, ([\d.]+) dB", printed).groups()))
        for name in ("tolerance=0.2", "8 plain steps")
    )
    assert gated[0] <= plain[0]
    assert gated[1] > plain[1] + 6
    assert " plain " in printed


@pytest.mark.slow
def test_without_a_checkout_it_takes_a_model_of_the_hub(monkeypatch, tmp_path):
    cells = nbformat.read(FILE, as_version=4).cells
    first, prompts = (cell.source for cell in cells if cell.cell_type == "code" and "TESTBED" in cell.source)
    hub = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert hub in first
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(
        first.removeprefix("%matplotlib inline\n").replace(hub, str(ROOT / "examples" / "models" / "shapes-sd")),
        namespace,
    )
    exec(prompts.replace("STEPS = 16", "STEPS = 2"), namespace)
    assert namespace["TESTBED"] is None
    assert len(namespace["plain"]) == len(namespace["PROMPTS"]) == 2
    assert "fox" in namespace["PROMPTS"][0]


def test_the_page_shows_the_cells_of_the_notebook():
    page = (ROOT / "docs" / "notebook.md").read_text()
    for cell in nbformat.read(FILE, as_version=4).cells:
        assert cell.source.replace("\n\n\n", "\n\n") in page.replace("\n\n\n", "\n\n")
