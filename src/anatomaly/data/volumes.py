"""NIfTI volumes: slices of a volume in, a volume of anomaly maps on the original voxel grid out.

How a volume is cut into slices stands in `volume_grid`.  Nobody asked for an axis: into axial ones, or, where those
would be too thin to read, into sagittal or coronal ones.  `write_volume` is the exact inverse.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.decoding import (
    Decoded,
    check_bytes,
    check_size,
    finite_limits,
    pick_frame,
    reading,
    usable_spacing,
)
from anatomaly.data.volume_grid import Grid, Space, grid_of, nibabel
from anatomaly.errors import OutputError, ReadError, ShapeError
from anatomaly.files import output_error

if TYPE_CHECKING:
    from anatomaly.types.cuts import Axis

_DEFLATE_RATIO = 1032  # at most
_BLOCK = 2**28  # bytes of a volume of maps that are in memory at a time
_MM_PER_UNIT = {"mm": 1.0, "meter": 1e3, "micron": 1e-3, "unknown": 1.0}


def count_slices(path: Path) -> int:
    """Number of slices of a NIfTI volume where no axis is asked for."""
    return _grid(_open_header(path)).sizes[2]


def decode(path: Path, frame: int | None, _apply_voi: bool, axis: Axis | None = None) -> Decoded:
    """Decode slice `frame` of a NIfTI volume, cut along `axis`; scl_slope and scl_inter are applied.

    NaN and infinite voxels stay; `limits` are then those of the whole volume, so that all slices get the same.

    Raises:
        ReadError: More than one volume inside, no such slice, colour or complex voxels, an affine without orientation.
        NotReadyError: nibabel is not installed.
    """
    image, stored = _open_volume(path, path.stat().st_mtime_ns)
    grid = _grid(image, axis)
    width, height, count = grid.sizes
    check_size(height, width)
    index = pick_frame(frame, count)

    voxels = stored.reshape(grid.shape)
    slope, intercept = np.float64(image.dataobj.slope), np.float64(image.dataobj.inter)
    pixels = (grid.shown(grid.slab(voxels, index)) * slope + intercept).astype(np.float32)
    limits = None if np.isfinite(pixels).all() else _volume_limits(voxels, slope, intercept)

    zooms = [float(zoom) for zoom in image.header.get_zooms()[:3]] + [1.0] * 3
    unit = _MM_PER_UNIT.get(image.header.get_xyzt_units()[0], 1.0)
    spacing = usable_spacing(zooms[grid.stored_axis(1)] * unit, zooms[grid.stored_axis(0)] * unit)
    thickness = usable_spacing(zooms[grid.stored_axis(2)] * unit, 1.0)
    return Decoded(
        pixels[None],
        None,
        index if count > 1 else None,
        spacing=spacing,
        limits=limits,
        thickness=None if thickness is None else thickness[0],
    )


def _volume_limits(voxels: NDArray[Any], slope: np.float64, intercept: np.float64) -> tuple[float, float] | None:
    """Lowest and highest finite value of a whole volume, a slab at a time."""
    slabs = (slab * slope + intercept for slab in np.moveaxis(voxels, -1, 0))
    found = [limits for slab in slabs if (limits := finite_limits(slab.astype(np.float32))) is not None]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


def slice_grid(path: Path, axis: Axis | None = None) -> tuple[int, int, int]:
    """(slices, height, width) of a NIfTI volume as it is cut, from its header alone.

    Raises:
        ReadError: The file cannot be opened, or is no volume.
    """
    with reading(path):
        width, height, count = _grid(_open_header(path), axis).sizes
    return count, height, width


def write_volume(
    maps: Mapping[int, NDArray[Any]],
    source: Path | Space,
    out: Path,
    *,
    dtype: type[np.float32 | np.uint8] = np.float32,
    axis: Axis | None = None,
) -> None:
    """Write the maps of a volume's slices as one NIfTI on the grid of `source`.

    Shape, axis order, affine and units are those of `source`, so viewers overlay the two voxel by voxel.  Header
    extensions are not copied: they may hold patient data.  No more than 256 MiB of the volume is in memory at a time.

    Args:
        maps: Slice number as in `read_image(..., frame=)` -> (H0, W0) map as displayed, looked up when it is needed.
            Slices without a map are NaN, or 0 where `dtype` has no NaN.
        source: The NIfTI volume the slices were read from; or where its voxels lie, if it is no NIfTI file.
        out: File to write, .nii.gz or .nii; whole or absent.
        dtype: float32, or uint8 for masks.
        axis: What the maps are of, as for `decode`.

    Raises:
        ReadError: `source` cannot be read.
        ShapeError: A map does not fit the slices of `source`, or there is no such slice.
        OutputError: `out` has another suffix or cannot be written.
    """
    if not out.name.endswith((".nii", ".nii.gz")):
        raise OutputError(f"{out}: has suffix {out.suffix!r}, expected .nii.gz or .nii. Rename the output.")
    name = source if isinstance(source, Path) else out
    with reading(name):
        image = _open_header(source) if isinstance(source, Path) else _empty(source)
        grid = _grid(image, axis)
    count = grid.sizes[2]
    if wrong := [index for index in maps if not 0 <= index < count]:
        raise ShapeError(f"{name}: there is a map for slice {wrong[0]}, the volume has slices 0..{count - 1}.")
    header = _map_header(image, dtype)
    part = out.with_name(out.name + ".part")
    try:
        with part.open("wb") as file, _packed(file, out) as stream:
            header.write_to(stream)
            stream.write(bytes(header.get_data_offset() - stream.tell()))
            for block in _blocks(maps, name, grid, dtype):
                stream.write(np.ascontiguousarray(block.T, header.get_data_dtype()).data)
        part.replace(out)
    except OSError as err:
        raise output_error(out, err) from err
    finally:
        with contextlib.suppress(OSError):  # the first failure is the one to report
            part.unlink(missing_ok=True)


def read_voxels(path: Path) -> NDArray[np.float32]:
    """All voxels of a volume that `write_volume` wrote, as they are stored.

    Raises:
        ReadError: It cannot be read, or takes more memory than `decoding.limit_decoded` allows.
    """
    with reading(path):
        image, voxels = _open(path, with_voxels=True)
        return np.asarray(voxels, np.float32).reshape(image.shape)


def _map_header(image: Any, dtype: type[np.float32 | np.uint8]) -> Any:
    """The header of a volume's maps: its grid, and nothing else of it."""
    header = image.header.copy()
    header.set_data_dtype(dtype)
    header["cal_min"] = header["cal_max"] = 0  # the source's display window means nothing for a map
    judged = dtype is np.float32
    header["descrip"] = b"anatomaly anomaly map; NaN: not judged" if judged else b"anatomaly mask; 1: marked"
    header.extensions.clear()
    maps = type(image)(np.broadcast_to(dtype(0), image.shape), image.affine, header)
    maps.update_header()
    maps.header.set_slope_inter(1, 0)
    return maps.header


