"""Tables that fit a terminal, and the same in a file."""

import csv
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table


def blocks(widths: Sequence[int], room: int) -> list[list[int]]:
    """The columns in blocks that fit side by side: the first column leads every block, and none is ever cut."""
    # A column has a border and two blanks.
    left = room - widths[0] - 4
    found: list[list[int]] = [[]]
    for column, width in enumerate(widths[1:], 1):
        if found[-1] and sum(widths[each] + 3 for each in found[-1]) + width + 3 > left:
            found.append([])
        found[-1].append(column)
    return [[0, *columns] for columns in found]


def print_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column names the rows; columns that do not fit go into another table below it."""
    widths = [max(cell_len(line[place]) for line in (headings, *rows)) for place in range(len(headings))]
    # Names may go on in the next line, figures are never as long.
    widths[0] = min(widths[0], console.width // 2)
    widths[1:] = [min(width, console.width - widths[0] - 7) for width in widths[1:]]
    for number, columns in enumerate(blocks(widths, console.width)):
        table = Table(title="" if number else title)
        for column in columns:
            right = "right" if column else "left"
            table.add_column(headings[column], justify=right, overflow="fold", min_width=widths[column])
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        console.print(table, markup=False, highlight=False)


def check_output(file: Path | None) -> None:
    """Refuse a file that is neither kind of table before the work begins."""
    if file is not None and file.suffix not in (".csv", ".md"):
        raise typer.BadParameter(f"output={str(file)!r} is neither CSV nor Markdown: pass a name with .csv or .md")


def write_table(file: Path, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write CSV or Markdown, by the file's name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([headings, *rows])
        return
    lines = [headings, ["---"] * len(headings), *rows]
    text = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
    file.write_text(text)
