"""The results of a run as DICOM: new series of the study that the images came from, under OUT/dicom/.

One folder a series, made from the maps and overlays on disk when the run is done, one series at a time.  Nothing here
can cost a verdict: an object that cannot be made is told, and the next one is made.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.decoding import check_bytes
from anatomaly.data.readers import sniff_format
from anatomaly.data.series import read_series
from anatomaly.data.volumes import read_voxels
from anatomaly.errors import AnatomalyError, ConfigError, NotReadyError, ReadError
from anatomaly.files import write_whole
from anatomaly.results.dicom_objects import Maker, caption, parametric_map, picture, segmentation, uid_of
from anatomaly.results.dicom_picture import framed_picture
from anatomaly.results.dicom_planes import Plane, quiet, read_planes, series_of, stacks
from anatomaly.results.marking import Marking, marked, rows_with_maps
from anatomaly.results.names import SeriesNames

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_WORDS = {
    "overlay": "overlays (Secondary Capture)",
    "marked": "segmentations at the threshold",
    "map01": "fractional segmentations",
    "map": "parametric maps",
}
_NO_GEOMETRY = "the frames have no position in space, which objects of several frames need"
_NO_IMAGES = "slices across a series are no images of it; maps/ has them"
_NO_FRAME_OF_REFERENCE = "the source has no position in space (frame of reference), which they need"


def check_dicom(*, maps: bool, overlays: bool) -> None:
    """Refuse a run that could not write DICOM, before it begins.

    Raises:
        ConfigError: Maps or overlays are not written, of which the objects are made.
        NotReadyError: highdicom is not installed.
    """
    if not (maps and overlays):
        raise ConfigError("dicom: objects are made of maps and overlays. Leave out --maps false and --overlays false.")
    if find_spec("highdicom") is None:
        raise NotReadyError('dicom: highdicom is not installed. Run: pip install "anatomaly[dicom-out]"')


def write_dicom(
    out: Path, maker: Maker, marking: Marking | None, across: Mapping[str, Sequence[Path]] | None = None
) -> tuple[str, ...]:
    """Write the DICOM objects of a finished run to OUT/dicom/.

    Every judged DICOM image gets a picture.  Every stack of them (see `dicom_planes`), and every image alone that has
    no place in space, gets a fractional segmentation, a parametric map where it has a frame of reference, and a binary
    segmentation where there is a `marking`.

    Args:
        out: The folder of the run, with its `scores.jsonl`.
        maker: What made the verdicts.
        marking: Which pixels are marked; None without a calibration or a rate.
        across: Map volumes of slices across a DICOM series, and its files: each becomes a parametric map on the images
            of the series.

    Returns:
        Lines to tell: what was written, and what was not, and why.
    """
    by_series: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    files: dict[str, str | None] = {}  # path to series; None where it is no DICOM file
    told: Counter[tuple[str, str]] = Counter()  # what was not made, and why
    for row in rows_with_maps(out):
        path = row["path"]
        if path not in files:
            files[path] = _series_or_none(Path(path))
            if files[path] == "":
                told["files", "they name no series"] += 1
        if files[path]:
            by_series[str(files[path])].append(row)
    volumes: defaultdict[str, dict[str, Sequence[Path]]] = defaultdict(dict)
    for name, paths in (across or {}).items():
        volumes[str(_series_or_none(paths[0]))][name] = paths
    if not by_series and not told:
        return ("dicom: no image is a DICOM file; nothing was written to dicom/.",)
    written: Counter[str] = Counter()
    names = SeriesNames()
    for uid, rows in by_series.items():
        series = _Series(out, names.new(Path(rows[0]["path"])), uid, maker, marking)
        with quiet():
            if own := [row for row in rows if not row.get("across")]:
                series.write(own)
            for name, paths in volumes[uid].items():
                series.write_across(name, paths, rows[0]["scale"])
            if len(own) < len(rows):
                told["overlays and segmentations", _NO_IMAGES] += len(rows) - len(own)
        written.update(series.written)
        told.update(series.told)
    done = ", ".join(f"{words}: {written[kind]}" for kind, words in _WORDS.items() if written[kind])
    lines = [f"dicom: written to {out / 'dicom'}: {done or 'nothing'}."]
    if marking is None:
        lines.append("dicom: no segmentations at a threshold: they need a calibrated model and --alpha.")
    lines += [f"dicom: {what} not made: {count}, {reason}." for (what, reason), count in told.items()]
    return tuple(lines)


class _Series:
    """The objects of one source series."""

    def __init__(self, out: Path, name: str, uid: str, maker: Maker, marking: Marking | None) -> None:
        self.written: Counter[str] = Counter()
        self.told: Counter[tuple[str, str]] = Counter()
        self._out, self._folder = out, out / "dicom" / name
        self._uid, self._maker, self._marking = uid, maker, marking
        self._content: list[tuple[Any, ...]] = []

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        try:
            planes = read_planes(rows)
        except AnatomalyError as err:
            self.told["series", _reason(err)] += 1
            return
        self._content = [
            (str(each.header.SOPInstanceUID), each.frame, each.row["score"], each.row["p_value"]) for each in planes
        ]
        for plane in planes:
            if plane.row["overlay"] is not None:
                self._make("overlay", [plane])
        placed = [plane for plane in planes if plane.geometry is not None]
        for stack in stacks(placed):
            self._make_all(stack)
        for plane in planes:
            if plane.geometry is None and plane.frames == 1:
                self._make_all([plane])
        if manyframed := {plane.row["path"] for plane in planes if plane.geometry is None and plane.frames > 1}:
            self.told["segmentations and parametric maps", _NO_GEOMETRY] += len(manyframed)

    def write_across(self, name: str, files: Sequence[Path], scale: Sequence[float]) -> None:
        """Bring a map volume back to the images of the series, as a parametric map."""
        axis = name.removesuffix("_map.nii.gz").rpartition("_")[2]
        number = self.written["map"] + 1
        try:
            slices = read_series(files).slices
            nothing = {"score": None, "p_value": None, "scale": scale, "spacing": None}
            planes = read_planes({"path": str(file), "frame": frame, **nothing} for file, frame in slices)
            maps = np.ascontiguousarray(read_voxels(self._out / name).T)
            if not np.isfinite(maps).all():
                raise ReadError("slices that were not judged have no value, which a parametric map must have")
            content = hashlib.sha256(maps.tobytes()).hexdigest()
            series = uid_of("map", self._uid, self._maker, axis, content)
            made = parametric_map(planes, maps, self._maker, series=series, number=number, axis=axis)
            self._save(made, f"map_{number:04d}.dcm")
        except AnatomalyError as err:
            self.told[f"parametric maps of {axis} slices", _reason(err)] += 1
        except Exception as err:  # as in _make
            self.told[
                f"parametric maps of {axis} slices", f"the source cannot be referred to ({type(err).__name__})"
            ] += 1
        else:
            self.written["map"] += 1

    def _make_all(self, stack: list[Plane]) -> None:
        self._make("map01", stack)
        if self._marking is not None:
            self._make("marked", stack)
        if stack[0].geometry is None:
            self.told[_WORDS["map"], _NO_FRAME_OF_REFERENCE] += 1
        else:
            self._make("map", stack)

    def _make(self, kind: str, stack: list[Plane]) -> None:
        """Make and write one object; whatever goes wrong is told."""
        number = self.written[kind] + 1
        series = uid_of(kind, self._uid, self._maker, self._marking, self._content)
        try:
            made = self._object(kind, stack, series, number)
            self._save(made, f"{kind}_{number:04d}.dcm")
        except AnatomalyError as err:
            self.told[_WORDS[kind], _reason(err)] += 1
        except Exception as err:  # highdicom's and pydicom's, whose messages may quote the header
            self.told[_WORDS[kind], f"the source cannot be referred to ({type(err).__name__})"] += 1
        else:
            self.written[kind] += 1

    def _object(self, kind: str, stack: list[Plane], series: str, number: int) -> Dataset:
        if kind == "overlay":
            pixels, zoom = framed_picture(
                self._out / stack[0].row["overlay"], scale=stack[0].row["scale"], caption=caption(stack[0].row)
            )
            return picture(stack[0], pixels, self._maker, series=series, number=number, zoom=zoom)
        low, high = stack[0].row["scale"]
        if kind == "marked":
            assert self._marking is not None
            return segmentation(
                stack,
                self._load(stack, np.bool_),
                self._maker,
                series=series,
                number=number,
                label=f"Anomaly at {self._marking.name} - RESEARCH ONLY",
                meaning=f"Where images called at a {self._marking.name} are unlike the normal images they were "
                "compared with. Research only, not for diagnosis.",
            )
        maps = self._load(stack, np.float32)
        if kind == "map":
            return parametric_map(stack, maps, self._maker, series=series, number=number)
        np.clip((np.nan_to_num(maps, copy=False, nan=low) - low) / (high - low), 0, 1, out=maps)
        return segmentation(
            stack,
            maps,
            self._maker,
            series=series,
            number=number,
            label=f"Anomaly map, 0={low:.3g}, 1={high:.3g} or more - RESEARCH ONLY",
            meaning=f"0 is a map value of {low:.6g} or less, 1 of {high:.6g} or more, the ends of the run's colour "
            "scale. No probability. Research only, not for diagnosis.",
        )

    def _load(self, stack: list[Plane], dtype: type) -> NDArray[Any]:
        """The maps of a stack, or its marked pixels, (planes, H, W)."""
        shape = (len(stack), int(stack[0].header.Rows), int(stack[0].header.Columns))
        check_bytes(
            2 * 4 * int(np.prod(shape)), f"a series of {shape[0]} maps of {shape[1]}x{shape[2]}", "Judge fewer slices"
        )
        pixels: NDArray[Any] = np.empty(shape, dtype)
        for place, plane in zip(pixels, stack, strict=True):
            row = plane.row
            anomaly_map = np.load(self._out / row["map"], allow_pickle=False)
            if dtype is np.bool_:
                assert self._marking is not None
                anomaly_map = marked(anomaly_map, score=row["score"], p_value=row["p_value"], marking=self._marking)
            place[...] = anomaly_map
        return pixels

    def _save(self, made: Dataset, name: str) -> None:
        import io

        content = io.BytesIO()
        made.save_as(content, enforce_file_format=True)
        write_whole(self._folder / name, content.getvalue())


def _reason(err: AnatomalyError) -> str:
    return " ".join(str(err).split()).rstrip(".")


def _series_or_none(path: Path) -> str | None:
    """The series of a DICOM file, "" where it names none; None for other files and those that are gone."""
    try:
        return (series_of(path) or "") if sniff_format(path) == "dicom" else None
    except (AnatomalyError, ValueError):  # ValueError: a name no file has
        return None
