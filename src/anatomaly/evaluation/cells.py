"""A cell: one task judged with K supports, drawn several times; what is written of it, and read again."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anatomaly.evaluation.metrics import Interval, summarise_draws
from anatomaly.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from anatomaly.types import Sample


@dataclass(frozen=True)
class Evaluation:
    """One task judged with K supports, drawn several times.

    Attributes:
        task: The task.
        shots: K.
        samples: The N scored rows.
        unreadable: Rows that could not be scored, and why.
        supports: Per draw, the K support rows.
        scores: (draws, N) image scores.
        metrics: Per draw, the figures of `metrics.image_metrics`, those of `pixel_metrics` where masks exist,
            and "patient_auroc" where every scored row has a patient and patients have several rows.
        interval: 95 % bootstrap interval of the mean AUROC over the draws, resampling patients (else images).
        unusable_masks: Scored rows whose mask could not be used, and why; they are left out of the pixel metrics.
        pixel_bounds: Per draw, how far each pixel metric can be from its exact value (`PixelCounts.bounds`); empty
            without pixel metrics.
    """

    task: str
    shots: int
    samples: tuple[Sample, ...]
    unreadable: tuple[tuple[Sample, str], ...]
    supports: tuple[tuple[Sample, ...], ...]
    scores: NDArray[np.float64]
    metrics: tuple[dict[str, float], ...]
    interval: Interval
    unusable_masks: tuple[tuple[Sample, str], ...] = ()
    pixel_bounds: tuple[dict[str, float], ...] = ()

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation over the draws, by metric."""
        return {name: summarise_draws([draw[name] for draw in self.metrics]) for name in self.metrics[0]}


def table_of(results: Sequence[tuple[str, Evaluation]]) -> tuple[list[str], list[list[str]], str]:
    """Lay evaluations out as a table.

    Args:
        results: (name of the method or model, evaluation); names may be empty.

    Returns:
        Column titles, rows of cells, and a note on how to read them.
    """
    shown = [
        ("AP", "ap"),
        ("F1max", "f1max"),
        ("F1max floor", "f1max_floor"),
        ("patient AUROC", "patient_auroc"),
        ("pixel AUROC", "pixel_auroc"),
        ("AUPRO", "aupro"),
        ("Dice max", "dice_max"),
    ]
    summaries = [result.summary() for _, result in results]
    shown = [(title, key) for title, key in shown if any(key in summary for summary in summaries)]
    named = any(name for name, _ in results)
    shots = ["K"] if any(result.shots for _, result in results) else []
    columns = ["task", *["method"] * named, *shots, "image AUROC", "95 % interval", *(title for title, _ in shown)]
    rows = []
    for (name, result), summary in zip(results, summaries, strict=True):
        cells = [result.task, *[name] * named, *[str(result.shots)] * len(shots), _mean_sd(*summary["auroc"])]
        cells.append(f"{result.interval.low:.3f} to {result.interval.high:.3f}")
        cells += [_mean_sd(*summary[key]) if key in summary else "" for _, key in shown]
        rows.append(cells)
    draws, scored = len(results[0][1].supports), len(results[0][1].samples)
    over = f"Mean ± standard deviation over {draws} support draws, {scored} test images" if shots else "No support"
    note = (
        f"{over}. The interval is a bootstrap of "
        "the mean AUROC over test images (patients where known). F1max and Dice take the best threshold on the test "
        "labels; the floor is what calling everything anomalous gives."
    )
    masks = {sample: reason for _, result in results for sample, reason in result.unusable_masks}
    if masks:
        reason = next(iter(masks.values()))
        note += f" Masks left out of the pixel metrics, as they cannot be used: {len(masks)}; the first: {reason}"
    return columns, rows, note


def _mean_sd(mean: float, sd: float) -> str:
    return f"{mean:.3f}" if np.isnan(sd) or sd < 5e-7 else f"{mean:.3f} ± {sd:.3f}"


def write_evaluations(results: Sequence[Evaluation], out: Path) -> None:
    """Write evaluation.json (summary), draws.csv (metrics and supports of each draw) and scores.csv (every image).

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
            "auroc_interval": list(result.interval[1:]),
            "metrics": {
                name: {"mean": mean, "sd": None if np.isnan(sd) else sd}  # JSON has no NaN
                for name, (mean, sd) in result.summary().items()
            },
            "pixel_bounds": {  # how far the means can be from the exact ones
                name: float(np.mean([draw[name] for draw in result.pixel_bounds]))
                for name in next(iter(result.pixel_bounds), {})
            },
        }
        for result in results
    ]
    names = list(dict.fromkeys(name for result in results for draw in result.metrics for name in draw))
    draws: list[list[object]] = [["task", "shots", "draw", "supports", *names]]
    scores: list[list[object]] = [["task", "shots", "draw", "path", "frame", "patient", "label", "score"]]
    for result in results:
        for number, (metrics, supports) in enumerate(zip(result.metrics, result.supports, strict=True)):
            names_of_supports = ";".join(sample.name for sample in supports)
            cells: list[object] = [result.task, result.shots, number]
            draws.append([*cells, names_of_supports, *(metrics.get(name) for name in names)])
            if any(sample.task != result.task for sample in result.samples):
                continue  # `pooled`: its tasks have their own rows
            scores += [
                [*cells, sample.path, sample.frame, sample.patient_id, sample.label, score]
                for sample, score in zip(result.samples, result.scores[number].tolist(), strict=True)
            ]
    write_whole(out / "evaluation.json", (json.dumps(summary, indent=2) + "\n").encode())
    for name, table in (("draws.csv", draws), ("scores.csv", scores)):
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(table)
        write_whole(out / name, stream.getvalue().encode())
