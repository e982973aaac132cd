"""The voxel grid of a volume, and how it is cut into slices.

A slice is shown the same way whatever order and direction the file stores its axes in.  With the stored axes flipped
and permuted to the closest canonical orientation (x to the patient's right, y to the front, z to the head), slice k is

    axial     displayed[row, column] = canonical[x=column, y=Ny-1-row, z=k]   from inferior to superior
    coronal   displayed[row, column] = canonical[x=column, y=k, z=Nz-1-row]   from posterior to anterior
    sagittal  displayed[row, column] = canonical[x=k, y=column, z=Nz-1-row]   from left to right
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.decoding import MIN_SIDE
from anatomaly.errors import NotReadyError, ReadError
from anatomaly.types.cuts import Axis

if TYPE_CHECKING:
    from collections.abc import Sequence

AXES: tuple[Axis, ...] = get_args(Axis)
#: For canonical x, y, z: which is it of a slice's columns (0), its rows upwards (1) and the slices (2)?
_AS_CUT: dict[Axis, tuple[int, int, int]] = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (2, 0, 1)}


class Space(NamedTuple):
    """Where voxels lie.

    Attributes:
        affine: (4, 4): voxel indices to mm, x to the patient's right, y to the front, z to the head.
        shape: Of the stored volume.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]


class Grid(NamedTuple):
    """How the three stored axes lie in a volume as it is cut: columns, rows (upwards), slices.

    Attributes:
        orientation: (3, 2): axis as cut and direction (1 or -1) of every stored axis.
        shape: Of the stored volume.
    """

    orientation: NDArray[np.float64]
    shape: tuple[int, int, int]

    def stored_axis(self, axis_as_cut: int) -> int:
        """The stored axis along a slice's columns (0), its rows (1) or the slices (2)."""
        return int(np.flatnonzero(self.orientation[:, 0] == axis_as_cut)[0])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(width, height, slices)."""
        width, height, count = (self.shape[self.stored_axis(axis)] for axis in range(3))
        return width, height, count

    def stored_index(self, index: int) -> int:
        """Where slice `index` lies on the stored axis of the slices; its own inverse."""
        forward = self.orientation[self.stored_axis(2), 1] == 1
        return index if forward else self.sizes[2] - 1 - index

    def slab(self, voxels: NDArray[Any], index: int) -> NDArray[Any]:
        """The stored voxels of slice `index`, an array with one entry along the axis of the slices."""
        return np.take(voxels, [self.stored_index(index)], self.stored_axis(2))

    def shown(self, slab: NDArray[Any]) -> NDArray[Any]:
        """A slab as it is displayed, (height, width)."""
        shown: NDArray[Any] = nibabel().apply_orientation(slab, self.orientation)[:, :, 0].T[::-1]
        return shown

    def stored(self, shown: NDArray[Any]) -> NDArray[Any]:
        """The reverse of `shown`."""
        order = nibabel().orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], self.orientation)
        slab: NDArray[Any] = nibabel().apply_orientation(shown[::-1].T[..., None], order)
        return slab


def grid_of(affine: NDArray[Any], shape: Sequence[int], axis: Axis | None = None) -> Grid:
    """The grid of a volume.

    Args:
        affine: (4, 4), as of `Space`.
        shape: Of the stored volume; missing axes have length 1.
        axis: How it is cut.  None: axial, unless such slices would be too small to read and those along one other axis
            are not, as in a volume of one sagittal slice.

    Raises:
        ReadError: The affine is singular.
    """
    orientation = nibabel().io_orientation(affine)
    if not np.isfinite(orientation).all():
        raise ReadError("has a singular affine, so its axes have no direction. Repair its sform or qform.")
    x, y, z = (*map(int, shape), 1, 1, 1)[:3]
    grid = Grid(orientation, (x, y, z))
    if axis is None:
        thin = [number for number, length in enumerate(grid.sizes) if length < MIN_SIDE]
        axis = "sagittal" if thin == [0] else "coronal" if thin == [1] else "axial"
    turned = orientation.copy()
    turned[:, 0] = [_AS_CUT[axis][int(canonical)] for canonical in orientation[:, 0]]
    return grid._replace(orientation=turned)


def axis_of(grid: Grid, stored: int) -> Axis:
    """The kind of slices that a canonically oriented grid has along one of its stored axes."""
    axes: tuple[Axis, ...] = ("sagittal", "coronal", "axial")
    return axes[int(grid.orientation[stored, 0])]


def nibabel() -> Any:
    """The optional library, imported on first use."""
    try:
        import nibabel
    except ModuleNotFoundError as err:
        raise NotReadyError('is a NIfTI file, nibabel is not installed. Run: pip install "anatomaly[nifti]"') from err
    return nibabel
