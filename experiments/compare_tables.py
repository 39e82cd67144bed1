"""Tables of groups of runs, printed so that nothing is cut off, and as Markdown."""

import textwrap
from collections.abc import Sequence

from rich.console import Console

from robustjax.training import report

Row = Sequence[str]


def print_groups(title: str, columns: Sequence[str], rows: Sequence[Row], *, of_group: int) -> None:
    """Prints one table if it fits, else a table of the groups and tables of what was measured.

    Args:
      title: of the (first) table.
      columns: headings: number of the group, what is said of it, the checkpoint, measures.
      rows: of cells; those of a group follow each other and begin with the same cells.
      of_group: how many of the first columns are of the whole group.
    """
    broken = [[cell.replace(" [", "\n[") for cell in row] for row in rows]
    for shown in (rows, broken):  # intervals in lines of their own are narrower
        if _width(columns, shown) <= _available():
            _print(title, columns, _without_repeats(shown, of_group))
            return
    groups = list(dict.fromkeys(tuple(row[:of_group]) for row in rows))
    for part, cells in _parts(columns[:of_group], groups, keys=1):
        _print("Groups", part, cells)
    measured = [[row[0], *row[of_group:]] for row in broken]
    for part, cells in _parts([columns[0], *columns[of_group:]], measured, keys=2):
        _print(title, part, _without_repeats(cells, 1))


def markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """The same table as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |\n" for line in lines)


def _parts(
    columns: Sequence[str], rows: Sequence[Row], *, keys: int
) -> list[tuple[list[str], list[list[str]]]]:
    """Tables that fit, each with the first ``keys`` columns and some of the others."""
    parts: list[list[int]] = []
    for i in range(keys, len(columns)):
        wider = [*(parts[-1] if parts else range(keys)), i]
        if parts and _width(*_of_columns(columns, rows, wider)) > _available():
            parts.append([*range(keys), i])
        else:
            parts[-1:] = [wider]
    return [_of_columns(columns, rows, part) for part in parts or [list(range(keys))]]


def _of_columns(
    columns: Sequence[str], rows: Sequence[Row], chosen: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    return [columns[i] for i in chosen], [[row[i] for i in chosen] for row in rows]


def _print(title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    report.print_table(title, _headings(columns, rows), rows)


def _headings(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """In lines that are no longer than the cells below, as far as words allow."""
    found = []
    for column, *cells in zip(columns, *rows, strict=True):
        words = [*column.split(), *(line for cell in cells for line in cell.splitlines())]
        width = max(map(len, words), default=1)
        wrapped = textwrap.wrap(column, width, break_long_words=False, break_on_hyphens=False)
        found.append("\n".join(wrapped))
    return found


def _width(columns: Sequence[str], rows: Sequence[Row]) -> int:
    """Of the printed table."""
    table = [_headings(columns, rows), *rows]
    longest = [
        max((len(line) for cell in cells for line in cell.splitlines()), default=0)
        for cells in zip(*table, strict=True)
    ]
    return sum(longest) + 3 * len(longest) + 1


def _without_repeats(rows: Sequence[Row], columns: int) -> list[list[str]]:
    """Rows whose first columns are empty where they are those of the row above."""
    return [
        [*([""] * columns), *row[columns:]]
        if i and rows[i - 1][:columns] == row[:columns]
        else list(row)
        for i, row in enumerate(rows)
    ]


def _available() -> int:
    console = Console()
    return console.width if console.is_terminal else 160  # as report.print_table
