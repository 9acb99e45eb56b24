"""
Run examples/tgate.ipynb and write it with its outputs as docs/notebook.md.

    python docs/site/render_notebook.py
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

DOCS = Path(__file__).parents[1]
EXAMPLES = DOCS.parent / "examples"


def main() -> None:
    """Execute, convert, write."""
    notebook = nbformat.read(EXAMPLES / "tgate.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    for cell in notebook.cells:
        # Progress bars of loading, which say something of the machine only.
        kept = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        cell.update({"outputs": kept} if cell.cell_type == "code" else {})
    settings = Config(
        {"ExtractOutputPreprocessor": {"output_filename_template": "notebook-{cell_index}-{index}{extension}"}}
    )
    page, resources = MarkdownExporter(config=settings).from_notebook_node(notebook)
    for name, content in resources["outputs"].items():
        (DOCS / "images" / name).write_bytes(content)
        page = page.replace(f"({name})", f"(images/{name})")
    # `py`, as the snippets in `python` are run by the tests one page after the other; the notebook has its own test.
    lines = [line.rstrip() for line in page.replace("```python", "```py").splitlines()]
    (DOCS / "notebook.md").write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
