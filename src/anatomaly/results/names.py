"""Names of the files of a run: one for each image, plain, and short enough for any file system."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from anatomaly.types import Sample

_LONGEST_NAME = 100  # bytes
_LONGEST_STEM = 120  # bytes; encrypted file systems take 143, of which "_map.nii.gz.part" needs 16


class Stems:
    """File names without suffix, no two of them equal, also where the file system ignores case."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._repeats: Counter[str] = Counter()

    def new(self, sample: Sample) -> str:
        """A name no other image of the run has: that of its file, then with the folder's, then with a digest."""
        cut = sample.cut
        file = sample.path.parent if cut is not None and cut.across else sample.path
        axis = "" if cut is None or cut.own else f"_{cut.axis}"
        plain = plain_name(re.sub(r"(\.nii\.gz|\.[A-Za-z]\w{0,4})$", "", file.name)) + axis
        plain += "" if sample.frame is None else f"_{sample.frame:04d}"
        digest = hashlib.sha256(f"{sample.path}#{axis}{sample.frame}".encode(errors="surrogatepass")).hexdigest()[:8]
        of_folder = f"{plain_name(sample.path.parent.name)}_{plain}"
        short = [each for each in (plain, of_folder) if len(each.encode()) <= _LONGEST_STEM]
        last = f"{plain}-{digest}"
        again = (f"{last}-{number}" for number in itertools.count(max(2, self._repeats[last])))
        stem = next(each for each in itertools.chain(short, [last], again) if each.casefold() not in self._taken)
        self._taken.add(stem.casefold())
        if stem.startswith(last):
            self._repeats[last] = int(stem[len(last) + 1 :] or 1) + 1
        return stem


class SeriesNames:
    """A plain name for every DICOM series: that of the folder its first image lies in, numbered where it is taken."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def new(self, path: Path) -> str:
        """The name of the series whose first image is `path`."""
        stem = plain_name(path.absolute().parent.name)
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        name = next(each for each in itertools.chain([stem], numbered) if each.casefold() not in self._taken)
        self._taken.add(name.casefold())
        return name


def plain_name(name: str) -> str:
    """`name` without characters that need quoting, at most 100 bytes, never empty or hidden."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip(".")
    return plain.encode()[:_LONGEST_NAME].decode(errors="ignore") or "image"
