"""The table of a data set: one row per image, read from a CSV file or from a known folder layout.

The format and the layouts are described in docs/manifest.md.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from anatomaly.data import layouts
from anatomaly.errors import ManifestError, OutputError
from anatomaly.files import file_digest
from anatomaly.types import Sample, Split

COLUMNS = ("path", "task", "split", "label", "frame", "mask", "patient_id", "sha256")
_LABEL_WORDS = {0: "normal", 1: "anomalous", None: ""}


@dataclass(frozen=True)
class Manifest:
    """Rows of a data set, and where they were read.

    Attributes:
        samples: The rows, in a fixed order.
        source: File or folder the rows were read from.

    Example:
        >>> rows = (Sample(Path("a.png"), "brain", "train", 0), Sample(Path("b.png"), "liver", "test", 1))
        >>> manifest = Manifest(rows, Path("cases.csv"))
        >>> manifest.tasks, len(manifest.select(split="test"))
        (('brain', 'liver'), 1)
    """

    samples: tuple[Sample, ...]
    source: Path

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, sorted."""
        return tuple(sorted({sample.task for sample in self.samples}))

    def select(
        self,
        *,
        task: str | Sequence[str] | None = None,
        split: Split | None = None,
        label: Literal[0, 1] | None = None,
    ) -> Manifest:
        """Keep the rows that match every given condition; None means any.

        Args:
            task: One name or several.
            split: "train", "val" or "test".
            label: 0 normal, 1 anomalous; rows of unknown label match neither.

        Returns:
            A manifest of the same source, possibly empty.

        Raises:
            ManifestError: A task that has no row at all, such as a misspelt name.
        """
        names = None if task is None else {task} if isinstance(task, str) else set(task)
        unknown = sorted((names or set()).difference(self.tasks))
        if unknown:
            raise ManifestError(
                f"{self.source}: no task {unknown[0]!r}, the tasks are {', '.join(self.tasks) or 'none'}."
            )
        kept = (
            sample
            for sample in self.samples
            if (names is None or sample.task in names)
            and (split is None or sample.split == split)
            and (label is None or sample.label == label)
        )
        return Manifest(tuple(kept), self.source)

    def with_hashes(self) -> Manifest:
        """Fill in missing sha256 digests; every file is read at most once.

        Raises:
            ManifestError: A file cannot be opened.
        """
        digests: dict[Path, str] = {}
        for sample in self.samples:
            if sample.sha256 is None and sample.path not in digests:
                digests[sample.path] = _file_digest(sample.path)
        return Manifest(
            tuple(s if s.sha256 is not None else replace(s, sha256=digests[s.path]) for s in self.samples), self.source
        )

    def fingerprint(self) -> str:
        """Digest of what the table says, independent of row order, file names and where the files lie.

        Returns:
            sha256 hex over the sorted (task, split, label, frame, patient_id, file sha256) of all rows.

        Raises:
            ManifestError: A file without a digest cannot be opened.
        """
        rows = sorted(
            json.dumps([s.task, s.split, s.label, s.frame, s.patient_id, s.sha256]) for s in self.with_hashes()
        )
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def load_manifest(path: Path, *, task: str | None = None) -> Manifest:
    """Read a data set: a CSV file, a Uni-Medical meta.json, or a folder in one of the known layouts.

    A folder is read as the first of these that fits: it holds manifest.csv; it holds meta.json; it holds train, val or
    test folders (BMAD, MVTec, class folders); its subfolders are such data sets, one task each; it holds images, which
    become unlabelled test images.

    Args:
        path: File or folder.
        task: Name of the task where the source does not name it (a CSV without task column, a single folder); by
            default the folder's name.

    Returns:
        A manifest of at least one row; every file in it exists.

    Raises:
        ManifestError: Nothing found, a malformed row, missing files, a row given twice, or an anomalous training image.
    """
    path = Path(path)
    if not path.exists():
        raise ManifestError(f"{path}: no such file or folder.")
    samples = _read_folder(path, task) if path.is_dir() else _read_file(path, task)
    _refuse_missing(samples, path)
    _refuse_repeated(samples, path)
    _refuse_anomalous_training(samples, path)
    return Manifest(tuple(samples), path)


def write_csv(manifest: Manifest, path: Path) -> None:
    """Write a manifest that `load_manifest` reads back; files below the CSV's folder get relative paths.

    Args:
        manifest: The rows; hashes are written where known.
        path: The CSV file, replaced if it exists.

    Raises:
        OutputError: The file cannot be written.
    """
    path = Path(path)

    def relative(file: Path) -> str:
        absolute, folder = Path(os.path.abspath(file)), Path(os.path.abspath(path.parent))  # noqa: PTH100 keeps symlinks
        return (absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute).as_posix()

    try:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(COLUMNS)
            for s in manifest:
                mask = "" if s.mask is None else relative(s.mask)
                label = _LABEL_WORDS[s.label]
                writer.writerow((relative(s.path), s.task, s.split, label, s.frame, mask, s.patient_id, s.sha256))
    except OSError as err:
        raise OutputError(f"{path}: cannot be written ({err.strerror}).") from err


