"""The maps of one volume along several axes as one: their mean at every voxel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.decoding import check_bytes
from anatomaly.data.volume_grid import grid_of
from anatomaly.data.volumes import slice_grid

if TYPE_CHECKING:
    from anatomaly.data.volume_grid import Space
    from anatomaly.types import Axis

#: Where slices along an axis lie in a canonical volume [x, y, z], turned so that they come first.
_FIRST: dict[Axis, tuple[int, int, int]] = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}


def combined_maps(
    maps: Mapping[Axis, Mapping[int, NDArray[np.float32]]], source: Path | Space
) -> Mapping[int, NDArray[np.float32]]:
    """Axial slices of the mean over the axes.

    Where slices were left out along an axis, every voxel has the value of the nearest slice that was judged.

    Args:
        maps: By axis, then by slice, as displayed; see `data.volume_grid`.  At least one of each.
        source: What they are maps of.

    Raises:
        ReadError: The volume does not fit into memory, or a map cannot be read.
    """
    count, height, width = _grid(source)
    shape = width, height, count  # x, y, z
    sides = "x".join(map(str, shape))
    check_bytes(4 * prod(shape), f"is a volume of {sides} voxels", "Judge it along one axis")
    total = np.zeros(shape, np.float32)
    for axis, slices in maps.items():
        judged = np.array(sorted(slices))
        turned = np.transpose(total, _FIRST[axis])
        nearest = judged[np.abs(np.arange(len(turned))[:, None] - judged).argmin(axis=1)]
        for index in judged:
            turned[nearest == index] += slices[int(index)][::-1].T
    total /= len(maps)
    return _Axial(total)


def _grid(source: Path | Space) -> tuple[int, int, int]:
    if isinstance(source, Path):
        return slice_grid(source, "axial")
    width, height, count = grid_of(source.affine, source.shape, "axial").sizes
    return count, height, width


class _Axial(Mapping[int, NDArray[np.float32]]):
    """Axial slices of a canonical volume, as displayed."""

    def __init__(self, volume: NDArray[np.float32]) -> None:
        self._volume = volume

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        return self._volume[:, :, index].T[::-1]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._volume.shape[2]))

    def __len__(self) -> int:
        return len(self._volume.T)
