"""Everything that README, docs and docstrings show is run, and none of it warns."""

import doctest
import re
import textwrap

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

import tgate_processors
from tests.support import tables
from tests.support.paths import ROOT
from tests.support.testbeds import NEEDS_WAN
from tests.zoo.core import CASES, GUIDED

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROMPT = "a large red circle at the top left, on a white background"


def snippets(page):
    found = re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(snippet) for _, snippet in found]


@pytest.fixture
def pipe():
    pipe = DiffusionPipeline.from_pretrained(ROOT / "examples/models/shapes-sd", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# As under `python -W error`: what a reader copies says nothing of deprecations, its own or those of libraries.
silently = pytest.mark.filterwarnings("error")

# What compiles takes long, and so does what diffusers imports for modular pipelines.
MARKS = {
    "together.md": [pytest.mark.slow],
    "server.md": [pytest.mark.slow],
    "modular.md": [pytest.mark.slow],
    "testbeds.md": [NEEDS_WAN],
    # With NumPy 2 DPM-Solver++ says this about itself.
    "benchmarks.md": [pytest.mark.filterwarnings("ignore:__array__ implementation")],
}
PARAMS = [pytest.param(page, id=page.name, marks=MARKS.get(page.name, [])) for page in PAGES if snippets(page)]


@silently
@pytest.mark.parametrize("page", PARAMS)
def test_the_snippets_of_a_page_run_one_after_the_other(page, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    namespace, real = {}, "stabilityai/stable-diffusion-xl-base-1.0"
    for snippet in snippets(page):
        if "apply_taylorseer_cache" in snippet and not hasattr(
            getattr(diffusers, "hooks", None), "apply_taylorseer_cache"
        ):
            pytest.skip("this diffusers has no such cache")
        if real in snippet:
            # A small one with random weights stands for it.
            from tests.zoo.modular import IS_THERE, save_sdxl

            if not IS_THERE:
                pytest.skip("this diffusers has no modular pipelines")
            save_sdxl(tmp_path)
            snippet = snippet.replace(real, str(tmp_path))
        exec(compile(snippet, page.name, "exec"), namespace)


@silently
def test_the_diff_of_the_readme_is_the_first_snippet_with_another_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    (diff,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line[2:] for line in diff.splitlines()]
    added = [line[2:] for line in diff.splitlines() if line.startswith("+ ")]
    assert len(added) == 3
    code = "\n".join(lines).replace("stable-diffusion-v1-5/stable-diffusion-v1-5", "examples/models/shapes-sd")
    # A GPU is not everywhere, and half precision is slow without one.
    assert 'dtype=torch.float16).to("cuda")' in code
    exec(code.replace('float16).to("cuda")', "float32)"), {})


@silently
@pytest.mark.parametrize(
    "name", [name for name in tgate_processors.__all__ if ">>>" in getattr(tgate_processors, name).__doc__]
)
def test_the_example_of_a_docstring_runs(name, pipe):
    thing = getattr(tgate_processors, name)
    runner = doctest.DocTestRunner()
    text = re.sub(r"^ *```.*$", "", thing.__doc__, flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {"pipe": pipe, "prompt": PROMPT}, name, None, None)
    assert runner.run(test).failed == 0
    assert len(test.examples) > 1


def test_every_public_function_documents_its_arguments_and_errors():
    for name in ("apply_tgate", "remove_tgate", "is_tgate_applied", "get_tgate_report", "estimate_cost"):
        function = getattr(tgate_processors, name)
        for argument in (*function.__annotations__,):
            assert argument == "return" or f"{argument} (`" in function.__doc__, (name, argument)
        for section in ("Args:", "Returns:", "Raises:", "Example:"):
            assert section in function.__doc__


def test_the_commands_of_the_readme_are_those_of_ci_and_nox():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^```sh\n(pip install nox.*)\n```", readme, flags=re.MULTILINE)
    assert commands == ["pip install nox && nox -s quickstart", "pip install nox && nox -s tests"]
    assert commands[1] in (ROOT / ".ci/run").read_text().splitlines()
    sessions = re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), flags=re.MULTILINE)
    assert {"quickstart", "tests"} <= set(sessions)


