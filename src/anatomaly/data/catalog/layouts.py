"""The layouts in which the catalogued data sets are published, one function per family; each returns `Found`.

Nothing is split here and no file's existence is promised: a table may name images that were not downloaded.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from anatomaly.data import layouts
from anatomaly.data.catalog.download import Found, Item, child
from anatomaly.data.listing import list_files
from anatomaly.errors import ManifestError
from anatomaly.types import Sample, Split

#: Columns of CheXpert that are findings; Support Devices is not one: the owner's No Finding ignores it.
CHEXPERT_FINDINGS = (
    "enlarged cardiomediastinum",
    "cardiomegaly",
    "lung opacity",
    "lung lesion",
    "edema",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "pneumothorax",
    "pleural effusion",
    "pleural other",
    "fracture",
)


def read_class_folders(
    root: Path,
    *,
    task: str,
    classes: Mapping[str, Literal[0, 1]],
    splits: Mapping[str, Split] | None = None,
    patient_of: Callable[[str], str | None] | None = None,
) -> Found:
    """Read `CLASS/NAME` or `SPLIT/CLASS/NAME`; only the named folders are looked into.

    LAG's `CLASS/image/NAME` is read too: beside `image` lie attention maps of the same names.

    Args:
        root: Folder of the class or split folders.
        task: Task of all rows.
        classes: Folder name -> label; absent folders are passed over.
        splits: Folder name -> split, or None where the owner gives no split.
        patient_of: Takes the patient's id from a file name without suffix; None where the names hold none.
    """
    items: list[Item] = []
    folders: Mapping[str, Split | None] = splits or {"": None}
    for split_name, split in folders.items():
        for class_name, label in classes.items():
            name = f"{split_name}/{class_name}".lstrip("/")
            folder = child(root, name)
            if folder is None:
                continue
            folder = child(folder, "image") or folder
            items += [
                Item(
                    path, _key(name, path.relative_to(folder)), task, label, split, patient_of and patient_of(path.stem)
                )
                for path in list_files(folder).images
            ]
    return Found(tuple(items), len(items))


def read_table(
    root: Path,
    *,
    task: str,
    table: str,
    columns: tuple[str, str],
    labels: Mapping[str, Literal[0, 1]],
    folder: str,
    file: str,
    id_is_patient: bool = False,
) -> Found:
    """Read a CSV of (id, label) beside a folder of images named after the ids.

    An id may be listed several times (one row per box), always with the same label.  Numbers are compared as numbers:
    HeadCT writes 7 for 007.png.

    Args:
        root: Folder of the table.
        task: Task of all rows.
        table: Name of the CSV file.
        columns: Names of the id and the label column, in lower case.
        labels: Word of the label column, in lower case -> label.
        folder: Folder of the images; those in its subfolders are found too.
        file: Expected file name of an id, such as "{}.dcm"; another suffix or case is found too.
        id_is_patient: The ids name patients.

    Raises:
        ManifestError: A column or a label word is not the original's, or an id has two labels.
    """
    path = child(root, table) or root / table
    listed: dict[str, Literal[0, 1]] = {}
    for number, row in _rows(path, columns):
        word = row[columns[1]].lower()
        if word not in labels:
            raise ManifestError(
                f"{path}: row {number}: {columns[1]} is {row[columns[1]]!r}, expected one of {', '.join(labels)}."
            )
        name = _number(row[columns[0]])
        if listed.setdefault(name, labels[word]) != labels[word]:
            raise ManifestError(f"{path}: row {number}: an image is both normal and anomalous. Download it again.")
    image_folder = child(root, folder) or root / folder
    images = {_number(image.stem): image for image in list_files(image_folder).images}
    items = tuple(
        Item(
            images.get(name, image_folder / file.format(name)),
            name,
            task,
            label,
            patient=name if id_is_patient else None,
        )
        for name, label in listed.items()
    )
    unlisted = len(images.keys() - listed.keys())
    return Found(items, len(listed), ((f"not in {table}", unlisted),) if unlisted else ())


def read_rsna(root: Path, *, task: str) -> Found:
    """Read the RSNA Pneumonia Detection Challenge 2018, and compare its two tables.

    Target 0 of stage_2_train_labels.csv is *no opacity*, not *normal*: the classes of stage_2_detailed_class_info.csv
    decide.

    Raises:
        ManifestError: See `read_table`, and if Target 1 and the class Lung Opacity differ for an image.
    """
    found = read_table(
        root,
        task=task,
        table="stage_2_detailed_class_info.csv",
        columns=("patientid", "class"),
        labels={"normal": 0, "no lung opacity / not normal": 1, "lung opacity": 1},
        folder="stage_2_train_images",
        file="{}.dcm",
        id_is_patient=True,
    )
    boxes = child(root, "stage_2_train_labels.csv")
    if boxes is not None:
        normal = {item.key for item in found.items if item.label == 0}
        for number, row in _rows(boxes, ("patientid", "target")):
            if row["target"] == "1" and _number(row["patientid"]) in normal:
                raise ManifestError(
                    f"{boxes}: row {number}: marks an opacity on an image that the class table calls Normal. "
                    "The two tables are not of one download: fetch both again."
                )
    return found


def read_chexpert(root: Path, *, task: str) -> Found:
    """Read CheXpert's train.csv and valid.csv: frontal views that are normal or have a finding for certain.

    Normal: No Finding is 1 and no finding is 1 or -1 (uncertain).  Anomalous: a finding is 1 and No Finding is not.
    valid.csv, labelled by radiologists, becomes `val`; train.csv, labelled from reports, gets no split here.

    Raises:
        ManifestError: A column is absent, or a cell is none of 1, 0, -1 and empty.
    """
    items: list[Item] = []
    left_out: Counter[str] = Counter()
    total = 0
    columns = ("path", "frontal/lateral", "no finding", *CHEXPERT_FINDINGS)
    tables: tuple[tuple[str, Split | None], ...] = (("train.csv", None), ("valid.csv", "val"))
    for table, split in tables:
        file = child(root, table) or root / table
        for number, row in _rows(file, columns):
            total += 1
            if row["frontal/lateral"].lower() != "frontal":
                left_out["lateral views"] += 1
                continue
            label = _chexpert_label(row, f"{file}: row {number}")
            if label is None:
                left_out["uncertain (-1), contradictory or without any finding mentioned"] += 1
                continue
            key = re.sub(r"^/*CheXpert[^/]*/", "", row["path"], flags=re.IGNORECASE)
            patient = re.search(r"(?:^|/)(patient\d+)/", key)
            if patient is None:
                raise ManifestError(
                    f"{file}: row {number}: the path holds no folder patientNNNNN. Take the owner's table."
                )
            items.append(Item(root / key, key, task, label, split, patient[1]))
    return Found(tuple(items), total, tuple(left_out.items()))


def read_meta(root: Path, *, tasks: Collection[str], patients: Mapping[str, Callable[[str], str | None]]) -> Found:
    """Read Uni-Medical's (ADer's) meta.json; its classes are the tasks.

    Args:
        root: Folder of the meta.json.
        tasks: Names its classes may have; ADer writes such a file for its other data sets too.
        patients: Task -> function that takes the patient's id from a file name without suffix.

    Raises:
        ManifestError: See `layouts.read_meta_json`, and for a class of another data set.
    """
    file = child(root, "meta.json") or root / "meta.json"
    samples = layouts.read_meta_json(file)
    strange = sorted({sample.task for sample in samples}.difference(tasks))
    if strange:
        raise ManifestError(
            f"{file}: holds the class {strange[0]!r}, expected {', '.join(tasks)}. Name another folder."
        )
    return _found(samples, root, patients)


def read_bmad_folders(
    root: Path, *, folders: Mapping[str, str], patients: Mapping[str, Callable[[str], str | None]]
) -> Found:
    """Read folders of the BMAD layout, one task each; `Ungood` is anomalous.

    Args:
        root: Folder that holds them.
        folders: Folder -> task; "." is the root itself.
        patients: Task -> function that takes the patient's id from a file name without suffix.

    Raises:
        ManifestError: See `layouts.read_bmad`.
    """
    samples: list[Sample] = []
    for name, task in folders.items():
        folder = root if name == "." else child(root, name)
        samples += [] if folder is None else layouts.read_bmad(folder, task).samples
    return _found(samples, root, patients)


def zhanglab_patient(stem: str) -> str | None:
    """Patient of a ZhangLab file name, of any of its releases: personN_..., [NORMAL2-]IM-N-..., NORMAL-N-..."""
    match = re.fullmatch(
        r"(person\d+)_.*|((?:NORMAL2-)?IM-\d+)-\d+(?:-\d+)*|(?:NORMAL|BACTERIA|VIRUS)-(\d+)-\d+", stem, re.IGNORECASE
    )
    return match and (match[1] or match[2] or match[3])


def camelyon_slide(stem: str) -> str | None:
    """Slide of a Camelyon16 patch, where its name still holds it (`tumor_009_123_456`)."""
    match = re.match(r"(normal|tumor|test)_\d{3}(?!\d)", stem, re.IGNORECASE)
    return match and match[0].lower()


def brats_case(stem: str) -> str | None:
    """Case of a brain slice of BMAD, named CASE_SLICE as in `00003_60`."""
    match = re.fullmatch(r"(\d{5})_\d+", stem)
    return match and match[1]


def _found(samples: Sequence[Sample], root: Path, patients: Mapping[str, Callable[[str], str | None]]) -> Found:
    items = []
    for sample in samples:
        path, patient_of = sample.path, patients.get(sample.task)
        items.append(
            Item(
                path,
                _key("", path.relative_to(root) if path.is_relative_to(root) else path),
                sample.task,
                1 if sample.label else 0,
                sample.split,
                patient_of and patient_of(path.stem),
                sample.mask,
            )
        )
    return Found(tuple(items), len(items))


def _chexpert_label(row: Mapping[str, str], where: str) -> Literal[0, 1] | None:
    def value(column: str) -> float | None:
        try:
            number = float(row[column]) if row[column] else None
        except ValueError:
            number = 2.0
        if number not in (None, 0, 1, -1):
            raise ManifestError(f"{where}: {column} is {row[column]!r}, expected 1, 0, -1 or nothing.")
        return number

    clear = value("no finding") == 1
    findings = [value(column) for column in CHEXPERT_FINDINGS]
    if clear:
        return 0 if not {1, -1}.intersection(findings) else None
    return 1 if 1 in findings else None


def _rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV as (number of the line, column in lower case -> cell), without blanks around either."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise ManifestError(f"{file}: cannot be read as UTF-8 text. Download it again.") from err
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = [name.strip().lower() for name in reader.fieldnames or []]
    missing = [column for column in columns if column not in names]
    if missing:
        raise ManifestError(
            f"{file}: has no column {missing[0]!r}, got {', '.join(names) or 'an empty file'}. Take the owner's table."
        )
    reader.fieldnames = names
    for row in reader:
        if any(row[column] is None for column in columns):
            raise ManifestError(f"{file}: row {reader.line_num}: has fewer cells than the header. Download it again.")
        yield reader.line_num, {column: row[column].strip() for column in columns}


def _number(word: str) -> str:
    """The same text for `7` and `007`."""
    return str(int(word)) if re.fullmatch(r"\d+", word, re.ASCII) else _key("", Path(word))


def _key(folder: str, path: Path) -> str:
    """Name of an image that does not depend on the operating system (macOS writes accents as two characters)."""
    return unicodedata.normalize("NFC", f"{folder}/{path.as_posix()}".lstrip("/"))
