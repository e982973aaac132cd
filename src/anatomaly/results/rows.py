"""The row of one image as the tables hold it, and the way back: a run that was cut short goes on from its rows."""

from __future__ import annotations

import math
import os
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from anatomaly.data.decoding import usable_spacing
from anatomaly.files import parse_json
from anatomaly.types import Prediction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anatomaly.types import Sample

#: Columns of `scores.csv` that every run has; `weight_0` ... `weight_<K-1>` follow where there is a support bank.
COLUMNS = (
    *("path", "frame", "task", "label", "score", "status", "error", "seconds", "map", "overlay", "p_value", "note"),
    *("map_volume", "axis", "position"),
)

_PNG_END = b"IEND\xaeB`\x82"


class Stored(NamedTuple):
    """A row that is on disk.

    Attributes:
        row: As `row_of` made it.
        prediction: What it says, without picture and map.
        end: Bytes of `scores.jsonl` up to here.
    """

    row: Mapping[str, Any]
    prediction: Prediction
    end: int


def row_of(
    prediction: Prediction,
    files: Mapping[str, str | None],
    *,
    scale: tuple[float, float],
    support_names: Sequence[str],
) -> dict[str, Any]:
    """All that is kept of an image, as `scores.jsonl` has it; numbers that are not finite are None.

    Args:
        prediction: The verdict, or the error that takes its place.
        files: Names of its files by column.
        scale: (low, high) of the colours, in map units.
        support_names: K display names.
    """
    sample, weights = prediction.sample, prediction.support_weights
    failed = prediction.error is not None
    row = {
        "path": str(sample.path),
        "frame": None if sample.frame is None else int(sample.frame),
        "task": sample.task,
        "label": None if sample.label is None else int(sample.label),
        "score": None if failed else float(prediction.score),
        "p_value": None if prediction.p_value is None else float(prediction.p_value),
        "status": "error" if failed else "ok",
        "error": " ".join(prediction.error.split()) if prediction.error is not None else None,
        "note": " ".join(prediction.note.split()) if prediction.note is not None else None,
        "seconds": float(prediction.seconds),
        **files,
        "axis": None if sample.cut is None else sample.cut.axis,
        "position": None if sample.cut is None else sample.cut.position,
        "sha256": prediction.sha256,
        "spacing": prediction.spacing and usable_spacing(*prediction.spacing),
        "scale": scale,
        "support": support_names,
        "support_weights": None if weights is None else weights.tolist(),
    }
    if sample.cut is not None and sample.cut.across:
        row["across"] = True  # the image is no file's own
    return {name: _without_gaps(value) for name, value in row.items()}


def prediction_of(row: Mapping[str, Any], sample: Sample) -> Prediction:
    """What a row says, without picture and map.

    Args:
        row: As `row_of` makes it, or as it was read back.
        sample: The image it is about.

    Raises:
        KeyError, TypeError, ValueError: It is no such row.
    """
    spacing, weights = row["spacing"], row["support_weights"]
    return Prediction(
        sample=sample,
        score=_number(row["score"]),
        support_weights=None if weights is None else np.asarray(weights, np.float32),
        spacing=None if spacing is None else (float(spacing[0]), float(spacing[1])),
        seconds=_number(row["seconds"]),
        error=row["error"],
        p_value=None if row["p_value"] is None else float(row["p_value"]),
        note=row["note"],
        sha256=row["sha256"],
    )


def csv_cells(row: Mapping[str, Any], supports: int) -> list[Any]:
    """The row of `scores.csv`: `COLUMNS`, then one weight per support image, the mean over the levels."""
    weights = row["support_weights"]
    mean = [None] * supports
    if weights is not None and supports:
        mean = np.asarray(weights, np.float32).mean(axis=0, dtype=np.float64).tolist()
    return [*(row[column] for column in COLUMNS), *mean]


def stored_rows(out: Path, samples: Sequence[Sample], *, batch_size: int) -> list[Stored]:
    """The rows from which a run into `out` goes on: whole, with their files, up to the end of a batch.

    The last bits of a score depend on the images that were judged with it.  So a batch that was cut short is judged
    again, and what a run writes does not depend on where it was interrupted.

    Args:
        out: The folder of the run.
        samples: All images of the run, in order.
        batch_size: Images per forward pass.
    """
    found: list[Stored] = []
    try:
        with (out / "scores.jsonl").open("rb") as lines:
            for line, sample in zip(lines, samples, strict=False):
                row = parse_json(line.decode())
                axis = None if sample.cut is None else sample.cut.axis
                image = (str(sample.path), sample.frame, axis)
                if not line.endswith(b"\n") or (row["path"], row["frame"], row["axis"]) != image:
                    break
                if not _has_files(out, row):
                    break
                found.append(Stored(row, prediction_of(row, sample), (found[-1].end if found else 0) + len(line)))
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is cut off here
        pass
    if len(found) < len(samples):
        seconds = found[-1].row["seconds"] if found else None  # all images of a batch have the same share of its time
        last = sum(1 for _ in takewhile(lambda each: each.row["seconds"] == seconds, reversed(found)))
        if last < batch_size:
            del found[len(found) - last :]
    return found


def _has_files(out: Path, row: Mapping[str, Any]) -> bool:
    """Whether map and overlay of a row are there as a whole: a machine without power may lose what it had written."""
    if row["map"] is not None and map_shape(out / row["map"]) is None:
        return False
    if row["overlay"] is None:
        return True
    try:
        with (out / row["overlay"]).open("rb") as picture:
            picture.seek(-len(_PNG_END), os.SEEK_END)
            end: bytes = picture.read()
    except OSError:
        return False
    return end == _PNG_END


def map_shape(file: Path) -> tuple[int, ...] | None:
    """The shape of a stored map; None where it is not there as a whole."""
    try:
        with file.open("rb") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            whole = file.stat().st_size == stream.tell() + math.prod(shape) * dtype.itemsize
    except (OSError, ValueError):
        return None
    return shape if whole else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _without_gaps(value: Any) -> Any:
    """The same with None for every number that is not finite: JSON has no NaN."""
    if isinstance(value, (list, tuple)):
        return [_without_gaps(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