def prose(page):
    """A page without its code."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors of a page's headings, as a code host makes them and the site too."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return found


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "examples/README", "docs/data/README"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^()\s]+)\)", prose(page))
    links += re.findall(r"\b(?:src|srcset|href)=\"([^\"]+)\"", prose(page))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_examples_are_named_as_they_are_called():
    files = [ROOT / "noxfile.py", *PAGES, *ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.py")]
    text = "".join(file.read_text() for file in [*files, *(ROOT / "examples").rglob("*.md")])
    modules = {f"{name.replace('.', '/')}.py" for name in re.findall(r"-m (examples(?:\.\w+)+)", text)}
    named = modules | set(re.findall(r"(?<!tests/)\bexamples/[\w/-]+\.\w+", text))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_site_has_every_page_and_the_reference_everything_that_is_public():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation
    reference = (ROOT / "docs/api.md").read_text()
    entries = re.findall(r"^::: tgate_processors\.(\w+)$", reference, flags=re.MULTILINE)
    # Older versions of diffusers have no guiders.
    missing = {"TGateGuidance"} - {*tgate_processors.__all__}
    assert sorted({*entries} - missing) == sorted(tgate_processors.__all__)


def test_the_support_matrix_lists_the_pipelines_of_the_tests():
    page = (ROOT / "docs/pipelines.md").read_text()
    page = page[: page.index("## Adapters and variants")]
    rows = dict(re.findall(r"^\| `(\w+Pipeline)`.*\| (.+) \|$", page, flags=re.MULTILINE))
    tested = {}
    for case in CASES:
        guided = case in GUIDED
        half = case.kept if guided else "no guidance"
        name = type(case.build()).__name__
        tested[name] = half if guided else tested.get(name, half)
    assert rows == tested


def test_the_tables_of_pipelines_are_those_of_the_rows():
    texts = [page.read_text() for page in tables.PAGES]
    # The last one is held against pipelines in test_ecosystem.py: they would have to be made here.
    found = [name for text in texts for name in re.findall(r"<!-- table: (\w+) -->", text)]
    assert sorted(found) == sorted([*tables.TABLES, "hosts"])
    made = {name: make for name, make in tables.TABLES.items() if name not in tables.NEED_ALL or tables.all_are_there()}
    for text in texts:
        assert tables.rewritten(text, made) == text, "run `nox -s tables`"


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    begin = page.index("## Against the best plain run")
    measured = cells(page[begin : page.index("\n## ", begin)])
    shown = cells(readme[readme.index("| 25 steps | cost in full steps") :].split("\n\n")[0])[2:]
    gated = [row for row in shown if "apply_tgate" in row[0]]
    assert len(gated) == 3
    # The columns of the page: cost, distance, and how far ahead of the best plain run.
    found = {(row[0], row[2], row[3]): float(row[5].removesuffix(" dB")) for row in measured[2:]}
    for name, cost, distance, best in gated:
        ahead = found[name.split(",")[0], cost, distance]
        assert abs(float(distance.removesuffix(" dB")) - ahead - float(best.removesuffix(" dB"))) < 0.15


def test_the_figures_of_a_section_are_those_of_its_data():
    sections = re.split(r"^## ", (ROOT / "docs/benchmarks.md").read_text(), flags=re.MULTILINE)
    checked = 0
    for section in sections:
        files = re.findall(r"\]\((data/[\w-]+\.csv)\)", section)
        text = "".join((ROOT / "docs" / file).read_text() for file in files)
        known = [float(number) for number in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?![\w])", text)]
        for row in cells(section)[2:] if files else ():
            for shown in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?!\w)", " | ".join(row[1:])):
                half = 0.5 * 10 ** -len(shown.partition(".")[2])
                assert any(abs(abs(number) - float(shown)) <= half + 1e-9 for number in known), (row, shown)
                checked += 1
    assert checked > 100


def cells(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
