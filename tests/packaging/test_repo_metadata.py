"""What a public host shows beside the README."""

import re
import tomllib

import pytest
import yaml

from tests.support.paths import ROOT


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_citation_is_that_of_the_readme():
    paper = read("CITATION.cff")["preferred-citation"]
    (entry,) = re.findall(r"^```bibtex\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    entry = entry.replace('{\\"u}', "ü")
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for part in (authors, paper["title"], paper["journal"], str(paper["year"])):
        assert f"{{{part}}}" in entry
    assert paper["url"].endswith(paper["identifiers"][0]["value"].removeprefix("arXiv:"))


def commands(workflow):
    jobs = read(f".github/workflows/{workflow}.yml")["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize(
    ("workflow", "expected"),
    [("ci", {"tests", "coverage", "package"}), ("newest", {"newest"}), ("publish", {"package"})],
)
def test_the_public_host_runs_sessions_that_there_are(workflow, expected):
    sessions = re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), flags=re.MULTILINE)
    named = {name for line in commands(workflow) for name in re.findall(r"nox -s (\w+)", line)}
    assert named == expected
    assert named <= set(sessions)


def test_the_public_host_runs_what_ci_runs_and_every_python_that_is_promised():
    assert "bash .ci/run" in commands("ci")
    jobs = read(".github/workflows/ci.yml")["jobs"]
    (first,) = (step["with"]["python-version"] for step in jobs["tests"]["steps"] if "with" in step)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert [first, *jobs["pythons"]["strategy"]["matrix"]["python"]] == promised
    assert project["requires-python"] == f">={first}"


def test_only_the_job_that_publishes_may_and_it_builds_nothing():
    jobs = read(".github/workflows/publish.yml")["jobs"]
    assert "permissions" not in jobs["build"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert not [step for step in jobs["publish"]["steps"] if "run" in step]


def test_every_file_in_changes_has_a_type_that_the_changelog_has():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    types = "|".join(kind["directory"] for kind in project["tool"]["towncrier"]["type"])
    for file in (ROOT / "changes").iterdir():
        assert file.name == "README.md" or re.fullmatch(rf"(\+[\w-]+|\d+)\.({types})\.md", file.name), file.name


def test_forms_for_issues_ask_for_what_is_needed():
    for file in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")):
        form = read(file)
        assert form["name"]
        assert form["description"]
        names = [part["id"] for part in form["body"]]
        assert len(names) == len(set(names)) >= 3
        assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_no_test_module_imports_another():
    for file in (ROOT / "tests").rglob("test_*.py"):
        imported = re.findall(r"^ *(?:from|import) .*\btest_\w+", file.read_text(), flags=re.MULTILINE)
        assert not imported, file
