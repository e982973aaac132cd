"""A DICOM series as a volume: its slices in the order of their places, never of their names, or why it is none."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anatomaly.data import dicom
from anatomaly.data.decoding import Decoded, check_bytes, check_size, pick_frame, usable_spacing
from anatomaly.data.dicom_geometry import Geometry, geometry_of
from anatomaly.data.volume_grid import Space, grid_of
from anatomaly.errors import AnatomalyError, ReadError
from anatomaly.files import file_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anatomaly.types.cuts import Axis

_TAGS = [
    *("SOPClassUID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "FrameOfReferenceUID"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
_TO_RIGHT_FRONT_HEAD = np.array([-1.0, -1.0, 1.0])  # DICOM counts to the left and to the back
#: Slices closer than this lie at one place, mm.
_ONE_PLACE = 1e-3
#: How far a slice may lie from where even spacing puts it, as a share of the spacing.
_UNEVEN = 0.1
_ALONE = "Leave out --axis to judge the images one by one"


class Series(NamedTuple):
    """A volume made of DICOM images.

    Attributes:
        slices: (file, frame) in the order of their places along the normal; the frame is None in a file of one.
        space: Where the voxels lie, stored as [column, row, slice].
    """

    slices: tuple[tuple[Path, int | None], ...]
    space: Space


class _Placed(NamedTuple):
    file: Path
    frame: int | None
    geometry: Geometry
    size: tuple[int, int, int]  # rows, columns, samples

    @property
    def name(self) -> str:
        name = f"{self.file.parent.name}/{self.file.name}"  # copies in two folders are one series
        return name if self.frame is None else f"{name}#{self.frame}"


def read_series(files: Sequence[Path]) -> Series:
    """Put the images of one series in order.

    Args:
        files: At least one; their order and names do not matter.

    Raises:
        ReadError: The images are no volume: a place is missing, taken twice or unknown, or planes differ.
    """
    return _series(tuple(files), tuple(_stamp(file) for file in files))


def decode(files: Sequence[Path], axis: Axis, frame: int | None, apply_voi: bool) -> Decoded:
    """Decode one slice of a series, cut along `axis` out of all its images.

    Args:
        files: As for `read_series`.
        axis: As for `volume_grid.grid_of`.
        frame: Number of the slice.
        apply_voi: As for `dicom.decode`; every image by its own window.

    Raises:
        ReadError: As `read_series` and `dicom.decode`; or its images are in colour or not shown alike.
    """
    series = read_series(files)
    grid = grid_of(series.space.affine, series.space.shape, axis)
    width, height, count = grid.sizes
    check_size(height, width)
    index = pick_frame(frame, count)
    voxels, shown = _voxels(tuple(files), tuple(_stamp(file) for file in files), apply_voi)
    pixels = np.ascontiguousarray(grid.shown(grid.slab(voxels, index)))
    lengths = np.linalg.norm(series.space.affine[:3, :3], axis=0)
    spacing = usable_spacing(lengths[grid.stored_axis(1)], lengths[grid.stored_axis(0)])
    thickness = float(lengths[grid.stored_axis(2)])
    return shown._replace(pixels=pixels[None], frame=index, spacing=spacing, thickness=thickness)


def digest(files: Sequence[Path]) -> str:
    """Digest of all files, in any order."""
    return _digest(tuple(files), tuple(_stamp(file) for file in files))


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4)
def _digest(files: tuple[Path, ...], _stamps: tuple[tuple[int, int], ...]) -> str:
    return hashlib.sha256("".join(sorted(map(file_digest, files))).encode()).hexdigest()


@lru_cache(maxsize=4)
def _series(files: tuple[Path, ...], _stamps: tuple[tuple[int, int], ...]) -> Series:
    placed = [each for file in files for each in _placed(file)]
    first = placed[0]
    for each in placed:
        if each.size != first.size:
            raise ReadError(
                f"is no volume: {each.name} is {each.size[0]}x{each.size[1]} pixels, {first.name} is "
                f"{first.size[0]}x{first.size[1]}; expected one size. Keep scouts and volumes apart. {_ALONE}."
            )
        if not first.geometry.fits(each.geometry):
            raise ReadError(
                f"is no volume: {each.name} and {first.name} differ in orientation, pixel spacing or frame of "
                f"reference; expected the same of all slices. Keep scouts and volumes apart. {_ALONE}."
            )
    if len(placed) < 2:
        raise ReadError(f"is a series of one image, expected at least 2 to make a volume. {_ALONE}.")
    placed.sort(key=lambda each: each.geometry.along)
    places = np.array([each.geometry.position for each in placed])
    gaps = np.diff([each.geometry.along for each in placed])
    if (gaps < _ONE_PLACE).any():
        k = int(gaps.argmin())
        raise ReadError(
            f"is no volume: {placed[k].name} and {placed[k + 1].name} lie at one place "
            f"({placed[k].geometry.along:.4g} mm), expected one image there. Keep phases and echoes apart. {_ALONE}."
        )
    step = (places[-1] - places[0]) / (len(placed) - 1)
    off = np.linalg.norm(places - (places[0] + np.arange(len(placed))[:, None] * step), axis=1)
    if (off > _UNEVEN * np.linalg.norm(step)).any():
        k = int(gaps.argmax())
        raise ReadError(
            f"is no volume: its slices are {gaps.min():.4g} to {gaps.max():.4g} mm apart, most between "
            f"{placed[k].name} and {placed[k + 1].name}; expected even spacing in one line. Add the missing slices. "
            f"{_ALONE}."
        )
    geometry = placed[0].geometry
    affine = np.eye(4)
    steps = (geometry.axes[:3] * geometry.spacing[1], geometry.axes[3:] * geometry.spacing[0], step, places[0])
    affine[:3] = np.stack(steps, axis=1) * _TO_RIGHT_FRONT_HEAD[:, None]
    rows, columns, _ = first.size
    return Series(tuple((each.file, each.frame) for each in placed), Space(affine, (columns, rows, len(placed))))


def _placed(file: Path) -> list[_Placed]:
    """The images of a file with their places."""
    header = _header(file)
    frames = int(header.get("NumberOfFrames") or 1)
    size = int(header.get("Rows") or 0), int(header.get("Columns") or 0), int(header.get("SamplesPerPixel") or 1)
    found = []
    for frame in range(frames):
        geometry = geometry_of(header, frame)
        if geometry is None:
            raise ReadError(
                f"is no volume: {file.name} does not say where it lies (position, orientation, pixel spacing, frame of "
                f"reference), expected that of every slice. {_ALONE}."
            )
        found.append(_Placed(file, frame if frames > 1 else None, geometry, size))
    return found


def _header(file: Path) -> Any:
    import pydicom

    try:
        return pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=_TAGS)
    except OSError:
        raise
    except Exception as err:  # pydicom's messages may quote the header
        raise ReadError(
            f"is no volume: the header of {file.name} cannot be read ({type(err).__name__}). Export it again."
        ) from err


@lru_cache(maxsize=1)
def _voxels(
    files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...], apply_voi: bool
) -> tuple[NDArray[np.float32], Decoded]:
    """All voxels of a series, [column, row, slice], and what holds for every slice; one series is kept."""
    series = _series(files, stamps)
    shape = series.space.shape
    check_bytes(4 * prod(shape), f"is a series of {'x'.join(map(str, shape))} voxels", "Judge it without --axis")
    voxels = np.empty(shape, np.float32)
    found = []
    for number, (file, frame) in enumerate(series.slices):
        try:
            decoded = dicom.decode(file, frame, apply_voi)
        except AnatomalyError as err:
            raise type(err)(f"is no volume: {file.name} {err}") from err
        if len(decoded.pixels) != 1:
            raise ReadError(f"is no volume: {file.name} is in colour, expected grey slices. {_ALONE}.")
        voxels[:, :, number] = decoded.pixels[0].T
        found.append(decoded._replace(pixels=np.empty(0)))
    shown = [(each.invert, each.value_range == (0.0, 1.0)) for each in found]
    if len(set(shown)) > 1:
        other = next(number for number, each in enumerate(shown) if each != shown[0])
        raise ReadError(
            f"is no volume: {series.slices[other][0].name} is not shown like {series.slices[0][0].name} (inverted, or "
            "with a window of its own). Give --intensity RULE for all slices."
        )
    ranges = [each.value_range for each in found if each.value_range is not None]
    value_range = (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None
    notes = dict.fromkeys(each.note for each in found if each.note is not None)
    return voxels, found[0]._replace(value_range=value_range, note="; ".join(notes) or None)
