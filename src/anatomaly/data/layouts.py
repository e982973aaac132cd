"""Folder conventions of public data sets, one function per layout; each returns manifest rows.

A label always comes from a whole folder name compared exactly (ignoring case), never from a part of a path: BMAD names
its anomalous folder `Ungood`, which contains `good`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from anatomaly.data.readers import count_frames, sniff_format
from anatomaly.errors import ManifestError, ReadError
from anatomaly.types import Sample, Split

#: Names of folders (and words in a label column) that mean normal; every other finding is anomalous.
NORMAL_NAMES = frozenset({"good", "normal"})

#: Words that may mean either, so a person has to decide: calling a healthy folder anomalous would go unnoticed.
UNCLEAR_NAMES = frozenset(
    {"healthy", "control", "benign", "negative", "positive", "no", "yes", "false", "true", "none", "null", "na", "n/a"}
    | {"unknown", "no_finding", "no_tumor", "notumor"}
)

#: Names of split folders and words of a split column, in lower case.
SPLIT_NAMES: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

#: Folders that hold masks; images are never looked for inside them.
MASK_FOLDERS = frozenset({"label", "labels", "mask", "masks", "annotation", "annotations", "ground_truth"})

LAYOUTS_HELP = (
    "expected manifest.csv, meta.json (Uni-Medical), train/good + test/{good,TYPE} (MVTec), "
    "train/good + {valid,test}/{good,Ungood}/{img,label} (BMAD), or images (PNG, JPEG, TIFF, DICOM, NIfTI)"
)

_SINGLE_FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")
_IMAGE_SUFFIXES = (*_SINGLE_FRAME_SUFFIXES, ".tif", ".tiff", ".dcm", ".nii", ".nii.gz")
_NOT_IMAGES = frozenset({"thumbs.db", "dicomdir"})  # a DICOMDIR has DICOM's magic bytes but holds no pixels

_log = logging.getLogger(__name__)


def label_of(word: str, where: str) -> Literal[0, 1]:
    """Turn a folder name or the word of a label column into 0 (normal) or 1 (anomalous).

    `good`, `normal` and 0 are normal; 1 and every other word (`bad`, `Ungood`, `glioma`, ...) are anomalous.

    Args:
        word: Not empty; case and surrounding blanks do not matter.
        where: Start of the error message, such as "cases.csv: row 7".

    Returns:
        0 or 1.

    Raises:
        ManifestError: A word that could mean either (`UNCLEAR_NAMES`), or a number other than 0 and 1.
    """
    name = word.strip().lower()
    if name in NORMAL_NAMES:
        return 0
    try:
        number = float(name)  # tables written by pandas hold 0.0 and 1.0
    except ValueError:
        number = None
    if number == 0:
        return 0
    if name in UNCLEAR_NAMES or number not in (None, 1.0):
        raise ManifestError(
            f"{where}: label {word.strip()!r} could mean normal or anomalous. "
            "Call it normal, anomalous or the name of the finding."
        )
    return 1


def has_splits(folder: Path) -> bool:
    """Say whether a folder has train, val or test folders, as MVTec, BMAD and class-folder data sets do."""
    return any(child.name.lower() in SPLIT_NAMES for child in subfolders(folder))


def read_splits(folder: Path, task: str) -> list[Sample]:
    """Read a folder for which `has_splits` is true as BMAD (a class folder holds `img`) or as MVTec.

    Args:
        folder: Folder that holds the split folders.
        task: Name of the data set.

    Returns:
        Rows in natural order of the paths.

    Raises:
        ManifestError: See `read_mvtec`.
    """
    is_bmad = any(
        (class_folder / "img").is_dir()
        for split_folder in subfolders(folder)
        if split_folder.name.lower() in SPLIT_NAMES
        for class_folder in subfolders(split_folder)
    )
    return read_bmad(folder, task) if is_bmad else read_mvtec(folder, task)


def read_mvtec(folder: Path, task: str) -> list[Sample]:
    """Read `train/good`, `test/{good,TYPE}` and, where present, `ground_truth/TYPE/NAME_mask.*` or `NAME.*`.

    Also reads the same tree without masks: ZhangLab's `{train,val,test}/{NORMAL,PNEUMONIA}`, D2-4FAD's
    `{train,test}/{good,bad}`.  Anomalous folders in `train` are left out, with a logged warning: training sees normal
    images only.

    Args:
        folder: Folder that holds the split folders.
        task: Name of the data set.

    Returns:
        Rows in natural order of the paths; a file of several frames becomes one row per frame.

    Raises:
        ManifestError: No images, images directly in a split folder, or a folder name of unclear meaning.
    """
    return _read_classes(folder, task, lambda class_folder: (class_folder, folder / "ground_truth" / class_folder.name))


def read_bmad(folder: Path, task: str) -> list[Sample]:
    """Read BMAD's `train/good[/img]` and `{valid,test}/{good,Ungood}/{img,label}`; `Ungood` is anomalous.

    Sets without masks are flat (`test/Ungood/NAME.png`).  The empty masks in `good/label` are not listed.

    Args:
        folder: Folder that holds the split folders.
        task: Name of the data set.

    Returns:
        Rows in natural order of the paths; a file of several frames becomes one row per frame.

    Raises:
        ManifestError: See `read_mvtec`.
    """

    def locate(class_folder: Path) -> tuple[Path, Path]:
        images = class_folder / "img"
        return (images if images.is_dir() else class_folder), class_folder / "label"

    return _read_classes(folder, task, locate)


def read_meta_json(file: Path) -> list[Sample]:
    """Read Uni-Medical's (ADer's) meta.json: {split: {class: [{img_path, mask_path, anomaly}, ...]}}.

    Args:
        file: The JSON file; paths in it are relative to its folder, and an empty mask_path means no mask.

    Returns:
        Rows in the order of the file; the class is the task.

    Raises:
        ManifestError: Not JSON, or an entry lacks a key or has an unknown split or anomaly value.
    """
    try:
        meta = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as err:
        raise ManifestError(f"{file}: cannot be read as JSON ({err}).") from err
    classes_of_all = meta.values() if isinstance(meta, dict) else [None]
    if not all(isinstance(c, dict) and all(isinstance(e, list) for e in c.values()) for c in classes_of_all):
        raise ManifestError(f"{file}: expected {{train|test: {{class: [entries]}}}} as in Uni-Medical's meta.json.")
    return [
        _meta_sample(entry, split_of(split, str(file)), task, file, f"{file}: {split}/{task} entry {number}")
        for split, classes in meta.items()
        for task, entries in classes.items()
        for number, entry in enumerate(entries)
    ]


def read_plain(folder: Path, task: str) -> list[Sample]:
    """Read every image below a folder as an unlabelled test image.

    Args:
        folder: Searched with its subfolders, except mask folders.
        task: Name of the data set.

    Returns:
        Rows in natural order of the paths; a file of several frames becomes one row per frame.

    Raises:
        ManifestError: No images.
    """
    samples = [Sample(path, task, frame=frame) for path in list_images(folder) for frame in _frames(path)]
    if not samples:
        raise ManifestError(f"{folder}: no images found; {LAYOUTS_HELP}.")
    return samples


def list_images(folder: Path) -> list[Path]:
    """List the images below a folder in natural order (`2.png` before `10.png`).

    Hidden files, mask folders, files named `*_mask.*` and whatever is no PNG, JPEG, TIFF, DICOM or NIfTI are left out;
    files without a known suffix are recognised by their first bytes.
    """
    return [path for path in _image_files(folder) if not _stem(path.name).lower().endswith("_mask")]


def subfolders(folder: Path) -> list[Path]:
    """List the visible folders directly in a folder, in natural order."""
    return sorted((child for child in folder.iterdir() if child.is_dir() and not _hidden(child.name)), key=_natural)


def split_of(word: str, where: str) -> Split:
    """Turn a word into a split; `valid` and `validation` mean `val`.

    Args:
        word: Case and surrounding blanks do not matter.
        where: Start of the error message.

    Returns:
        "train", "val" or "test".

    Raises:
        ManifestError: Any other word.
    """
    split = SPLIT_NAMES.get(word.strip().lower())
    if split is None:
        raise ManifestError(f"{where}: unknown split {word!r}, expected train, val or test.")
    return split


def _read_classes(folder: Path, task: str, locate: Callable[[Path], tuple[Path, Path]]) -> list[Sample]:
    """Read SPLIT/CLASS folders; `locate` maps a class folder to its image and mask folder (may be absent)."""
    samples: list[Sample] = []
    for split_folder in subfolders(folder):
        if split_folder.name.lower() not in SPLIT_NAMES:
            continue
        split = split_of(split_folder.name, str(split_folder))
        if any(_is_image(path) for path in split_folder.iterdir()):
            raise ManifestError(
                f"{split_folder}: holds images outside of a class folder, expected {split_folder.name}/good/NAME and "
                f"the like. Move them, or list them in a manifest.csv."
            )
        for class_folder in subfolders(split_folder):
            if class_folder.name.lower() not in MASK_FOLDERS:
                samples += _read_class(class_folder, task, split, *locate(class_folder))
    if not samples:
        raise ManifestError(f"{folder}: no images in its split folders; {LAYOUTS_HELP}.")
    return samples


def _read_class(class_folder: Path, task: str, split: Split, image_folder: Path, mask_folder: Path) -> list[Sample]:
    label = label_of(class_folder.name, str(class_folder))
    images = list_images(image_folder)
    if split == "train" and label == 1:
        _log.warning("%s: left out %d images, training sees normal images only.", class_folder, len(images))
        return []
    masks: dict[str, Path] = {}
    if label == 1 and mask_folder.is_dir():
        masks = {_mask_key(path, mask_folder): path for path in _image_files(mask_folder)}
    return [
        Sample(path, task, split, label, frame, masks.get(_mask_key(path, image_folder)))
        for path in images
        for frame in _frames(path)
    ]


def _meta_sample(entry: Any, split: Split, task: str, file: Path, where: str) -> Sample:
    if not isinstance(entry, dict) or not isinstance(entry.get("img_path"), str) or not entry["img_path"]:
        raise ManifestError(f"{where}: has no img_path.")
    if entry.get("anomaly") not in (0, 1):
        raise ManifestError(f"{where}: anomaly is {entry.get('anomaly')!r}, expected 0 or 1.")
    mask = entry.get("mask_path") or None
    return Sample(
        file.parent / entry["img_path"],
        task,
        split,
        1 if entry["anomaly"] else 0,
        mask=None if mask is None else file.parent / mask,
    )


def _frames(path: Path) -> list[int] | list[None]:
    """0-based frames of a file, or [None] for a plain 2-D image (and for a broken file: the check reports it)."""
    if path.name.lower().endswith(_SINGLE_FRAME_SUFFIXES):
        return [None]
    try:
        frames = count_frames(path)
    except ReadError:
        return [None]
    return [None] if frames == 1 else list(range(frames))


def _image_files(folder: Path) -> Iterator[Path]:
    """All images below a folder, in natural order; mask folders below it are not entered."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name) and name.lower() not in MASK_FOLDERS]
        found += [Path(parent, name) for name in files]
    return (path for path in sorted(found, key=_natural) if _is_image(path))


