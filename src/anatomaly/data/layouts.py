"""Folder conventions of public data sets, one function per layout; each returns manifest rows and what it left out.

A label always comes from a whole folder name (`words.label_of`), never from a part of a path: BMAD names its anomalous
folder `Ungood`, which contains `good`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anatomaly.data import words
from anatomaly.data.listing import MASK_FOLDERS, Counts, LeftOut, describe, list_files, stem, subfolders
from anatomaly.data.readers import count_frames
from anatomaly.data.spreadsheet import locate
from anatomaly.errors import ManifestError, ReadError
from anatomaly.files import read_json
from anatomaly.types import Sample, Split

#: Names of split folders and words of a split column, in lower case.
SPLIT_NAMES: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

LAYOUTS_HELP = (
    "expected manifest.csv, meta.json (Uni-Medical), train/good + test/{good,TYPE} (MVTec), "
    "train/good + {valid,test}/{good,Ungood}/{img,label} (BMAD), or images (PNG, JPEG, TIFF, DICOM, NIfTI)"
)

_SINGLE_FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")


class Rows(NamedTuple):
    """Manifest rows read from a folder, and how many files and folders were left out (see `listing.describe`)."""

    samples: list[Sample]
    left_out: Counts


def has_splits(folder: Path) -> bool:
    """Say whether a folder has train, val or test folders, as MVTec, BMAD and class-folder data sets do."""
    return any(child.name.lower() in SPLIT_NAMES for child in subfolders(folder))


def read_splits(folder: Path, task: str) -> Rows:
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
        os.path.isdir(class_folder / "img")  # noqa: PTH112 False for a locked one, where pathlib raises
        for split_folder in subfolders(folder)
        if split_folder.name.lower() in SPLIT_NAMES
        for class_folder in subfolders(split_folder)
    )
    return read_bmad(folder, task) if is_bmad else read_mvtec(folder, task)


def read_mvtec(folder: Path, task: str) -> Rows:
    """Read `train/good`, `test/{good,TYPE}` and, where present, `ground_truth/TYPE/NAME_mask.*` or `NAME.*`.

    Also reads the same tree without masks: ZhangLab's `{train,val,test}/{NORMAL,PNEUMONIA}`, D2-4FAD's
    `{train,test}/{good,bad}`.  Anomalous folders in `train` are left out: training sees normal images only.

    Args:
        folder: Folder that holds the split folders.
        task: Name of the data set.

    Returns:
        Rows in natural order of the paths; a file of several frames becomes one row per frame.

    Raises:
        ManifestError: No images, images directly in a split folder, or a folder name of unclear meaning.
    """
    return _read_classes(folder, task, lambda class_folder: (class_folder, folder / "ground_truth" / class_folder.name))


def read_bmad(folder: Path, task: str) -> Rows:
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

    def places(class_folder: Path) -> tuple[Path, Path]:
        images = class_folder / "img"
        return (images if os.path.isdir(images) else class_folder), class_folder / "label"  # noqa: PTH112

    return _read_classes(folder, task, places)


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
        meta = read_json(file)
    except (OSError, ValueError) as err:
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


def read_plain(folder: Path, task: str) -> Rows:
    """Read every image below a folder as an unlabelled test image.

    Args:
        folder: Searched with its subfolders, except mask folders.
        task: Name of the data set.

    Returns:
        Rows in natural order of the paths; a file of several frames becomes one row per frame.

    Raises:
        ManifestError: No images.
    """
    images, left_out = list_files(folder)
    samples = [Sample(path, task, frame=frame) for path in images for frame in _frames(path)]
    if not samples:
        raise _no_images(folder, "no images found", left_out)
    return Rows(samples, left_out)


def read_normals(folder: Path, task: str | None) -> Rows:
    """Read every image below a folder as a normal training image.

    Args:
        folder: Images directly in it: all below it are one task.  Else its subfolders that hold images are a task each,
            except one that is called `normal`, `good` or the like, which is no name of a task.
        task: Name of the one task that all are to be; None takes names of folders.

    Returns:
        Rows in natural order of the paths; a file of several frames becomes one row per frame.

    Raises:
        ManifestError: No images, or a subfolder is called `abnormal` or the like, or stands beside one called `normal`.
    """
    below = [child for child in subfolders(folder) if child.name.lower() not in MASK_FOLDERS]
    normal = [child for child in below if words.meaning_of(child.name) == 0]
    odd = [child for child in below if child not in normal and (normal or words.is_anomalous(child.name))]
    if odd and (normal or list_files(odd[0]).images):
        raise ManifestError(
            f"{folder}: {odd[0].name} looks like a folder of anomalous images, expected normal ones only. "
            f"Give the folder of the normal ones{f', {normal[0]}' if normal else ''}."
        )
    own = task or folder.resolve().name or "images"
    tasks, left_out = {folder: own}, Counter[tuple[Literal["file", "folder"], str]]()
    if task is None and not (beside := list_files(folder, deep=False)).images:
        tasks = {child: own if child in normal else child.name for child in below}
        left_out = beside.left_out
    samples: list[Sample] = []
    for place, name in tasks.items():
        images, others = list_files(place)
        samples += [Sample(path, name, "train", 0, frame) for path in images for frame in _frames(path)]
        left_out += others
    if not samples:
        raise _no_images(folder, "no images found", left_out)
    return Rows(samples, left_out)


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


def _read_classes(folder: Path, task: str, places: Callable[[Path], tuple[Path, Path]]) -> Rows:
    """Read SPLIT/CLASS folders; `places` maps a class folder to its image and mask folder (may be absent)."""
    samples: list[Sample] = []
    beside, left_out = list_files(folder, deep=False)
    left_out["file", "outside of the splits"] += len(beside)
    classes: list[tuple[Path, Split]] = []
    for child in subfolders(folder):
        if child.name.lower() in SPLIT_NAMES:
            class_folders, others = _class_folders(child)
            classes += [(below, split_of(child.name, str(child))) for below in class_folders]
            left_out += others
        elif child.name.lower() not in MASK_FOLDERS:
            left_out["folder", "outside of the splits"] += 1
    for (class_folder, split), label in zip(classes, _labels(folder, classes), strict=True):
        image_folder, mask_folder = places(class_folder)
        images, others = list_files(image_folder)
        left_out += others
        if split == "train" and label == 1:
            left_out["file", "anomalous in train"] += len(images)
            continue
        masks = {}
        if label == 1 and os.path.isdir(mask_folder):  # noqa: PTH112
            masks = {_mask_key(path, mask_folder): path for path in list_files(mask_folder, masks=True).images}
        samples += [
            Sample(path, task, split, label, frame, masks.get(_mask_key(path, image_folder)))
            for path in images
            for frame in _frames(path)
        ]
    if not samples:
        raise _no_images(folder, "no images in its split folders", left_out)
    return Rows(samples, left_out)


def _class_folders(split_folder: Path) -> tuple[list[Path], Counts]:
    """The class folders of a split, and what lies beside them."""
    images, left_out = list_files(split_folder, deep=False)
    if images:
        raise ManifestError(
            f"{split_folder}: holds images outside of a class folder, expected {split_folder.name}/good/NAME and "
            f"the like. Move them, or list them in a manifest.csv."
        )
    folders = subfolders(split_folder)
    classes = [child for child in folders if child.name.lower() not in MASK_FOLDERS]
    left_out["folder", "of masks"] += len(folders) - len(classes)
    return classes, left_out


def _labels(folder: Path, classes: Sequence[tuple[Path, Split]]) -> list[Literal[0, 1]]:
    """What the names of all class folders mean; those that may mean either are refused together."""
    labels = [words.meaning_of(class_folder.name, folder=True) for class_folder, _ in classes]
    unclear = {
        class_folder.name: class_folder.relative_to(folder).parent.as_posix()
        for (class_folder, _), label in zip(classes, labels, strict=True)
        if label is None
    }
    if unclear:
        raise words.unclear_labels(unclear, str(folder), folder=True)
    return [label for label in labels if label is not None]


def _no_images(folder: Path, what: str, left_out: LeftOut) -> ManifestError:
    told = describe(left_out)
    return ManifestError(f"{folder}: {what}{f' ({told})' if told else ''}; {LAYOUTS_HELP}.")


def _meta_sample(entry: Any, split: Split, task: str, file: Path, where: str) -> Sample:
    if not isinstance(entry, dict) or not isinstance(entry.get("img_path"), str) or not entry["img_path"]:
        raise ManifestError(f"{where}: has no img_path.")
    if entry.get("anomaly") not in (0, 1):
        raise ManifestError(f"{where}: anomaly is {entry.get('anomaly')!r}, expected 0 or 1.")
    mask = entry.get("mask_path") or None
    return Sample(
        locate(file.parent, entry["img_path"]),
        task,
        split,
        1 if entry["anomaly"] else 0,
        mask=None if mask is None else locate(file.parent, mask),
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


def _mask_key(path: Path, folder: Path) -> str:
    """What an image and its mask share: the path below their folders without suffix and without `_mask`."""
    name = stem(path.relative_to(folder).as_posix())
    return name[:-5] if name.lower().endswith("_mask") else name


def samples_of(item: str | Path | Sample, *, task: str) -> list[Sample]:
    """Rows of one item a caller named: a row as it is, a file as one row per frame, a folder as all images below it.

    Args:
        item: Manifest row or path; one that cannot be read gives a row whose reading fails.
        task: Name of the data set for paths.

    Raises:
        ManifestError: A folder without images.
    """
    if isinstance(item, Sample):
        return [item]
    path = Path(item)
    if os.path.isdir(path):  # noqa: PTH112 False where pathlib raises
        return read_plain(path, task).samples
    return [Sample(path, task, frame=frame) for frame in _frames(path)]


def rows_of(items: Iterable[str | Path | Sample], *, task: str) -> Iterator[Sample]:
    """Rows of all items a caller named, one after the other; one path is taken for a list of one.

    Args:
        items: As `samples_of` takes them.
        task: Name of the data set for paths.
    """
    for item in [items] if isinstance(items, (str, Path)) else items:
        yield from samples_of(item, task=task)
