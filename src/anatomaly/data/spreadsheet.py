"""Cells of a table file as Excel, pandas and text editors leave it, and the files that its path cells mean.

UTF-8 with or without byte order mark, UTF-16 (Excel's "Unicode text"), or a Windows code page; separated by comma,
semicolon or tab; a line `sep=;`, empty rows and separators at the end of a row are passed over.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from anatomaly.errors import ManifestError

#: Suffixes of files that are read as a table.
TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".txt"})


class Row(NamedTuple):
    """One row: the line of the file it ends on, counted from 1, and its cells by column name, in lower case."""

    number: int
    cells: dict[str, str]


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a table below its header line; cells are stripped, rows without any content are passed over.

    Raises:
        ManifestError: The file cannot be opened or is no text table, has no column `path`, or a row has more or fewer
            cells than the header.
    """
    text, is_bytes = _text(path)
    lines = io.StringIO(text, newline="").readlines()
    separator = None
    if lines and (match := re.fullmatch(r'"?sep=(.)"?[;,\t]*\s*', lines[0], re.IGNORECASE)):
        separator = match[1]
    first = 0 if separator is None else 1
    start = next((i for i in range(first, len(lines)) if re.search(r'[^\s;,"]', lines[i])), len(lines))
    lines = lines[start:]
    reader = csv.reader(lines, delimiter=separator or _separator(lines[0] if lines else ""))
    columns: list[str] = []
    try:
        for cells in reader:
            number = start + reader.line_num
            row = [_decode(cell).strip() if is_bytes else cell.strip() for cell in cells]
            if not columns:
                columns = [name.lower() for name in row]
                if "path" not in columns:
                    raise ManifestError(f"{path}: has no column path, got {', '.join(filter(None, columns))}.")
            elif any(row):
                if len(row) < len(columns) or any(row[len(columns) :]):
                    raise ManifestError(
                        f"{path}: row {number}: has more or fewer cells than the header. "
                        "Quote cells that hold the separator."
                    )
                yield Row(number, {name: cell for name, cell in zip(columns, row, strict=False) if name})
    except csv.Error as err:
        raise ManifestError(f"{path}: row {start + reader.line_num}: cannot be read as a table ({err}).") from err
    if not columns:
        raise ManifestError(f"{path}: has no column path, got an empty file.")


def locate(folder: Path, cell: str) -> Path:
    """The file that a path cell means: as it stands, else with slashes for back slashes or in another spelling of ü.

    Args:
        folder: Where relative paths start.
        cell: Not empty.

    Returns:
        The first reading that is a file; the plain one if none is.
    """
    plain = folder / cell
    if _is_file(plain):
        return plain
    for text in (cell, cell.replace("\\", "/")):
        spellings = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
        for spelling in (text, *spellings, _as_bytes(text, "cp1252"), _as_bytes(text, "utf-8")):
            if spelling != cell and _is_file(folder / spelling):
                return folder / spelling
    return plain


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 False in a locked folder, where pathlib raises


def _as_bytes(text: str, encoding: str) -> str:
    """A name as Python gives it where the file system holds these bytes and speaks another encoding."""
    try:
        return os.fsdecode(text.encode(encoding, errors="surrogateescape"))
    except UnicodeError:
        return text


def _text(path: Path) -> tuple[str, bool]:
    """The text of a file, and whether its characters are still bytes: a table may mix UTF-8 with other names."""
    try:
        content = path.read_bytes()
    except OSError as err:
        raise ManifestError(f"{path}: cannot be read ({err.strerror}).") from err
    wide = next((name for mark, name in _WIDE.items() if content.startswith(mark)), None)
    if wide is None and b"\0" not in content:
        return content.removeprefix(b"\xef\xbb\xbf").decode("latin-1"), True
    try:
        return content.decode(wide or ("utf-16-le" if content[1:2] == b"\0" else "utf-16-be")).lstrip("\ufeff"), False
    except UnicodeError as err:
        raise ManifestError(f"{path}: is no text table. Save it as CSV in UTF-8.") from err


_WIDE = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def _decode(cell: str) -> str:
    """Characters of a cell that was read byte by byte: UTF-8, else what Windows writes, else Latin-1."""
    if cell.isascii():
        return cell
    raw = cell.encode("latin-1")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
        return cell if "\ufffd" in text else text


def _separator(header: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", header)
    return max(",;\t", key=unquoted.count)
