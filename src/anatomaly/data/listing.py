"""The image files below a folder, in natural order, and how many files and folders were left out, by reason.

A file with the suffix of an image format is listed unopened, so that a broken one is reported where it is read; any
other file is listed if `readers.sniff_format` knows its first bytes.  Folders behind symbolic links are entered once.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from anatomaly.data.readers import sniff_format
from anatomaly.errors import ReadError

#: Folders that hold masks; images are never looked for inside them.
MASK_FOLDERS = frozenset({"label", "labels", "mask", "masks", "annotation", "annotations", "ground_truth"})

#: What was left out -> how often: (file or folder, the reason).
LeftOut = Mapping[tuple[Literal["file", "folder"], str], int]
Counts = Counter[tuple[Literal["file", "folder"], str]]

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".nii", ".nii.gz")
_SUFFIX = re.compile(
    r"\.(nii|nii\.gz|png|jpe?g|jpe|jfif|tiff?|dcm|dicom|dic|ima|bmp|dib|gif|webp|jp2|j2k|j2c|jpx|hdr|img)$",
    re.IGNORECASE,
)
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


class Listing(NamedTuple):
    """Images below a folder in natural order (`2.png` before `10.png`), and what was left out."""

    images: list[Path]
    left_out: Counts


def list_files(folder: Path, *, masks: bool = False, deep: bool = True) -> Listing:
    """List the images below a folder.

    Left out are hidden files, mask folders, files named `*_mask.*`, and whatever is no image.

    Args:
        folder: Searched with its subfolders, also those behind symbolic links.
        masks: List masks: files named `*_mask.*` too.
        deep: False looks into the folder itself only.

    Returns:
        A folder that cannot be opened counts as left out, be it `folder` itself.
    """
    left_out: Counts = Counter()
    found: list[str] = []
    for path, name in _walk(folder, left_out, deep=deep):
        reason = _reason(path, name, masks=masks)
        if reason is None:
            found.append(path)
        else:
            left_out["file", reason] += 1
    return Listing([Path(path) for path in sort_naturally(found)], left_out)


def subfolders(folder: Path) -> list[Path]:
    """List the visible folders directly in a folder, in natural order; none where it cannot be opened."""
    names = [entry.name for entry in _entries(folder) if not _is_hidden(entry.name) and _is_folder(entry)]
    return [folder / name for name in sort_naturally(names)]


def describe(left_out: LeftOut) -> str:
    """One line for a terminal, such as `3 files left out: 2 not an image, 1 hidden`; empty where nothing was."""
    parts = []
    for kind in ("file", "folder"):
        reasons = sorted(
            ((n, reason) for (k, reason), n in left_out.items() if k == kind and n), key=lambda r: (-r[0], r[1])
        )
        if total := sum(n for n, _ in reasons):
            which = ", ".join(f"{n} {reason}" for n, reason in reasons)
            parts.append(f"{total} {kind}{'s' * (total > 1)} left out: {which}")
    return "; ".join(parts)


def sort_naturally(paths: Iterable[str]) -> list[str]:
    """Sort such that digits count by their value; `01.png` comes before `1.png`."""
    return sorted(sorted(paths), key=natural_key)


def stem(name: str) -> str:
    """File name without the suffix of an image format; the dots of a DICOM UID stay."""
    return _SUFFIX.sub("", name)


def natural_key(path: str) -> str:
    """Key that orders digits by value: every number becomes its length and its digits, NUL ends every part."""
    parts = re.split(r"(\d+)", path.replace(os.sep, "/"))
    for index in range(1, len(parts), 2):
        digits = str(int(parts[index]))
        parts[index] = chr(len(digits)) + digits
    return "\0".join(parts)


def _reason(path: str, name: str, *, masks: bool) -> str | None:
    """Why a file is no image to list; None for an image."""
    lower = name.lower()
    if _is_hidden(name) or lower in _SYSTEM_FILES:
        return "hidden"
    if not masks and "_mask" in lower and stem(lower).endswith("_mask"):
        return "a mask"
    if lower.endswith(_IMAGE_SUFFIXES):
        return None
    if lower == "dicomdir":  # has DICOM's first bytes and holds no pixels
        return "an index (DICOMDIR)"
    try:
        if sniff_format(Path(path)) is not None:
            return None
        return "not an image" if os.path.getsize(path) else "empty"  # noqa: PTH202 no second Path
    except (ReadError, OSError):
        return "cannot be opened"


#: What a folder that `anatomaly predict` wrote to holds; its overlays are no images to judge.
_RESULTS = {"run.json", "scores.jsonl"}


def _walk(folder: Path, left_out: Counts, *, deep: bool) -> Iterator[tuple[str, str]]:
    """Yield (path, name) of every file; folders behind links come last, so that a file has its plainest path."""
    seen: set[tuple[int, int]] = set()
    waiting, links = [str(folder)], list[str]()
    while waiting or links:
        behind_link = not waiting
        current = waiting.pop() if waiting else links.pop(0)
        if behind_link and _leads_back(current):
            left_out["folder", "a link in a circle"] += 1
            continue
        try:
            status = os.stat(current)  # noqa: PTH116 strings: a Path for each would cost more than the search
            entries = list(os.scandir(current))
        except OSError:
            left_out["folder", "cannot be opened"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            left_out["folder", "read already under another name"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        if {entry.name for entry in entries} >= _RESULTS:
            left_out["folder", "of results"] += 1
            continue
        for entry in entries:
            kind = _kind(entry)
            if kind == "file":
                yield entry.path, entry.name
            elif kind != "folder":
                left_out["file", "hidden" if _is_hidden(entry.name) else kind] += 1
            elif _is_hidden(entry.name):
                left_out["folder", "hidden"] += 1
            elif deep and entry.name.lower() in MASK_FOLDERS:
                left_out["folder", "of masks"] += 1
            elif deep:
                (links if entry.is_symlink() else waiting).append(entry.path)
        links.sort()


def _kind(entry: os.DirEntry[str]) -> str:
    """`file`, `folder`, or the reason why it is neither; one system call only for links."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
            return "a broken link"
        return "a device or pipe" if not stat.S_ISLNK(entry.stat().st_mode) else "a broken link"
    except OSError:  # a link to itself
        return "a broken link"


def _leads_back(link: str) -> bool:
    """Whether a link names a folder that it lies in."""
    target, place = os.path.realpath(link), os.path.realpath(os.path.dirname(link))  # noqa: PTH120
    return os.path.join(place, "").startswith(os.path.join(target, ""))  # noqa: PTH118


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
