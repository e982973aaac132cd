"""What is known of a task after it was judged with K supports, drawn several times, and how it is laid out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from anatomaly.evaluation.metrics import Interval, auroc, bootstrap, image_metrics, no_interval, summarise_draws
from anatomaly.tables import Table, interval_text, mean_sd

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from anatomaly.types import Sample

#: What people call figures that need both classes.
TITLES = {
    "auroc": "image AUROC",
    "ap": "AP",
    "f1max": "F1max",
    "interval": "95 % interval",
    "patient_auroc": "patient AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "dice_max": "Dice max",
}


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
        interval: 95 % bootstrap interval of the mean AUROC over the draws, resampling patients (else images); its ends
            are NaN where it cannot be had.
        unusable_masks: Scored rows whose mask could not be used, and why; they are left out of the pixel metrics.
        pixel_bounds: Per draw, how far each pixel metric can be from its exact value (`PixelCounts.bounds`); empty
            without pixel metrics.
        undefined: Why figures cannot be had though they were asked for, by name: metrics that are in no draw, and
            "interval".
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
    undefined: Mapping[str, str] = field(default_factory=dict)

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
    groups = patients if len(patients) == len(samples) else None
    reason = no_interval(labels, groups)
    return Evaluation(
        task=name,
        shots=0,
        samples=samples,
        unreadable=tuple(failure for result in results for failure in result.unreadable),
        supports=((),),
        scores=scores,
        metrics=(image_metrics(scores[0], labels),),
        interval=bootstrap(auroc, scores, labels, groups=groups),
        undefined={} if reason is None else {"interval": reason},
    )


def tell_unreadable(results: Sequence[Evaluation]) -> str:
    """How many test images could not be read, in a line with the first reason; empty where all could.

    Args:
        results: Evaluations of any tasks; an image counts once.
    """
    reasons = {sample: reason for result in results for sample, reason in result.unreadable}
    scored = {sample for result in results for sample in result.samples} - set(reasons)
    return count_unreadable(list(reasons.values()), len(scored) + len(reasons))


def count_unreadable(reasons: Sequence[str], total: int) -> str:
    """How many of some test images could not be read, in a line with the first reason; empty where all could.

    Args:
        reasons: One per unreadable image.
        total: Number of images, the unreadable ones included.

    Example:
        >>> count_unreadable(["a.png: is empty."], 9)
        '1 of 9 test images is unreadable and left out of all figures; the first: a.png: is empty.'
    """
    if not reasons:
        return ""
    count = f"{len(reasons)} of {total} test images {'is' if len(reasons) == 1 else 'are'} unreadable"
    return f"{count} and left out of all figures; the first: {' '.join(reasons[0].split())}"


def tell_undefined(undefined: Iterable[tuple[str, Mapping[str, str]]]) -> str:
    """Why figures are shown as "–", each reason once; empty where none is.

    Args:
        undefined: (what it is about, such as a task, or empty; reason by name of the figure).
    """
    told: dict[tuple[str, str], list[str]] = {}
    for about, reasons in undefined:
        for name in (name for name in TITLES if name in reasons):
            titles = told.setdefault((about, reasons[name]), [])
            titles += [TITLES[name]] * (TITLES[name] not in titles)
    found = (f"{f'{about}: ' * bool(about)}{', '.join(titles)} ({why})" for (about, why), titles in told.items())
    return f"– stands for what cannot be had: {'; '.join(found)}." if told else ""


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
    everything = [result for _, result in results]
    summaries = [result.summary() for result in everything]
    measured = {name for known in (*summaries, *(result.undefined for result in everything)) for name in known}
    shown = [(head, key) for head, key in shown if key in measured]
    named = any(name for name, _ in results)
    shots = ["K"] if any(result.shots for result in everything) else []
    counted = len({(result.task, len(result.samples), len(result.unreadable)) for result in everything}) > 1
    columns = ["task", *["method"] * named, *shots, "image AUROC", "95 % interval", *(head for head, _ in shown)]
    counts = ["images", *["unreadable"] * any(result.unreadable for result in everything)] if counted else []
    rows = []
    for (name, result), summary in zip(results, summaries, strict=True):
        cells = [result.task, *[name] * named, *[str(result.shots)] * len(shots), mean_sd(*summary["auroc"])]
        cells.append(interval_text(*result.interval[1:]))
        cells += [mean_sd(*summary[key]) if key in summary else "–" * (key in result.undefined) for _, key in shown]
        cells += [str(len(result.samples)), str(len(result.unreadable))][: len(counts)]
        rows.append(cells)
    return Table(title, [*columns, *counts], rows, _note(everything, counted=counted))


def _note(results: Sequence[Evaluation], *, counted: bool) -> str:
    """How to read the table; with the number of images unless the table counts them."""
    first = results[0]
    draws = len(first.supports)
    over = f"Mean ± standard deviation over {draws} support draws" if draws > 1 else "One support draw, no deviation"
    note = over if any(result.shots for result in results) else "No support"
    if not counted:
        note += f", {len(first.samples)} test images"
        note += f", {len(first.unreadable)} unreadable" if first.unreadable else ""
    note += (
        ". The interval is a bootstrap of "
        "the mean AUROC over test images (patients where known). F1max and Dice take the best threshold on the test "
        "labels; the floor is what calling everything anomalous gives."
    )
    several = len({result.task for result in results}) > 1
    if undefined := tell_undefined((result.task * several, result.undefined) for result in results):
        note += f" {undefined}"
    masks = {sample: reason for result in results for sample, reason in result.unusable_masks}
    if masks:
        reason = next(iter(masks.values()))
        note += f" Masks left out of the pixel metrics, as they cannot be used: {len(masks)}; the first: {reason}"
    return note
