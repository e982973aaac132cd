"""One volume of maps for every NIfTI file of a run, whatever the order of its rows.

The maps of single slices are on disk already, so a volume is put together from them when its last slice is judged, or
when the run ends; none of them waits in memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.readers import sniff_format
from anatomaly.data.volumes import slice_grid, write_volume
from anatomaly.errors import AnatomalyError, OutputError, ReadError, ShapeError
from anatomaly.results.names import plain_name

if TYPE_CHECKING:
    from anatomaly.types import Sample


@dataclass
class _Volume:
    """A volume to be written: its source, its grid, and the maps by slice."""

    source: Path
    grid: tuple[int, int, int]
    maps: dict[int, str] = field(default_factory=dict)


class MapVolumes:
    """The volumes of one run: `add` every map that is written, `settle` its volume after the row, and `finish`.

    Attributes:
        out: The folder of the run; all names are relative to it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._name_of: dict[str, str] = {}  # by source
        self._waiting: dict[str, _Volume] = {}  # by name
        self._taken: set[str] = set()
        self._gaps: dict[str, int] = {}  # by name of every volume that was written: slices without a map
        self._failed: dict[str, str] = {}  # by name: why

    def add(self, sample: Sample, map_name: str, shape: tuple[int, ...]) -> str | None:
        """Note a map down.

        Args:
            sample: The image it belongs to.
            map_name: The file that holds it.
            shape: (H, W) of the map.

        Returns:
            The volume that holds it now or will, or None where the image is no NIfTI file.

        Raises:
            ReadError: The file has changed since it was read.
            ShapeError: Likewise.
        """
        if not sample.path.exists() or sniff_format(sample.path) != "nifti":
            return None
        source = os.path.realpath(sample.path)
        name = self._name_of.get(source)
        volume = _Volume(sample.path, slice_grid(sample.path)) if name is None else self._waiting.get(name)
        if volume is None:  # all slices were there before
            return None if name in self._failed else name
        index = sample.frame or 0
        if not 0 <= index < volume.grid[0] or shape != volume.grid[1:]:
            raise ShapeError(f"slice {index} and its map of {shape} do not fit the volume, now of {volume.grid}")
        if name is None:
            name = self._name_of[source] = self._new_name(sample.path)
            self._waiting[name] = volume
        volume.maps[index] = map_name
        return name

    def take_up(self, sample: Sample, map_name: str, shape: tuple[int, ...], name: str) -> None:
        """Note a map down that an interrupted run wrote; a volume that it finished is not written again.

        Args:
            sample: As for `add`.
            map_name: As for `add`.
            shape: As for `add`.
            name: The volume that the row names.

        Raises:
            OutputError: A volume whose last slice this is was not written, and cannot be.
        """
        try:
            same = self.add(sample, map_name, shape) == name
            reason = "its source is another one now"
        except AnatomalyError as err:
            same, reason = False, " ".join(str(err).split())
        if not same:
            self._failed.setdefault(name, reason)
            self._taken.add(name.casefold())
        elif name in self._waiting and self._whole(name) and (self.out / name).is_file():
            del self._waiting[name]
            self._gaps[name] = 0
        else:
            self.settle(name)

    def settle(self, name: str) -> None:
        """Write a volume if all its slices are there.

        Raises:
            OutputError: It cannot be written.
        """
        if name in self._waiting and self._whole(name):
            self._write(name)

    def _whole(self, name: str) -> bool:
        return len(self._waiting[name].maps) == self._waiting[name].grid[0]

    def finish(self) -> tuple[str, ...]:
        """Write the volumes that miss slices.

        Returns:
            Lines to tell: how many slices have no value, and which volumes could not be put together.

        Raises:
            OutputError: One cannot be written.
        """
        for name in list(self._waiting):
            self._write(name)
        lines = [f"{name} is missing, though tables name it: {reason}" for name, reason in self._failed.items()]
        if missing := sum(self._gaps.values()):
            volumes = sum(gap > 0 for gap in self._gaps.values())
            lines.append(
                f"{volumes} of {len(self._gaps)} map volumes: {missing} slices were not judged and have no value "
                "there (NaN)."
            )
        return tuple(lines)

    def _write(self, name: str) -> None:
        volume = self._waiting.pop(name)
        try:
            write_volume(_Stored(self.out, volume.maps), volume.source, self.out / name)
        except OutputError:
            raise
        except (AnatomalyError, ValueError) as err:  # the source has changed, or somebody changed the maps
            self._failed[name] = " ".join(str(err).split())
        else:
            self._gaps[name] = volume.grid[0] - len(volume.maps)

    def _new_name(self, source: Path) -> str:
        """`maps/NAME_map.nii.gz`, numbered where another volume of that name came first."""
        stem = plain_name(source.name.removesuffix(".gz").removesuffix(".nii"))
        numbered = (f"maps/{stem}_map_{number}.nii.gz" for number in itertools.count(2))
        names = itertools.chain([f"maps/{stem}_map.nii.gz"], numbered)
        name = next(each for each in names if each.casefold() not in self._taken)
        self._taken.add(name.casefold())
        return name


class _Stored(Mapping[int, NDArray[np.float32]]):
    """Maps by slice, each read when it is asked for."""

    def __init__(self, out: Path, names: Mapping[int, str]) -> None:
        self._out = out
        self._names = names

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        file = self._out / self._names[index]
        try:
            stored: NDArray[np.float32] = np.load(file, allow_pickle=False)
        except (OSError, EOFError) as err:
            raise ReadError(f"{file}: cannot be read any more ({type(err).__name__}).") from err
        return stored

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