def _read_file(path: Path, task: str | None) -> list[Sample]:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return layouts.read_meta_json(path)
    if suffix == ".csv":
        return _read_csv(path, task)
    raise ManifestError(f"{path}: got a {suffix or 'suffix-less'} file, expected a .csv, a meta.json or a folder.")


def _read_folder(folder: Path, task: str | None) -> list[Sample]:
    if _is_data_set(folder):
        return _read_data_set(folder, task)
    children = [child for child in layouts.subfolders(folder) if _is_data_set(child)]
    if not children:
        return layouts.read_plain(folder, task or _folder_name(folder))
    strays = [child for child in layouts.subfolders(folder) if child not in children and layouts.list_images(child)]
    if strays:
        raise ManifestError(
            f"{folder}: {children[0].name} is a data set but {strays[0].name} is only images; "
            "expected all folders in one of the known layouts. Move it, or load the data sets one by one."
        )
    return [sample for child in children for sample in _read_data_set(child, None)]


def _is_data_set(folder: Path) -> bool:
    return (folder / "manifest.csv").is_file() or (folder / "meta.json").is_file() or layouts.has_splits(folder)


def _read_data_set(folder: Path, task: str | None) -> list[Sample]:
    if (folder / "manifest.csv").is_file():
        return _read_csv(folder / "manifest.csv", task)
    if (folder / "meta.json").is_file():
        return layouts.read_meta_json(folder / "meta.json")
    return layouts.read_splits(folder, task or _folder_name(folder))


def _folder_name(folder: Path) -> str:
    return folder.resolve().name or "images"


def _read_csv(path: Path, task: str | None) -> list[Sample]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise ManifestError(f"{path}: is not UTF-8. Save the table as UTF-8 CSV.") from err
    except OSError as err:
        raise ManifestError(f"{path}: cannot be read ({err.strerror}).") from err
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    columns = [name.strip().lower() for name in reader.fieldnames or []]
    if "path" not in columns:
        raise ManifestError(f"{path}: has no column path, got {', '.join(columns) or 'an empty file'}.")
    reader.fieldnames = columns
    default_task = task or _folder_name(path.parent)
    samples = [_csv_sample(row, path, default_task, f"{path}: row {reader.line_num}") for row in reader]
    if not samples:
        raise ManifestError(f"{path}: has no rows.")
    return samples


def _csv_sample(row: dict[str, str | None], csv_file: Path, default_task: str, where: str) -> Sample:
    if None in row or None in row.values():
        raise ManifestError(f"{where}: has more or fewer cells than the header. Quote cells that hold the separator.")
    cells = {column: (cell or "").strip() for column, cell in row.items()}
    if not cells["path"]:
        raise ManifestError(f"{where}: path is empty.")
    mask, label, split = cells.get("mask") or cells.get("mask_path"), cells.get("label"), cells.get("split")
    return Sample(
        path=csv_file.parent / cells["path"],
        task=cells.get("task") or default_task,
        split=layouts.split_of(split, where) if split else "test",
        label=layouts.label_of(label, where) if label else None,
        frame=_frame(cells.get("frame", ""), where),
        mask=csv_file.parent / mask if mask else None,
        patient_id=cells.get("patient_id") or None,
        sha256=_digest(cells.get("sha256", ""), where),
    )


def _frame(cell: str, where: str) -> int | None:
    if not re.fullmatch(r"(\d+(\.0)?)?", cell, re.ASCII):  # pandas writes 3.0 where other rows have no frame
        raise ManifestError(f"{where}: frame is {cell!r}, expected 0, 1, 2, ... or nothing.")
    return int(float(cell)) if cell else None


def _digest(cell: str, where: str) -> str | None:
    if not re.fullmatch(r"([0-9a-f]{64})?", cell.lower()):
        raise ManifestError(f"{where}: sha256 is not 64 hexadecimal digits.")
    return cell.lower() or None


def _file_digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as err:
        raise ManifestError(f"{path}: cannot be read ({err.strerror}).") from err


def _refuse_missing(samples: Sequence[Sample], source: Path) -> None:
    files = dict.fromkeys(file for s in samples for file in (s.path, s.mask) if file is not None)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ManifestError(
            f"{source}: {len(missing)} of {len(files)} files do not exist, the first is {missing[0]}. "
            f"Relative paths start at the folder of the table."
        )


def _refuse_repeated(samples: Sequence[Sample], source: Path) -> None:
    seen: set[tuple[str, int | None]] = set()
    for sample in samples:
        key = (os.path.normpath(sample.path), sample.frame)
        if key in seen:
            raise ManifestError(f"{source}: {sample.name} is listed twice. Keep one row per image (path and frame).")
        seen.add(key)


def _refuse_anomalous_training(samples: Sequence[Sample], source: Path) -> None:
    anomalous = [s for s in samples if s.split == "train" and s.label == 1]
    if anomalous:
        raise ManifestError(
            f"{source}: {len(anomalous)} training images are anomalous, the first is {anomalous[0].name}. "
            "Training sees normal images only: move them to val or test, or correct their label."
        )
