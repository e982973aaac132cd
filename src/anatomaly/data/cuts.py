"""Rows of files -> rows of slices: what is judged when the user asks for volumes along an axis."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from anatomaly.data.decoding import MIN_SIDE
from anatomaly.data.readers import NO_VOLUME, sniff_format
from anatomaly.data.series import Series, read_series
from anatomaly.data.volume_grid import AXES, axis_of, grid_of
from anatomaly.data.volumes import slice_grid
from anatomaly.errors import AnatomalyError, ConfigError, ReadError
from anatomaly.types import Axis, Cut, Sample


class Volume(NamedTuple):
    """The slices to judge of one volume, in order; or the one row whose reading says why there are none.

    Attributes:
        samples: Axis by axis, each from the first slice to the last; all with the volume's label.
        error: Why it cannot be cut, in one line, or None.
    """

    samples: tuple[Sample, ...]
    error: str | None = None


def axes_of(word: str) -> tuple[Axis, ...]:
    """The axes that a word of the command line means: one of them, or "all"."""
    return AXES if word == "all" else tuple(axis for axis in AXES if axis == word)


def volumes_of(rows: Iterable[Sample], axes: Sequence[Axis], *, slices: int | None = None) -> list[Volume]:
    """Cut all volumes that rows name: a NIfTI file is one, and so are the DICOM files of one series.

    Args:
        rows: Of files, frames or slices; whichever of a volume's are there, all of it is taken.
        axes: What to cut them into.
        slices: At most so many of a volume along each axis, evenly spread; None: all.

    Returns:
        Volumes in the order of their first rows.  One that cannot be cut has a row that cannot be read.  A volume is
        anomalous if one of its rows is, and normal if all are.

    Raises:
        ConfigError: None of them is a volume.
    """
    groups: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
    kinds: dict[Path, tuple[str, str]] = {}
    for row in rows:
        if row.path not in kinds:
            kinds[row.path] = _volume_of(row.path)
        groups[kinds[row.path]].append(row)
    found = [_cut(kind, group, axes, slices) for (kind, _), group in groups.items()]
    if found and all(volume.error is not None for volume in found):
        raise ConfigError(f"axis: no volume can be cut. The first: {found[0].error}")
    return found


def _volume_of(path: Path) -> tuple[str, str]:
    """The kind of volume a file belongs to, and which it is."""
    try:
        kind = sniff_format(path)
    except (AnatomalyError, ValueError):  # told when it is read
        kind = None
    if kind == "dicom" and (uid := series_of(path)) is not None:
        return "series", uid
    return ("nifti" if kind == "nifti" else "picture"), os.path.realpath(path)


def series_of(path: Path) -> str | None:
    """SeriesInstanceUID of a DICOM file, or None where it has none that can be read."""
    try:
        import pydicom

        header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
        return str(header.get("SeriesInstanceUID") or "") or None
    except Exception:  # it is not installed, or one of its many ways to refuse a header
        return None


def _cut(kind: str, group: Sequence[Sample], axes: Sequence[Axis], slices: int | None) -> Volume:
    labels = {row.label for row in group}
    label: Literal[0, 1] | None = 1 if 1 in labels else 0 if labels == {0} else None
    row = replace(group[0], label=label, frame=None, mask=None)
    files = tuple(dict.fromkeys(each.path for each in group))
    try:
        if kind == "picture":
            raise ReadError(f"{row.path}: {NO_VOLUME}")
        if kind == "nifti":
            samples = [each for axis in axes for each in _of_nifti(row, axis, slices)]
        else:
            samples = list(_of_series(row, _ordered(row, files), axes, slices))
    except AnatomalyError as err:
        across = kind == "series"
        lost = replace(row, cut=Cut(axes[0], series=files if across else (), across=across))
        return Volume((lost,), str(err))
    return Volume(tuple(samples))


def _ordered(row: Sample, files: Sequence[Path]) -> Series:
    try:
        return read_series(files)
    except ReadError as err:
        raise ReadError(f"{row.path}: {err}") from err
    except OSError as err:
        raise ReadError(f"{row.path}: cannot be read ({err.strerror}).") from err


def _of_nifti(row: Sample, axis: Axis, slices: int | None) -> Iterator[Sample]:
    count, height, width = slice_grid(row.path, axis)
    _check_side(row.path, axis, height, width)
    for index in _spread(count, slices):
        yield replace(row, frame=index, cut=Cut(axis, index, _position(index, count)))


def _of_series(row: Sample, series: Series, axes: Sequence[Axis], slices: int | None) -> Iterator[Sample]:
    """Slices of a series: along the axis it was acquired along its own images, along others cut out of all of them."""
    affine, shape = series.space
    acquired = axis_of(grid_of(affine, shape, "axial"), 2)
    first = series.slices[0][0]
    ordered = tuple(dict.fromkeys(file for file, _ in series.slices))
    for axis in axes:
        grid = grid_of(affine, shape, axis)
        width, height, count = grid.sizes
        _check_side(row.path, axis, height, width)
        for index in _spread(count, slices):
            cut = Cut(axis, index, _position(index, count), ordered, across=axis != acquired)
            path, frame = (first, index) if cut.across else series.slices[grid.stored_index(index)]
            yield replace(row, path=path, frame=frame, cut=cut)


def _check_side(path: Path, axis: Axis, height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise ReadError(
            f"{path}: its {axis} slices are {height}x{width} voxels, expected at least {MIN_SIDE} on each side. "
            "Choose another --axis."
        )


def _spread(count: int, most: int | None) -> list[int]:
    """Indices of at most so many slices, the middles of equal parts of the volume."""
    if most is None or most >= count:
        return list(range(count))
    return [int((part + 0.5) * count / most) for part in range(most)]


def _position(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 0.5