def _packed(file: IO[bytes], out: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    """What to write to: gzip around the file, or the file."""
    if out.name.endswith(".gz"):
        return gzip.GzipFile("", "wb", 1, file, mtime=0)  # type: ignore[return-value]  # it has all that is used
    return contextlib.nullcontext(file)


def _blocks(
    maps: Mapping[int, NDArray[Any]], name: Path, grid: Grid, dtype: type[np.float32 | np.uint8]
) -> Iterator[NDArray[Any]]:
    """The stored volume of maps, cut along its last axis into blocks of bounded size."""
    width, height, _ = grid.sizes
    axis = grid.stored_axis(2)
    *plane, length = grid.shape
    step = max(1, _BLOCK // (4 * prod(plane)))
    for start in range(0, length, step):
        stop = min(start + step, length)
        block = np.full((*plane, stop - start), np.nan if dtype is np.float32 else 0, dtype, order="F")
        for index in maps:
            at = grid.stored_index(index)
            if axis == 2 and not start <= at < stop:
                continue
            anomaly_map = maps[index]
            if anomaly_map.shape != (height, width):
                raise ShapeError(
                    f"{name}: the map of slice {index} is {anomaly_map.shape}, slices are {(height, width)}. "
                    "Restore maps to the source grid first."
                )
            slab = np.take(grid.stored(anomaly_map), 0, axis)
            if axis == 2:
                block[:, :, at - start] = slab
            else:
                np.moveaxis(block, axis, 0)[at] = slab[:, start:stop]
        yield block


def _empty(space: Space) -> Any:
    """The header of a volume in mm that is on no disk."""
    image = nibabel().Nifti1Image(np.broadcast_to(np.float32(0), space.shape), space.affine)
    image.header.set_xyzt_units("mm")
    return image


@lru_cache(maxsize=1)
def _open_volume(path: Path, _modified_ns: int) -> tuple[Any, NDArray[Any]]:
    """The image and its unscaled voxels; one volume is kept, because its slices are read one after the other."""
    return _open(path, with_voxels=True)


def _open_header(path: Path) -> Any:
    return _open(path, with_voxels=False)[0]


def _open(path: Path, *, with_voxels: bool) -> tuple[Any, NDArray[Any]]:
    """Open by content, whatever the file is called."""
    library = nibabel()
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else path.open("rb") as stream:
        start = stream.read(348)
        stream.seek(0)
        if start[344:348] == b"ni1\0" or start[4:8] == b"ni2\0":
            raise ReadError("is the header half of a .hdr/.img pair. Convert the pair to one .nii.gz file.")
        kind = library.Nifti2Image if start[4:8] == b"n+2\0" else library.Nifti1Image
        header = kind.header_class.from_fileobj(stream)
        if not np.isfinite(header["scl_inter"]):  # nibabel would refuse it; an invalid slope it takes as 1
            header["scl_inter"] = 0
        image = kind(kind.ImageArrayProxy(stream, header), header.get_best_affine(), header)
        dtype = image.get_data_dtype()
        if dtype.kind not in "iuf":
            raise ReadError(f"has voxels of type {dtype}, expected real numbers. Convert it to a grey volume.")
        _check_length(image, path.stat().st_size, zipped)
        if not with_voxels:
            return image, np.empty(0)
        if not zipped:  # nothing is read before a slice is taken
            proxy = image.dataobj
            return image, np.memmap(path, proxy.dtype, "r", proxy.offset, proxy.shape, "F")
        voxels = image.dataobj.get_unscaled()
        while stream.read(2**20):  # the checksum is only looked at when the end is reached
            pass
        return image, voxels


def _check_length(image: Any, file_size: int, zipped: bool) -> None:
    """Compare the voxels that the header declares with the file and, where all are unpacked at once, with the limit."""
    proxy = image.dataobj
    length = prod(int(side) for side in proxy.shape) * int(proxy.dtype.itemsize)
    if length + int(proxy.offset) > file_size * (_DEFLATE_RATIO if zipped else 1):
        raise ReadError("ends before its voxels do. It is corrupt or truncated: copy or export it again.")
    if length <= 0:
        raise ReadError(f"has shape {proxy.shape}, in which there are no voxels. Export it again.")
    if zipped:
        shape = "x".join(map(str, proxy.shape))
        check_bytes(length, f"is a packed volume of {shape} voxels", "Unpack it (gunzip), then it is read in slices")


def _grid(image: Any, axis: Axis | None = None) -> Grid:
    if any(length != 1 for length in image.shape[3:]):
        raise ReadError(
            f"has shape {image.shape}, expected one 3-D volume. "
            "Save the volume you want on its own (nibabel.four_to_three or fslsplit)."
        )
    return grid_of(image.affine, image.shape, axis)
