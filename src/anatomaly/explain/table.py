"""The table of an explanation, and what both kinds of it say about an image."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from anatomaly.data.loading import load_batches
from anatomaly.errors import ConfigError
from anatomaly.files import Appender, write_whole
from anatomaly.tables import csv_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from anatomaly.data.loading import Loaded
    from anatomaly.types import Preprocessing, Sample

_LABELS = {0: "normal", 1: "anomalous", None: ""}


class RowTable:
    """A CSV file whose rows are on disk before the next image is looked at; a failed write leaves no half row.

    Args:
        path: The file; its folder is made if missing.
        columns: Its head.

    Raises:
        OutputError: It cannot be written, or exists already.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns, self.rows = path, tuple(columns), 0
        self._file = Appender([path])
        self._file.append(csv_bytes([columns]))

    def __enter__(self) -> RowTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of one image, all or none; NaN, None and missing cells are empty."""
        cells = csv_bytes([row.get(column) for column in self.columns] for row in rows)
        self._file.append(cells, kept=self._kept())
        self.rows += len(rows)

    def figure(self, stem: str, content: bytes) -> str:
        """Write a PNG to the folder named like the table and return its path relative to the table's folder."""
        name = f"{self.path.stem}/{stem}.png"
        write_whole(self.path.parent / name, content, kept=self._kept())
        return name

    def _kept(self) -> str:
        return f"The {self.rows} rows written so far are complete."


def stem_of(sample: Sample, number: int) -> str:
    """A file name of its own for every image of a run: its number first."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", sample.name).strip("_")[:60]
    return f"{number:05d}_{plain}"


def facts_of(sample: Sample) -> dict[str, Any]:
    """The cells that say which image a row is about; the patient's id stays out of them."""
    return {"path": str(sample.path), "frame": sample.frame, "task": sample.task, "label": _LABELS[sample.label]}


def title_of(sample: Sample) -> tuple[str, ...]:
    """Two lines for a figure: the file, then task and label."""
    return (sample.name, " ".join(part for part in (sample.task, _LABELS[sample.label]) if part))


def batches(samples: Iterable[Sample], preprocessing: Preprocessing, batch_size: int) -> Iterator[list[Loaded]]:
    """`load_batches`, refusing a batch size below 1 with a ConfigError."""
    if batch_size < 1:
        raise ConfigError(f"batch_size: got {batch_size}, expected at least 1.")
    return load_batches(samples, preprocessing, batch_size=batch_size)
