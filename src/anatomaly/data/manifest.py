"""The table of a data set: one row per image, read from a CSV file or from a known folder layout.

The format and the layouts are described in docs/manifest.md.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from anatomaly.data import layouts, spreadsheet, words
from anatomaly.data.layouts import Rows
from anatomaly.data.listing import LeftOut, list_files, subfolders
from anatomaly.errors import ManifestError, OutputError
from anatomaly.files import file_digest
from anatomaly.types import Sample, Split

logger = logging.getLogger(__name__)

COLUMNS = ("path", "task", "split", "label", "frame", "mask", "patient_id", "sha256")
_LABEL_WORDS = {0: "normal", 1: "anomalous", None: ""}


@dataclass(frozen=True)
class Manifest:
    """Rows of a data set, and where they were read.

    Attributes:
        samples: The rows, in a fixed order.
        source: File or folder the rows were read from.
        left_out: How many files and folders below the source became no row, by reason; `listing.describe` puts it in
            words.

    Example:
        >>> rows = (Sample(Path("a.png"), "brain", "train", 0), Sample(Path("b.png"), "liver", "test", 1))
        >>> manifest = Manifest(rows, Path("cases.csv"))
        >>> manifest.tasks, len(manifest.select(split="test"))
        (('brain', 'liver'), 1)
    """

    samples: tuple[Sample, ...]
    source: Path
    left_out: LeftOut = field(default_factory=dict, compare=False)

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
        return replace(self, samples=tuple(kept))

    def with_hashes(self) -> Manifest:
        """Fill in missing sha256 digests; every file is read at most once.

        Raises:
            ManifestError: A file cannot be opened.
        """
        digests: dict[Path, str] = {}
        for sample in self.samples:
            if sample.sha256 is None and sample.path not in digests:
                digests[sample.path] = _file_digest(sample.path)
        hashed = (s if s.sha256 is not None else replace(s, sha256=digests[s.path]) for s in self.samples)
        return replace(self, samples=tuple(hashed))

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


def load_manifest(path: Path, *, task: str | None = None, normal: bool = False) -> Manifest:
    """Read a data set: a CSV file, a Uni-Medical meta.json, or a folder in one of the known layouts.

    A folder is read as the first of these that fits: it holds manifest.csv; it holds meta.json; it holds train, val or
    test folders (BMAD, MVTec, class folders); its subfolders are such data sets, one task each; it holds images, which
    become unlabelled test images.

    Args:
        path: File or folder.
        task: Name of the task where the source does not name it (a CSV without task column, a single folder); by
            default the folder's name.
        normal: Images of a folder that is no data set are normal ones to train on, not images to judge; see
            `layouts.read_normals`.

    Returns:
        A manifest of at least one row; every file in it exists.

    Raises:
        ManifestError: Nothing found, a malformed row, missing files, a row given twice, or an anomalous training image.
    """
    path = Path(path)
    is_folder = _can_be_opened(path)
    rows, listed = _read_folder(path, task, normal) if is_folder else (_read_file(path, task), True)
    if listed:  # what was found in a folder is there, and once
        _refuse_missing(rows.samples, path)
        _refuse_repeated(rows.samples, path)
    _refuse_anomalous_training(rows.samples, path)
    return Manifest(tuple(rows.samples), path, rows.left_out)


def _can_be_opened(path: Path) -> bool:
    """Refuse a file or folder that is not there or locked; True for a folder."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
        if is_folder:
            os.scandir(path).close()
    except FileNotFoundError as err:
        raise ManifestError(f"{path}: no such file or folder.") from err
    except (PermissionError, NotADirectoryError) as err:
        raise ManifestError(f"{path}: cannot be opened ({err.strerror}). Check its name and permissions.") from err
    except ValueError as err:
        raise ManifestError(f"{str(path)!r}: no name of a file or folder ({err}).") from err
    return is_folder


def is_plain_folder(folder: Path) -> bool:
    """Whether `load_manifest` takes a folder for nothing but images: no table, no splits, no data sets in it.

    Args:
        folder: One that is there.
    """
    return not (_is_data_set(folder) or any(map(_is_data_set, subfolders(folder))))


def is_table(path: Path) -> bool:
    """Whether a file is a data set by its suffix (a table or a meta.json), not one image."""
    return path.suffix.lower() in {".json", *spreadsheet.TABLE_SUFFIXES}


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
        # A name that is not UTF-8 is written byte by byte, as it is on disk, and read back so.
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(COLUMNS)
            for s in manifest:
                mask = "" if s.mask is None else relative(s.mask)
                label = _LABEL_WORDS[s.label]
                writer.writerow((relative(s.path), s.task, s.split, label, s.frame, mask, s.patient_id, s.sha256))
    except OSError as err:
        raise OutputError(f"{path}: cannot be written ({err.strerror}).") from err


