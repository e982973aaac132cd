"""One record for every table that people or programs read, and its four renderings: terminal, Markdown, HTML, CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What it is about, in a line.
        columns: Heads.
        rows: Cells, one per column: text as it is to be read, or numbers, of which people see three digits and programs
            all; None and NaN are empty.
        note: How to read it, or empty.
        bold: (row, column) of the cells to stress, from 0.

    Example:
        >>> table = Table("Speed", ("what", "seconds"), [("one", 0.12345), ("two", None)], bold={(0, 1)})
        >>> print(table.markdown())
        | what | seconds |
        | --- | --- |
        | one | **0.123** |
        | two |  |
        >>> table.csv().split()
        [b'what,seconds', b'one,0.12345', b'two,']
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    bold: Collection[tuple[int, int]] = ()

    def print(self) -> None:
        """Show it on standard output, with its note; wide where that is no terminal."""
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(title_justify="left", caption_justify="left")  # Text: a file name may look like rich's markup
        grid.title = Text(self.title, "table.title") if self.title else None
        grid.caption = Text(self.note, "table.caption") if self.note else None
        for column in self.columns:
            grid.add_column(Text(column), no_wrap=True)
        for row in self._read():
            grid.add_row(*(Text(cell, "bold" if bold else "") for cell, bold in row))
        console = Console()
        console.print(grid) if console.is_terminal else Console(width=200).print(grid)

    def markdown(self) -> str:
        """The columns and rows, without title and note."""
        rows = [[f"**{cell}**" if bold else cell for cell, bold in row] for row in self._read()]
        lines = [[cell.replace("|", "\\|") for cell in line] for line in (self.columns, *rows)]
        lines.insert(1, ["---"] * len(self.columns))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """A `<table>` that scrolls by itself, the title as its caption, the note below."""
        head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in self.columns)
        rows = ("".join(f"<td>{_html(*cell)}</td>" for cell in row) for row in self._read())
        note = f'<p class="note">{escaped(self.note)}</p>' if self.note else ""
        return (
            f'<div class="scroll"><table><caption>{escaped(self.title)}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>{note}"
        )

    def csv(self) -> bytes:
        """A head and the rows, every number with all its digits."""
        return csv_bytes([self.columns, *self.rows])

    def _read(self) -> list[list[tuple[str, bool]]]:
        """Every cell as people read it, and whether it is bold."""
        return [
            [(_text(cell), (number, place) in self.bold) for place, cell in enumerate(row)]
            for number, row in enumerate(self.rows)
        ]


def csv_bytes(rows: Iterable[Iterable[object]]) -> bytes:
    r"""Rows of cells as CSV in UTF-8, lines ending in \n; None and NaN are empty, an undecodable name stays visible."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([None if _is_nan(cell) else cell for cell in row] for row in rows)
    return stream.getvalue().encode(errors="backslashreplace")


def escaped(value: object) -> str:
    """Any text for HTML; a file name that is not valid Unicode stays readable."""
    return escape(str(value).encode(errors="backslashreplace").decode())


def mean_sd(mean: float, sd: float) -> str:
    """`0.750 ± 0.021`, `0.750` where there is no deviation, `–` where there is no mean.

    Args:
        mean: Of some values, or NaN.
        sd: Their standard deviation, NaN of a single one.
    """
    if math.isnan(mean):
        return "–"
    return f"{mean:.3f}" if math.isnan(sd) or sd < 5e-7 else f"{mean:.3f} ± {sd:.3f}"


def interval_text(low: float, high: float, *, sign: str = "-") -> str:
    """`0.500 to 1.000`, or `–` where there is no interval.

    Args:
        low: Its lower end, or NaN.
        high: Its upper end, or NaN.
        sign: "+" shows the sign of positive numbers too.

    Example:
        >>> interval_text(-0.25, 0.5, sign="+")
        '-0.250 to +0.500'
    """
    return "–" if math.isnan(low) or math.isnan(high) else f"{low:{sign}.3f} to {high:{sign}.3f}"


def _html(text: str, bold: bool) -> str:
    return f"<b>{escaped(text)}</b>" if bold else escaped(text)


def _text(cell: object) -> str:
    if cell is None or _is_nan(cell):
        return ""
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _is_nan(cell: object) -> bool:
    return cell != cell  # nothing else is not itself
