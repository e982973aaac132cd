"""Where the judged images of a DICOM series lie: planes, put into stacks by their geometry and never by file name.

A stack is what one Segmentation or Parametric Map can hold: planes of one series that share frame of reference, size,
orientation and pixel spacing, one at every position, from the first to the last along their normal.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.data.dicom_geometry import Geometry, geometry_of
from anatomaly.errors import ReadError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pydicom.dataset import Dataset

#: Elements that every object has, though a careless writer may leave them out; empty says "unknown".
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    *("StudyTime", "ReferringPhysicianName"),
)
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns")


@dataclass(frozen=True)
class Plane:
    """One judged image.

    Attributes:
        row: Its row of `scores.jsonl`.
        header: The source without pixels, shared by the frames of a file.
        frame: 0-based, 0 for a plain file.
        geometry: None where the source does not say where it lies.
    """

    row: dict[str, Any]
    header: Dataset
    frame: int
    geometry: Geometry | None

    @property
    def frames(self) -> int:
        """Number of frames of the source."""
        return int(self.header.get("NumberOfFrames") or 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Within, nothing that highdicom or pydicom says reaches the terminal: it may quote a patient's name."""
    loggers = [logging.getLogger(name) for name in ("highdicom", "pydicom")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def series_of(path: Path) -> str | None:
    """SeriesInstanceUID of a DICOM file, or None where it has none that can be read."""
    try:
        import pydicom

        with quiet():
            header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
            return str(header.get("SeriesInstanceUID") or "") or None
    except Exception:  # it is not installed, or one of its many ways to refuse a header
        return None


def read_planes(rows: Iterable[dict[str, Any]]) -> list[Plane]:
    """The planes of rows of one series.

    Raises:
        ReadError: A source has changed, or lacks what makes it part of a study.
    """
    headers: dict[str, Dataset] = {}
    planes = []
    for row in rows:
        header = headers.get(row["path"])
        if header is None:
            header = headers[row["path"]] = _header(Path(row["path"]))
        frame = int(row["frame"] or 0)
        planes.append(Plane(row, header, frame, geometry_of(header, frame)))
    return planes


def stacks(planes: Iterable[Plane]) -> list[list[Plane]]:
    """Sort planes with a geometry into stacks.

    Several planes at one position (phases, echoes) go to one stack each, in the order of InstanceNumber.

    Args:
        planes: Of one series, each with a geometry.

    Returns:
        Stacks, each sorted along the normal.
    """
    kinds: list[list[Plane]] = []
    for plane in planes:
        for kind in kinds:
            if _alike(kind[0], plane):
                kind.append(plane)
                break
        else:
            kinds.append([plane])
    return [stack for kind in kinds for stack in _passes(kind)]


def _alike(one: Plane, other: Plane) -> bool:
    assert one.geometry is not None and other.geometry is not None
    return (
        (one.header.Rows, one.header.Columns) == (other.header.Rows, other.header.Columns)
        and (one.header is other.header or one.frames == other.frames == 1)  # no object refers to several such files
        and one.geometry.fits(other.geometry)
    )


def _passes(kind: Sequence[Plane]) -> list[list[Plane]]:
    """Planes that fit, as stacks in which no position comes twice."""

    def order(plane: Plane) -> tuple[float, float, int]:
        assert plane.geometry is not None
        try:
            number = float(plane.header.get("InstanceNumber") or 0)
        except (TypeError, ValueError):
            number = 0.0
        return round(plane.geometry.along, 3), number, plane.frame

    passes: list[list[Plane]] = []
    seen, last = 0, None
    for plane in sorted(kind, key=order):
        at = order(plane)[0]
        seen, last = (seen + 1 if at == last else 0), at
        if seen == len(passes):
            passes.append([])
        passes[seen].append(plane)
    return passes


def _header(path: Path) -> Dataset:
    """A source without its pixels, with the elements that objects made from it need."""
    import pydicom

    try:
        header: Dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        for name in ("PatientBirthDate", "StudyDate"):
            _clear_unless(header, name, pydicom.valuerep.DA)
        _clear_unless(header, "StudyTime", pydicom.valuerep.TM)
        if header.get("PatientSex") not in ("M", "F", "O"):
            header.PatientSex = ""
        for name in _MAY_BE_EMPTY:
            if name not in header:
                setattr(header, name, "")
        missing = [name for name in _NEEDED if not header.get(name)]
    except Exception as err:
        raise ReadError(f"{path}: has a header that cannot be read any more ({type(err).__name__}).") from err
    if missing:
        raise ReadError(f"{path}: has no {missing[0]}, so nothing can refer to it. Export it again.")
    return header


def _clear_unless(header: Dataset, name: str, kind: Any) -> None:
    """Empty an element that is none of its kind, such as the birth date "1950"."""
    try:
        kind(str(header.get(name) or ""))
    except ValueError:
        setattr(header, name, "")
