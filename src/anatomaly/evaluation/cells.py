"""A cell: the folder of a judged task, written once and read back the same way by all who tabulate it."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from anatomaly.files import require_file, write_whole
from anatomaly.tables import csv_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from anatomaly.evaluation.evaluation import Evaluation

#: The scores of every test image in every draw; another table than the `scores.csv` of `predict`.
SCORES = "test_scores.csv"
_EARLIER_SCORES = "scores.csv"  # what it was called before


class Stored(NamedTuple):
    """What was written of one task at one K.

    Attributes:
        images: N test images as (path, frame).
        labels: (N,) 0 or 1.
        groups: N patients, or None where not all are known.
        scores: (draws, N).
        metrics: Per draw, metric by name.
        unreadable: Per test image that could not be scored, its name and why.
        undefined: Why figures cannot be had, by name, as `Evaluation.undefined`.
    """

    images: tuple[tuple[str, str], ...]
    labels: NDArray[np.int64]
    groups: tuple[str, ...] | None
    scores: NDArray[np.float64]
    metrics: tuple[dict[str, float], ...]
    unreadable: tuple[str, ...] = ()
    undefined: Mapping[str, str] = MappingProxyType({})


def write_evaluations(results: Sequence[Evaluation], out: Path) -> None:
    """Write evaluation.json (summary), draws.csv (metrics and supports of each draw) and test_scores.csv (every image).

    Raises:
        OutputError: `out` cannot be written.
    """
    summary = [
        {
            "task": result.task,
            "shots": result.shots,
            "draws": len(result.supports),
            "images": len(result.samples),
            "unreadable": [f"{sample.name}: {reason}" for sample, reason in result.unreadable],
            "unusable_masks": [f"{sample.name}: {reason}" for sample, reason in result.unusable_masks],
            "auroc_interval": [_number(end) for end in result.interval[1:]],
            "metrics": {
                **{name: {"mean": _number(mean), "sd": _number(sd)} for name, (mean, sd) in result.summary().items()},
                **{name: {"mean": None, "sd": None} for name in result.undefined if name != "interval"},
            },
            "undefined": dict(result.undefined),
            "pixel_bounds": {  # how far the means can be from the exact ones
                name: float(np.mean([draw[name] for draw in result.pixel_bounds]))
                for name in next(iter(result.pixel_bounds), {})
            },
        }
        for result in results
    ]
    known = [each for result in results for each in (*result.metrics, result.undefined)]
    names = [name for name in dict.fromkeys(name for each in known for name in each) if name != "interval"]
    draws: list[list[object]] = [["task", "shots", "draw", "supports", "unreadable", *names]]
    scores: list[list[object]] = [["task", "shots", "draw", "path", "frame", "patient", "label", "score"]]
    for result in results:
        for number, (metrics, supports) in enumerate(zip(result.metrics, result.supports, strict=True)):
            names_of_supports = ";".join(sample.name for sample in supports)
            cells: list[object] = [result.task, result.shots, number]
            figures = (metrics.get(name) for name in names)
            draws.append([*cells, names_of_supports, len(result.unreadable), *figures])
            if any(sample.task != result.task for sample in result.samples):
                continue  # `pooled`: its tasks have their own rows
            scores += [
                [*cells, sample.path, sample.frame, sample.patient_id, sample.label, score]
                for sample, score in zip(result.samples, result.scores[number].tolist(), strict=True)
            ]
    write_whole(out / "evaluation.json", (json.dumps(summary, indent=2) + "\n").encode())
    for name, table in (("draws.csv", draws), (SCORES, scores)):
        write_whole(out / name, csv_bytes(table))


def read_evaluation(folder: Path) -> Stored:
    """Read what `write_evaluations` left of a single evaluation.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration: A file is damaged.
    """
    file = folder / SCORES
    draws: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in _rows(file if file.is_file() else folder / _EARLIER_SCORES):
        draws[row["draw"]].append(row)
    first = next(iter(draws.values()))
    known = {"task", "shots", "draw", "supports", "unreadable"}
    facts = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))[0]
    patients = tuple(row["patient"] for row in first)
    return Stored(
        images=tuple((row["path"], row["frame"]) for row in first),
        labels=np.array([int(row["label"]) for row in first]),
        groups=patients if all(patients) else None,
        scores=np.array([[float(row["score"]) for row in rows] for rows in draws.values()]),
        metrics=tuple(
            {name: float(value) for name, value in row.items() if name not in known and value}
            for row in _rows(folder / "draws.csv")
        ),
        unreadable=tuple(map(str, facts["unreadable"])),
        undefined={str(name): str(reason) for name, reason in facts.get("undefined", {}).items()},  # absent before
    )


def _number(value: float) -> float | None:
    """The number, or None for NaN, which JSON lacks."""
    return None if np.isnan(value) else value


def _rows(file: Path) -> list[dict[str, str]]:
    require_file(file)
    with file.open(encoding="utf-8", newline="") as stream:
        try:
            return list(csv.DictReader(stream))
        except csv.Error as err:
            raise ValueError(f"{file}: {err}") from err