def _is_image(path: Path) -> bool:
    name = path.name.lower()
    if _hidden(name) or name in _NOT_IMAGES or not path.is_file():
        return False
    return name.endswith(_IMAGE_SUFFIXES) or sniff_format(path) is not None


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that orders digits by value; `str(path)` last keeps `1.png` and `01.png` in a fixed order."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts] + [(-1, str(path))]


def _stem(name: str) -> str:
    """File name without a known image suffix; the dots of a DICOM UID stay."""
    suffix = next((suffix for suffix in reversed(_IMAGE_SUFFIXES) if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _mask_key(path: Path, folder: Path) -> str:
    """What an image and its mask share: the path below their folders without suffix and without `_mask`."""
    stem = _stem(path.relative_to(folder).as_posix())
    return stem[:-5] if stem.lower().endswith("_mask") else stem


def samples_of(item: str | Path | Sample, *, task: str) -> list[Sample]:
    """Rows of one item a caller named: a row as it is, a file as one row per frame.

    Args:
        item: Manifest row or path of one image file; a path that cannot be read gives a row whose reading fails.
        task: Name of the data set for paths.
    """
    if isinstance(item, Sample):
        return [item]
    path = Path(item)
    return [Sample(path, task, frame=frame) for frame in _frames(path)]
