"""What the scripts print can be read in a terminal of 80 columns and in a pipe."""

import csv
import io
import re

import pytest
import typer
from rich.console import Console

from examples.benchmarks.tables import blocks, check_output, print_table, write_table


def printed(title, headings, rows, width):
    stream = io.StringIO()
    print_table(Console(file=stream, width=width), title, headings, rows)
    return stream.getvalue()


def table_of(columns, places):
    """Figures of so many places, each another one."""
    headings = ["", *(f"column {number}" for number in range(columns))]
    rows = [[f"row {row}", *(f"{10**places + 100 * row + n}" for n in range(columns))] for row in range(3)]
    return headings, rows


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("columns", [1, 5, 9, 16])
@pytest.mark.parametrize("places", [2, 9, 20])
def test_no_figure_is_cut_and_no_line_too_long(width, columns, places):
    headings, rows = table_of(columns, places)
    text = printed("a title", headings, rows, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    words = re.findall(r"\d{3,}", text)
    assert sorted(words) == sorted(figure for row in rows for figure in row[1:])
    # Every block of columns says which row is which.
    assert text.count("row 2") == text.count("row 0") >= 1


def test_what_fits_is_one_table_and_what_does_not_goes_on_below():
    assert blocks([10, 5, 5, 5], 80) == [[0, 1, 2, 3]]
    # 10 + 4 for the first column, 5 + 3 for each of the others.
    assert blocks([10, 5, 5, 5], 38) == [[0, 1, 2, 3]]
    assert blocks([10, 5, 5, 5], 37) == [[0, 1, 2], [0, 3]]
    assert blocks([10, 50, 5], 30) == [[0, 1], [0, 2]]


def test_a_long_name_goes_on_in_the_next_line():
    name = "examples/models/" + "of-a-name-without-end/" * 5
    text = printed("", ["", "seconds"], [[name, "1.234"]], 80)
    assert re.sub(r"[^\w/-]", "", text[text.index("examples") :].replace("1.234", "")) == name


def test_a_long_name_in_another_column_leaves_the_figures_whole():
    name = "examples/models/" + "of-a-name-without-end/" * 5
    text = printed("", ["", "1.", "2."], [["model", name, "sd15"], ["seconds", "1.234", "56.78"]], 80)
    assert max(map(len, text.splitlines())) <= 80
    assert {"1.234", "56.78"} <= set(text.split())


def test_names_in_brackets_are_no_markup():
    assert "[red]" in printed("", ["", "a"], [["[red]", "[1]"]], 80)


def test_csv_and_markdown_by_the_name_of_the_file(tmp_path):
    headings, rows = ["", "a|b"], [["one", "1,5"], ["two", "2"]]
    write_table(tmp_path / "new" / "table.csv", headings, rows)
    with (tmp_path / "new" / "table.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [headings, *rows]
    write_table(tmp_path / "table.md", headings, rows)
    lines = ["|  | a\\|b |", "| --- | --- |", "| one | 1,5 |", "| two | 2 |"]
    assert (tmp_path / "table.md").read_text().splitlines() == lines
    check_output(None)
    check_output(tmp_path / "table.md")
    with pytest.raises(typer.BadParameter, match=r"pass a name with \.csv or \.md"):
        check_output(tmp_path / "table.xlsx")
