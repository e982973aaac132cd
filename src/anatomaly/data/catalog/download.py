"""A download of a catalogued data set: by what signs its root is known, and what is found in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anatomaly.data.listing import subfolders
from anatomaly.errors import ManifestError
from anatomaly.types import Split

_DEPTH = 3  # an archive unpacked into its own folder, which holds a folder of the same name, which holds the data
_MANY = 50  # a folder of more subfolders is data (one per patient), not packaging


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a download.

    Attributes:
        path: Where the image is, or would be.
        key: Name of the image within the data set, the same wherever and however deep it was unpacked.
        task: Task of the manifest row.
        label: 0 normal, 1 anomalous.
        split: The split its owner gave it, or None where the owner gave none.
        patient: Id of the patient as the source states it, or None.
        mask: File of the lesion mask, or None.
    """

    path: Path
    key: str
    task: str
    label: Literal[0, 1]
    split: Split | None = None
    patient: str | None = None
    mask: Path | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a download holds.

    Attributes:
        items: Images with a usable label, in no particular order.
        images: How many images the download lists, to be compared with the original's count.
        left_out: (reason, number of images) of those without a usable label.
    """

    items: tuple[Item, ...]
    images: int
    left_out: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """A way a data set is published.

    Attributes:
        signs: Files and folders by which its root is known, in any case.
        read: Reads the root.
    """

    signs: tuple[str, ...]
    read: Callable[[Path], Found]


def find_root(source: Path, choices: Sequence[Layout]) -> tuple[Path, Layout] | None:
    """Find the folder that has one of the layouts: the given one, or the only one up to three levels below.

    Args:
        source: The folder a user named.
        choices: Layouts in order of preference.

    Returns:
        The root and its layout, or None.

    Raises:
        ManifestError: Several folders of one level fit, so a person has to choose.
    """
    level = [source]
    for _ in range(_DEPTH + 1):
        fitting = [
            (folder, layout)
            for folder in level
            if (layout := next((c for c in choices if all(child(folder, sign) for sign in c.signs)), None))
        ]
        if len(fitting) > 1:
            names = ", ".join(folder.relative_to(source).as_posix() for folder, _ in fitting)
            raise ManifestError(f"{source}: several folders in it fit, {names}. Name one of them as the source.")
        if fitting:
            return fitting[0]
        below = [subfolders(folder) for folder in level]
        level = [folder for folders in below if len(folders) <= _MANY for folder in folders]
    return None


def child(folder: Path, name: str) -> Path | None:
    """Find a file or folder by its path below a folder, ignoring case; the exact name wins."""
    for part in name.split("/"):
        if (folder / part).exists():
            folder = folder / part
            continue
        try:
            matches = sorted(entry for entry in folder.iterdir() if entry.name.lower() == part.lower())
        except OSError:  # no folder, or a closed one
            return None
        if not matches:
            return None
        folder = matches[0]
    return folder
