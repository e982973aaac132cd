"""One volume of maps for every volume of a run and axis it is cut along, whatever the order of its rows.

The maps of single slices are on disk already, so a volume is put together from them when its last slice is judged, or
when the run ends; none of them waits in memory.  Of a volume that is judged along several axes there is also one of
their mean, `combined_maps`.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.readers import sniff_format
from anatomaly.data.series import read_series
from anatomaly.data.volume_grid import Grid, Space, grid_of
from anatomaly.data.volumes import slice_grid, write_volume
from anatomaly.errors import AnatomalyError, OutputError, ReadError, ShapeError
from anatomaly.results.combined import combined_maps
from anatomaly.results.names import plain_name

if TYPE_CHECKING:
    from anatomaly.types import Axis, Sample


@dataclass
class _Volume:
    """A volume to be written: its source, how it is cut, its grid (slices, height, width), and the maps by slice."""

    source: Path | Space
    axis: Axis | None
    grid: tuple[int, int, int]
    stem: str
    files: tuple[Path, ...] = ()  # of a DICOM series
    own: Grid | None = None  # its maps lie as the images of the files do
    maps: dict[int, str] = field(default_factory=dict)


class MapVolumes:
    """The volumes of one run: `add` every map that is written, `settle` its volume after the row, and `finish`.

    Attributes:
        out: The folder of the run; all names are relative to it.
        across: Volumes that were written of slices across a DICOM series, or of all axes of one, and the series' files.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.across: dict[str, tuple[Path, ...]] = {}
        self._name_of: dict[tuple[str, Axis | None], str] = {}  # by source and axis
        self._begun: dict[str, _Volume] = {}  # by name, also those that were written
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
        cut = sample.cut
        of_series = cut is not None and bool(cut.series)
        if not sample.path.exists() or (not of_series and sniff_format(sample.path) != "nifti"):
            return None
        source = os.path.realpath(cut.series[0] if cut is not None and of_series else sample.path)
        key = source, None if cut is None else cut.axis
        name = self._name_of.get(key)
        volume = _begun(sample) if name is None else self._waiting.get(name)
        if volume is None:  # all slices were there before
            return None if name in self._failed else name
        index = (sample.frame or 0) if cut is None else cut.index
        expected = volume.grid[1:] if volume.own is None else volume.own.shape[1::-1]
        if not 0 <= index < volume.grid[0] or shape != expected:
            raise ShapeError(f"slice {index} and its map of {shape} do not fit the volume, now of {volume.grid}")
        if name is None:
            name = self._name_of[key] = self._new_name(volume.stem)
            self._waiting[name] = self._begun[name] = volume
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
            self._note(name, self._waiting.pop(name))
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
            Lines to tell: how many slices have no value, which volumes could not be put together, and which are means.

        Raises:
            OutputError: One cannot be written.
        """
        for name in list(self._waiting):
            self._write(name)
        together = self._combine()
        lines = [f"{name} is missing, though tables name it: {reason}" for name, reason in self._failed.items()]
        if missing := sum(self._gaps.values()):
            volumes = sum(gap > 0 for gap in self._gaps.values())
            lines.append(
                f"{volumes} of {len(self._gaps)} map volumes: {missing} slices were not judged and have no value "
                "there (NaN)."
            )
        return (*lines, *together)

    def _combine(self) -> list[str]:
        """Write the mean over all axes of every volume that was judged along several; returns lines to tell."""
        sources: defaultdict[str, dict[Axis, str]] = defaultdict(dict)
        for (source, axis), name in self._name_of.items():
            if axis is not None and name in self._gaps:
                sources[source][axis] = name
        made = lost = 0
        for names in (names for names in sources.values() if len(names) > 1):
            parts = {axis: self._begun[name] for axis, name in names.items()}
            first = next(iter(parts.values()))
            name = self._new_name(f"{first.stem.removesuffix(f'_{first.axis}')}_all")
            try:
                maps = {axis: _Stored(self.out, part) for axis, part in parts.items()}
                write_volume(combined_maps(maps, first.source), first.source, self.out / name, axis="axial")
            except OutputError:
                raise
            except (AnatomalyError, ValueError) as err:
                self._failed[name] = " ".join(str(err).split())
                lost += 1
            else:
                made += 1
                self.across |= {name: first.files} if first.files else {}
        return [f"{made} map volumes of all axes together: maps/NAME_all_map.nii.gz."] * (made > 0) + [
            f"{lost} volumes have no map of all axes together."
        ] * (lost > 0)

    def _write(self, name: str) -> None:
        volume = self._waiting.pop(name)
        try:
            write_volume(_Stored(self.out, volume), volume.source, self.out / name, axis=volume.axis)
        except OutputError:
            raise
        except (AnatomalyError, ValueError) as err:  # the source has changed, or somebody changed the maps
            self._failed[name] = " ".join(str(err).split())
        else:
            self._note(name, volume)

    def _note(self, name: str, volume: _Volume) -> None:
        """Note down that a volume was written."""
        self._gaps[name] = volume.grid[0] - len(volume.maps)
        if volume.files and volume.own is None:
            self.across[name] = volume.files

    def _new_name(self, stem: str) -> str:
        """`maps/NAME_map.nii.gz`, numbered where another volume of that name came first."""
        numbered = (f"maps/{stem}_map_{number}.nii.gz" for number in itertools.count(2))
        names = itertools.chain([f"maps/{stem}_map.nii.gz"], numbered)
        name = next(each for each in names if each.casefold() not in self._taken)
        self._taken.add(name.casefold())
        return name


def _begun(sample: Sample) -> _Volume:
    """The volume that an image is a slice of, without maps."""
    cut = sample.cut
    if cut is None or not cut.series:
        axis = None if cut is None else cut.axis
        grid = slice_grid(sample.path, axis)
        stem = plain_name(sample.path.name.removesuffix(".gz").removesuffix(".nii"))
        return _Volume(sample.path, axis, grid, stem + ("" if axis is None else f"_{axis}"))
    try:
        space = read_series(cut.series).space
    except OSError as err:
        raise ReadError("a file of the series is not there any more") from err
    grid_as_cut = grid_of(space.affine, space.shape, cut.axis)
    width, height, count = grid_as_cut.sizes
    stem = f"{plain_name(cut.series[0].absolute().parent.name)}_{cut.axis}"
    own = grid_as_cut if cut.own else None
    return _Volume(space, cut.axis, (count, height, width), stem, cut.series, own)


class _Stored(Mapping[int, NDArray[np.float32]]):
    """Maps by slice, each read when it is asked for, as the slices of the volume are shown."""

    def __init__(self, out: Path, volume: _Volume) -> None:
        self._out = out
        self._names, self._own = volume.maps, volume.own

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        file = self._out / self._names[index]
        try:
            stored: NDArray[np.float32] = np.load(file, allow_pickle=False)
        except (OSError, EOFError) as err:
            raise ReadError(f"{file}: cannot be read any more ({type(err).__name__}).") from err
        return stored if self._own is None else self._own.shown(stored.T[:, :, None])

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
