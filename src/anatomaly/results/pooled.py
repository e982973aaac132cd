"""Scores of slices pooled to volumes and to patients: `volumes.csv` and `patients.csv` beside `scores.csv`.

A volume is a DICOM series or a file of several slices; a patient is what the manifest's `patient_id` says.  No name and
no PatientID is read from any file.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.data.readers import sniff_format
from anatomaly.detector.conformal import unit_of
from anatomaly.errors import AnatomalyError
from anatomaly.files import write_whole
from anatomaly.results.dicom_planes import series_of
from anatomaly.results.names import SeriesNames
from anatomaly.tables import csv_bytes

if TYPE_CHECKING:
    from collections.abc import Hashable

    from anatomaly.types import Calibration, Prediction

_TOP = 3  # scores that the second pooled score averages
COLUMNS = (
    *("task", "label", "images", "unreadable", "score_max", f"score_top{_TOP}", "worst_path", "worst_frame"),
    *("p_value", "note", "axis"),
)
_ALL = "all"  # the axes of a volume together


def write_pooled(out: Path, predictions: Sequence[Prediction], calibration: Calibration | None) -> None:
    """Write `patients.csv` if rows name patients, and `volumes.csv` if images are slices of something.

    Columns: the patient or volume; task; label (1 if any image is anomalous, 0 if all are normal, else empty); images
    with a score and those without; the highest score and the mean of the 3 highest (of all where there are fewer); the
    image with the highest score; the p-value, see `pooled_p`; the axis that the images were cut along.

    A volume that was judged along several axes has a row for each, and one for all: scores of slices of different axes
    are on different scales, so its pooled scores are the means of those of the axes.  A patient has the latter row.

    Args:
        out: The folder of the run.
        predictions: All of the run, pictures not needed.
        calibration: Where their p-values come from, or None.

    Raises:
        OutputError: A table cannot be written.
    """
    units: defaultdict[Hashable, list[Prediction]] = defaultdict(list)
    for each in predictions:
        if calibration is not None and each.sha256 is not None:
            units[unit_of(each.sample, each.sha256, calibration.unit)].append(each)
    patients: defaultdict[str, list[Prediction]] = defaultdict(list)
    for each in predictions:
        if each.sample.patient_id is not None:
            patients[each.sample.patient_id].append(each)
    for kind, groups in (("patient", patients), ("volume", _volumes(predictions))):
        if groups:
            rows = [
                (name, *_row(part, units, calibration), axis)
                for name, group in groups.items()
                for axis, part in _parts(group, by_axis=kind == "volume")
            ]
            write_whole(out / f"{kind}s.csv", csv_bytes([(kind, *COLUMNS), *rows]))


def _row(
    group: Sequence[Prediction], units: dict[Hashable, list[Prediction]], calibration: Calibration | None
) -> tuple[object, ...]:
    scored = sorted((each for each in group if each.error is None), key=lambda each: -each.score)
    labels = {each.sample.label for each in group}
    label = 1 if 1 in labels else 0 if labels == {0} else None
    tasks = ";".join(sorted({each.sample.task for each in group}))
    p_value, note = pooled_p(scored, units, calibration)
    first = (tasks, label, len(scored), len(group) - len(scored))
    if not scored:
        return (*first, None, None, None, None, None, note)
    worst = scored[0].sample
    return (*first, *_pooled(scored), str(worst.path), worst.frame, p_value, note)


def _pooled(scored: Sequence[Prediction]) -> tuple[float, float]:
    """The highest score and the mean of the highest ones, each the mean over the axes; scores descend."""
    axes: defaultdict[str, list[float]] = defaultdict(list)
    for each in scored:
        axes[_axis(each)].append(each.score)
    tops = [scores[:_TOP] for scores in axes.values()]
    return sum(top[0] for top in tops) / len(tops), sum(sum(top) / len(top) for top in tops) / len(tops)


def _axis(prediction: Prediction) -> str:
    return "" if prediction.sample.cut is None else prediction.sample.cut.axis


def _parts(group: Sequence[Prediction], *, by_axis: bool) -> Iterator[tuple[str, Sequence[Prediction]]]:
    """The rows of a group: one for each axis, where asked for, then one for all of it."""
    axes = dict.fromkeys(map(_axis, group))
    if by_axis and len(axes) > 1:
        yield from ((axis, [each for each in group if _axis(each) == axis]) for axis in axes)
    yield (next(iter(axes)) if len(axes) == 1 else _ALL), group


def pooled_p(
    scored: Sequence[Prediction], units: dict[Hashable, list[Prediction]], calibration: Calibration | None
) -> tuple[float | None, str | None]:
    """The p-value of a group, and why it has none although its images do.

    It is the smallest of its images', which is that of its highest score: valid if the group is one unit of the
    calibration (a patient, a file), whole, and has no more images than those calibrated on.

    Args:
        scored: Images of the group with a score.
        units: All images of the run by unit.
        calibration: Where p-values come from, or None.
    """
    known = [each.p_value for each in scored if each.p_value is not None]
    if calibration is None or not known:
        return None, None
    keys = {unit_of(each.sample, each.sha256, calibration.unit) for each in scored if each.sha256 is not None}
    if len(keys) > 1 or len(units[next(iter(keys))]) > len(scored):
        return None, f"no p-value: calibrated by {calibration.unit}"
    if len(known) > (most := max(calibration.images)):
        return None, f"no p-value: more images than the {most} of those calibrated on"
    return min(known), None


def _volumes(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Images by volume, those that are no slice of anything left out."""
    by_key: defaultdict[tuple[str, str], list[Prediction]] = defaultdict(list)
    keys: dict[Path, tuple[str, str]] = {}
    for each in predictions:
        path = each.sample.path
        if path not in keys:
            keys[path] = _key(path)
        by_key[keys[path]].append(each)
    names = SeriesNames()
    found = {}
    for (kind, _), group in by_key.items():
        if len(group) > 1 or group[0].sample.frame is not None or group[0].sample.cut is not None:
            path = group[0].sample.path
            found[names.new(path) if kind == "series" else str(path)] = group
    return found


def _key(path: Path) -> tuple[str, str]:
    try:
        series = series_of(path) if sniff_format(path) == "dicom" else None
        return ("file", os.path.realpath(path)) if series is None else ("series", series)
    except (AnatomalyError, ValueError):  # it could not be read, which its row says, or has a name no file has
        return "file", str(path)