def _read_file(path: Path, task: str | None) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return Rows(layouts.read_meta_json(path), Counter())
    if suffix in spreadsheet.TABLE_SUFFIXES:
        return Rows(_read_csv(path, task), Counter())
    advice = " Save the table as CSV." if suffix in (".xlsx", ".xls", ".ods") else ""
    raise ManifestError(
        f"{path}: got a {suffix or 'suffix-less'} file, expected a .csv, a meta.json or a folder.{advice}"
    )


def _read_folder(folder: Path, task: str | None, normal: bool) -> tuple[Rows, bool]:
    """Rows of a folder, and whether a table lists any of them."""
    if _is_data_set(folder):
        return _read_data_set(folder, task), _has_table(folder)
    below = subfolders(folder)
    children = [child for child in below if _is_data_set(child)]
    if not children and normal:
        return layouts.read_normals(folder, task), False
    if not children:
        return layouts.read_plain(folder, task or _folder_name(folder)), False
    beside, left_out = list_files(folder, deep=False)
    left_out["file", "outside of the data sets"] += len(beside)
    for stray in (child for child in below if child not in children):
        images, others = list_files(stray)
        left_out += others
        if images:
            raise ManifestError(
                f"{folder}: {children[0].name} is a data set but {stray.name} is only images; "
                "expected all folders in one of the known layouts. Move it, or load the data sets one by one."
            )
    samples: list[Sample] = []
    for child in children:
        own, others = _read_data_set(child, None)
        samples += own
        left_out += others
    return Rows(samples, left_out), any(map(_has_table, children))


def _is_data_set(folder: Path) -> bool:
    return _has_table(folder) or layouts.has_splits(folder)


def _has_table(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in ("manifest.csv", "meta.json"))  # noqa: PTH113 locked: False


def _read_data_set(folder: Path, task: str | None) -> Rows:
    for name in ("manifest.csv", "meta.json"):
        if os.path.isfile(folder / name):  # noqa: PTH113
            return _read_file(folder / name, task)
    return layouts.read_splits(folder, task or _folder_name(folder))


def _folder_name(folder: Path) -> str:
    return folder.resolve().name or "images"


def _read_csv(path: Path, task: str | None) -> list[Sample]:
    default_task = task or _folder_name(path.parent)
    samples: list[Sample] = []
    unclear: dict[str, str] = {}
    for number, cells in spreadsheet.read_rows(path):
        if not samples and not unclear:
            tell_misspelt(cells, path)
        label = cells.get("label", "")
        if label and words.meaning_of(label) is None:
            unclear.setdefault(label, f"row {number}")
        else:
            samples.append(row_of_csv(cells, path.parent, default_task, f"{path}: row {number}"))
    if len(unclear) == 1:
        raise words.unclear_labels(dict.fromkeys(unclear, ""), f"{path}: {next(iter(unclear.values()))}", folder=False)
    if unclear:
        raise words.unclear_labels(unclear, str(path), folder=False)
    if not samples:
        raise ManifestError(f"{path}: has no rows.")
    return samples


def tell_misspelt(columns: Iterable[str], path: str | Path) -> None:
    """Warn of columns that are not read and whose name is nearly that of one that is, and is not there."""
    there = {"mask" if name == "mask_path" else name for name in columns}
    for name in sorted(there - set(COLUMNS)):
        if near := get_close_matches(name, set(COLUMNS) - there, n=1, cutoff=0.75):
            logger.warning("%s: column %s is not read. Is it meant to be %s?", path, name, near[0])


def row_of_csv(cells: Mapping[str, str], folder: Path, default_task: str, where: str) -> Sample:
    """The row that the cells of a table's line say.

    Args:
        cells: By column name, as `spreadsheet.read_rows` gives them.
        folder: Where relative paths start.
        default_task: Name of the task where there is none.
        where: Start of an error message, such as "cases.csv: row 7".

    Raises:
        ManifestError: A cell that means nothing.
    """
    if not cells["path"]:
        raise ManifestError(f"{where}: path is empty.")
    mask, label, split = cells.get("mask") or cells.get("mask_path"), cells.get("label"), cells.get("split")
    return Sample(
        path=spreadsheet.locate(folder, cells["path"]),
        task=cells.get("task") or default_task,
        split=layouts.split_of(split, where) if split else "test",
        label=words.label_of(label, where) if label else None,
        frame=_frame(cells.get("frame", ""), where),
        mask=spreadsheet.locate(folder, mask) if mask else None,
        patient_id=cells.get("patient_id") or None,
        sha256=_digest(cells.get("sha256", ""), where),
    )


def _frame(cell: str, where: str) -> int | None:
    if not re.fullmatch(r"(\d+([.,]0)?)?", cell, re.ASCII):  # pandas writes 3.0 where other rows have no frame
        raise ManifestError(f"{where}: frame is {cell!r}, expected 0, 1, 2, ... or nothing.")
    return int(cell.replace(",", ".").partition(".")[0]) if cell else None


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
    missing = [file for file in files if not os.path.isfile(file)]  # noqa: PTH113 False in a locked folder
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
