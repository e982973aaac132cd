"""Judge a detector on a task: several support draws, every test image, intervals."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from anatomaly.data.loading import Loaded, load_batches
from anatomaly.data.readers import read_mask_of
from anatomaly.data.transforms import mask_to_input
from anatomaly.errors import ConfigError, ManifestError
from anatomaly.metrics import (
    Interval,
    auroc,
    bootstrap,
    image_metrics,
    pixel_metrics,
    pool_by_patient,
    summarise_draws,
)
from anatomaly.protocols import draw_supports, forbid_leak, samples_to_test
from anatomaly.results import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from anatomaly.data.manifest import Manifest
    from anatomaly.inference import Detector
    from anatomaly.types import Preprocessing, Sample, SupportBank


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
        metrics: Per draw, the figures of `metrics.image_metrics`, those of `metrics.pixel_metrics` where masks exist,
            and "patient_auroc" where every scored row has a patient and patients have several rows.
        interval: 95 % bootstrap interval of the mean AUROC over the draws, resampling patients (else images).
    """

    task: str
    shots: int
    samples: tuple[Sample, ...]
    unreadable: tuple[tuple[Sample, str], ...]
    supports: tuple[tuple[Sample, ...], ...]
    scores: NDArray[np.float64]
    metrics: tuple[dict[str, float], ...]
    interval: Interval

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation over the draws, by metric."""
        return {name: summarise_draws([draw[name] for draw in self.metrics]) for name in self.metrics[0]}


@dataclass
class _Scores:
    """What one pass over the test rows collects for every bank."""

    samples: list[Sample] = field(default_factory=list)
    unreadable: list[tuple[Sample, str]] = field(default_factory=list)
    scores: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    maps: dict[int, list[NDArray[np.float32]]] = field(default_factory=lambda: defaultdict(list))
    masks: list[NDArray[np.bool_] | None] = field(default_factory=list)


def evaluate(
    detector: Detector,
    manifest: Manifest,
    *,
    task: str,
    shots: Sequence[int] = (2, 4, 8),
    draws: int = 5,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Evaluation]:
    """Score a task's whole test split against several draws of its normal training images.

    Each test image is encoded once and compared with all banks.  Pixel metrics are taken at the network's input size.

    Args:
        detector: The trained model; it must not have seen the task if the result is to be called few-shot.
        manifest: Rows of the task: split "train" (normal) to draw supports from, split "test" with both labels.
        task: The task.
        shots: Values of K; a draw with fewer shots is the beginning of the draw with more.  A method without support
            is judged once, whatever shots and draws are.
        draws: Support draws per K.
        seed: Of the draws.
        batch_size: Images per forward pass; changes no score.

    Returns:
        One evaluation per K.

    Raises:
        ConfigError: Too few normal training images, no test rows, no shots, or supports that leak into the test split.
        ManifestError: The readable test rows lack a label or a class, or a mask does not fit its image.
        ReadError: A support image or a mask cannot be read.
    """
    if not shots:
        raise ConfigError("evaluate: shots is empty, expected at least one number of support images.")
    tests = samples_to_test(manifest, task)
    _require_labels(tests, task)
    banks: list[SupportBank] = []
    supports: list[tuple[Sample, ...]] = []
    if not detector.method.needs_support:
        shots, draws, supports = (0,), 1, [()]
        banks = [detector.empty_bank(task)]
    for k in shots if detector.method.needs_support else ():
        for drawn in draw_supports(manifest, task=task, shots=k, draws=draws, seed=seed):
            forbid_leak(drawn, tests)
            supports.append(drawn)
            banks.append(detector.make_bank(drawn, task=task))
    collected = _score(detector, tests, banks, batch_size)
    _require_labels(collected.samples, task, "readable ")
    return [_evaluation(task, k, collected, supports, range(i * draws, (i + 1) * draws)) for i, k in enumerate(shots)]


def _require_labels(tests: Sequence[Sample], task: str, which: str = "") -> None:
    normal, anomalous = (sum(row.label == label for row in tests) for label in (0, 1))
    if not normal or not anomalous or normal + anomalous < len(tests):
        raise ManifestError(
            f"evaluate: task {task!r} has {normal} normal, {anomalous} anomalous and {len(tests) - normal - anomalous} "
            f"unlabelled {which}test images, expected both classes and no unlabelled ones. "
            "Complete the data; `anatomaly data check` lists what is wrong with it."
        )


def _score(detector: Detector, tests: Sequence[Sample], banks: Sequence[SupportBank], batch_size: int) -> _Scores:
    """One pass per distinct preprocessing (one, unless a percentile rule depends on the supports)."""
    masked = any(row.mask is not None for row in tests)
    groups: dict[Preprocessing, list[int]] = defaultdict(list)
    for index, bank in enumerate(banks):
        groups[bank.preprocessing].append(index)
    collected = _Scores()
    for number, (preprocessing, members) in enumerate(groups.items()):
        for batch in load_batches(tests, preprocessing, batch_size=batch_size):
            readable = [item for item in batch if item.prepared is not None]
            if number == 0:
                collected.unreadable += [(item.sample, item.error or "") for item in batch if item.prepared is None]
                collected.samples += [item.sample for item in readable]
                if masked:
                    collected.masks += [_mask(item, preprocessing) for item in readable]
            if not readable:
                continue
            encoded = detector.encode([item.prepared.input for item in readable if item.prepared is not None])
            for index in members:
                scored = detector.compare(encoded, banks[index])
                collected.scores[index] += scored.scores.double().tolist()
                if masked:  # otherwise there is nothing to measure them with, and they take the most memory
                    collected.maps[index] += list(scored.maps.cpu().numpy())
    return collected


def _mask(item: Loaded, preprocessing: Preprocessing) -> NDArray[np.bool_] | None:
    """The lesion mask at the network's input size; all False for a normal row, None where it is unknown."""
    if item.sample.label == 0:
        return np.zeros(preprocessing.size, bool)
    mask = read_mask_of(item.sample)
    if mask is None:
        return None
    if item.prepared is not None and mask.shape != item.prepared.image.size:
        raise ManifestError(
            f"{item.sample.mask}: the mask has {mask.shape} pixels, its image {item.prepared.image.size}; expected the "
            "same. Export it again, or remove it from the table."
        )
    return mask_to_input(mask, preprocessing)


