"""What is known of a task after it was judged with K supports, drawn several times, and how it is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anatomaly.evaluation.metrics import Interval, auroc, bootstrap, image_metrics, summarise_draws
from anatomaly.tables import Table, mean_sd

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def pooled(results: Sequence[Evaluation], *, name: str = "all tasks") -> Evaluation:
    """All tasks of one multi-class model judged together: one ranking over every test image.

    Args:
        results: Evaluations of different tasks by the same method without support.
        name: What to call the whole.

    Returns:
        An evaluation with image metrics only; a patient is one within its task.
    """
    samples = tuple(sample for result in results for sample in result.samples)
    scores = np.concatenate([result.scores for result in results], axis=1)
    labels = np.array([sample.label for sample in samples])
    patients = [f"{sample.task}/{sample.patient_id}" for sample in samples if sample.patient_id is not None]
    return Evaluation(
        task=name,
        shots=0,
        samples=samples,
        unreadable=tuple(failure for result in results for failure in result.unreadable),
        supports=((),),
        scores=scores,
        metrics=(image_metrics(scores[0], labels),),
        interval=bootstrap(auroc, scores, labels, groups=patients if len(patients) == len(samples) else None),
    )


def table_of(results: Sequence[tuple[str, Evaluation]], *, title: str = "") -> Table:
    """Lay evaluations out as a table, with a note on how to read it.

    Args:
        results: (name of the method or model, evaluation); names may be empty.
        title: Of the table.
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
    shown = [(head, key) for head, key in shown if any(key in summary for summary in summaries)]
    named = any(name for name, _ in results)
    shots = ["K"] if any(result.shots for _, result in results) else []
    columns = ["task", *["method"] * named, *shots, "image AUROC", "95 % interval", *(head for head, _ in shown)]
    rows = []
    for (name, result), summary in zip(results, summaries, strict=True):
        cells = [result.task, *[name] * named, *[str(result.shots)] * len(shots), mean_sd(*summary["auroc"])]
        cells.append(f"{result.interval.low:.3f} to {result.interval.high:.3f}")
        cells += [mean_sd(*summary[key]) if key in summary else "" for _, key in shown]
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
    return Table(title, columns, rows, note)
