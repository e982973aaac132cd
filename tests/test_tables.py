"""One table, four renderings; nothing in a cell is taken for markup, and CSV loses no digit."""

import csv
import io
import os
import sys

import numpy as np
import pytest

from anatomaly.tables import Table, csv_bytes, interval_text, mean_sd

NAN = float("nan")
TABLE = Table(
    "Tasks <1>", ["task", "AUROC"], [["[red]a|b[/red]", 0.123456], ["<i>&", NAN], ["c", None]], "A & B.", {(0, 1)}
)


def test_csv_holds_every_digit_and_leaves_unknown_cells_empty():
    rows = list(csv.reader(io.StringIO(TABLE.csv().decode(), newline="")))
    assert rows == [["task", "AUROC"], ["[red]a|b[/red]", "0.123456"], ["<i>&", ""], ["c", ""]]
    assert csv_bytes([[np.float64(0.1), np.float32("nan"), 1, "x,y"]]) == b'0.1,,1,"x,y"\n'


def test_markdown_rounds_numbers_and_keeps_its_columns():
    assert TABLE.markdown().splitlines() == [
        "| task | AUROC |",
        "| --- | --- |",
        r"| [red]a\|b[/red] | **0.123** |",
        "| <i>& |  |",
        "| c |  |",
    ]


def test_html_is_escaped():
    page = TABLE.html()
    assert "<caption>Tasks &lt;1&gt;</caption>" in page
    assert "<td>[red]a|b[/red]</td><td><b>0.123</b></td>" in page
    assert "<td>&lt;i&gt;&amp;</td><td></td>" in page
    assert page.endswith('<p class="note">A &amp; B.</p>')


def test_a_terminal_shows_cells_as_they_are(capsys):
    TABLE.print()
    printed = capsys.readouterr().out
    for text in ("Tasks <1>", "[red]a|b[/red]", "0.123", "<i>&", "A & B."):
        assert text in printed
    assert "nan" not in printed


@pytest.mark.skipif(sys.platform != "linux", reason="file names are byte strings on Linux only")
def test_a_file_name_that_is_not_unicode_stays_readable():
    table = Table("", ["file"], [[os.fsdecode(b"scan\xff.png")]])
    assert table.csv() == b"file\nscan\\udcff.png\n"
    assert "scan\\udcff.png" in table.html()


@pytest.mark.parametrize(
    ("mean", "sd", "shown"),
    [(0.75, 0.02, "0.750 ± 0.020"), (0.75, NAN, "0.750"), (0.75, 1e-8, "0.750"), (NAN, NAN, "–")],
)
def test_a_deviation_or_mean_of_nothing_is_not_shown(mean, sd, shown):
    assert mean_sd(mean, sd) == shown


def test_an_interval_that_is_not_there_is_a_dash():
    assert interval_text(0.25, 1.0) == "0.250 to 1.000"
    assert interval_text(0.25, NAN) == interval_text(NAN, NAN, sign="+") == "–"