def _evaluation(
    task: str, shots: int, collected: _Scores, supports: Sequence[tuple[Sample, ...]], draws: range
) -> Evaluation:
    labels = np.array([sample.label for sample in collected.samples])
    patients = [sample.patient_id for sample in collected.samples]
    groups = [patient for patient in patients if patient is not None]
    by_patient = len(groups) == len(patients)
    scores = np.array([collected.scores[draw] for draw in draws])
    metrics = []
    for draw, row in zip(draws, scores, strict=True):
        figures = image_metrics(row, labels)
        if by_patient and len(set(groups)) < len(groups):
            figures["patient_auroc"] = auroc(*pool_by_patient(row, labels, groups))
        pairs = [(m, k) for m, k in zip(collected.maps[draw], collected.masks, strict=True) if k is not None]
        if any(mask.any() for _, mask in pairs):
            figures |= pixel_metrics([m for m, _ in pairs], [mask for _, mask in pairs])
        metrics.append(figures)
    return Evaluation(
        task=task,
        shots=shots,
        samples=tuple(collected.samples),
        unreadable=tuple(collected.unreadable),
        supports=tuple(supports[draw] for draw in draws),
        scores=scores,
        metrics=tuple(metrics),
        interval=bootstrap(auroc, scores, labels, groups=groups if by_patient else None),
    )


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
            "auroc_interval": list(result.interval[1:]),
            "metrics": {
                name: {"mean": mean, "sd": None if np.isnan(sd) else sd}  # JSON has no NaN
                for name, (mean, sd) in result.summary().items()
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
