"""How well scores separate normal from anomalous images and patients, and how sure we are of it.

Scores are raw and unbounded: only their order counts, and nothing here rescales or guesses what they mean.  Image
AUROC and AP are scikit-learn's.  Metrics of pixels are in `pixel_metrics`, tests of two methods in `comparison`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Interval(NamedTuple):
    """A metric with its bootstrap confidence interval.

    Attributes:
        value: The metric on the data as they are.
        low: Lower end of the interval, NaN where there is none (`no_interval`).
        high: Upper end of the interval, likewise.
    """

    value: float
    low: float
    high: float


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Measure how well image scores (or pooled patient scores) separate the two classes.

    Args:
        scores: (N,) finite, any range, higher = more anomalous.
        labels: (N,) 0 normal, 1 anomalous.

    Returns:
        "auroc"; "ap", the step-wise area under precision-recall (no interpolation); "f1max", the best F1 over all
        thresholds, so chosen on these very labels; "f1max_floor", the F1 of calling everything anomalous, 2p / (1 + p)
        for a share p of anomalous items: an "f1max" near it means nothing was learnt.  All in [0, 1].

    Raises:
        ValueError: One class is missing, a score is not finite, a label is not 0 or 1, or the lengths differ.

    Example:
        >>> image_metrics([20, 30, 40, 50], [0, 0, 1, 1])["auroc"]
        1.0
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    values, classes = checked_scores(scores, labels)
    anomalous = int(classes.sum())
    _require_both_classes(len(classes) - anomalous, anomalous)
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "ap": float(average_precision_score(labels, scores)),
        "f1max": _f1_max(values, classes),
        "f1max_floor": 2.0 * anomalous / (anomalous + len(classes)),
    }


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Image AUROC alone, from ranks (Mann-Whitney): what resampling calls thousands of times.

    Args:
        scores: (N,), or (D, N) for the mean over D support draws of the same images; finite.
        labels: (N,) 0 normal, 1 anomalous.

    Returns:
        In [0, 1]; a tie counts one half, as in `image_metrics`.

    Raises:
        ValueError: One class is missing.

    Example:
        >>> auroc([[20, 30, 40, 50], [50, 40, 30, 20]], [0, 0, 1, 1])
        0.5
    """
    from scipy.stats import rankdata

    anomalous = np.asarray(labels) == 1
    found, normals = int(anomalous.sum()), int((~anomalous).sum())
    _require_both_classes(normals, found, "auroc")
    ranks = rankdata(np.asarray(scores, np.float64), axis=-1)[..., anomalous].sum(axis=-1)
    return float(np.mean((ranks - found * (found + 1) / 2) / (found * normals)))


def pool_by_patient(scores: ArrayLike, labels: ArrayLike, patient_ids: Sequence[str]) -> tuple[Floats, Integers]:
    """Turn image scores into patient scores, the highest of each: images of one patient are no independent evidence.

    That fits a lesion seen on few slices but grows with the number of slices.

    Args:
        scores: (N,) finite.
        labels: (N,) 0 normal, 1 anomalous.
        patient_ids: N grouping keys, none missing.

    Returns:
        Scores (P,) float64 and labels (P,) int64 in the order of the sorted ids; a patient is
        anomalous if any image is.

    Raises:
        ValueError: An id is missing, lengths differ, or scores or labels are unusable.

    Example:
        >>> pool_by_patient([0.1, 0.9, 0.2], [0, 1, 0], ["a", "a", "b"])
        (array([0.9, 0.2]), array([1, 0]))
    """
    image_scores, image_labels = checked_scores(scores, labels)
    patients, owner = number_patients(patient_ids, len(image_scores))
    pooled_labels = np.zeros(patients, np.int64)
    np.maximum.at(pooled_labels, owner, image_labels)
    pooled = np.full(patients, -np.inf)
    np.maximum.at(pooled, owner, image_scores)
    return pooled, pooled_labels


def bootstrap(
    metric: Callable[[Floats, Integers], float],
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a metric, resampled within each class (by patient where `groups` is given).

    Patients fall into three strata: only normal images, only anomalous ones, both; each keeps its number of patients,
    so every resample holds both classes.  Without groups every image is its own patient.  The interval covers the
    choice of test images only, not the choice of support or training seed, and is too narrow where the metric sits at
    its bound: a perfect AUROC gives (1, 1) with two images of each class already.

    Args:
        metric: Takes scores (M,) or (D, M) float64 and labels (M,) int64, such as `auroc`.
        scores: (N,), or (D, N) for D support draws of the same images; finite.
        labels: (N,) 0 normal, 1 anomalous.
        groups: N patient ids, none missing.
        samples: Number of resamples, >= 1.
        confidence: Coverage aimed at, in (0, 1).
        seed: Seed of the resampling.

    Returns:
        The metric on all data and the two ends of its interval, NaN where `no_interval` gives a reason.

    Raises:
        ValueError: An argument is out of range, an id is missing, or the metric refuses the data.

    Example:
        >>> bootstrap(auroc, [1, 2, 3, 4], [0, 1, 0, 1], samples=200)
        Interval(value=0.75, low=0.0, high=1.0)
    """
    if samples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"bootstrap: got samples={samples} and confidence={confidence},"
            " expected samples >= 1 and a confidence between 0 and 1."
        )
    values_by_draw = np.asarray(scores, np.float64)
    for row in np.atleast_2d(values_by_draw):
        _, image_labels = checked_scores(row, labels)
    images_in_all = len(image_labels)
    patients, owner = number_patients(groups if groups is not None else range(images_in_all), images_in_all)
    strata = _strata(image_labels, owner, patients)
    value = float(metric(values_by_draw, image_labels))
    if no_interval(image_labels, groups) is not None:
        return Interval(value, float("nan"), float("nan"))
    by_patient = np.argsort(owner, kind="stable")
    images = np.split(by_patient, np.cumsum(np.bincount(owner))[:-1])  # image indices of every patient

    generator = np.random.default_rng(seed)
    values = np.empty(samples)
    for sample in range(samples):
        drawn = np.concatenate([generator.choice(stratum, len(stratum)) for stratum in strata])
        chosen = np.concatenate([images[patient] for patient in drawn])
        values[sample] = metric(values_by_draw[..., chosen], image_labels[chosen])
    low, high = np.quantile(values, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return Interval(value, float(low), float(high))


def no_interval(labels: ArrayLike, groups: Sequence[str] | None = None) -> str | None:
    """Why an interval cannot be had, or None where it can.

    `bootstrap` needs two patients of the same kind (only normal images, only anomalous ones, both) that hold images of
    a class: else every resample holds the very same images of that class, and "1.000 to 1.000" would be made up.

    Args:
        labels: (N,) 0 normal, 1 anomalous.
        groups: N patient ids, none missing; without them every image is its own patient.

    Returns:
        The end of a sentence, without a full stop.

    Example:
        >>> no_interval([0, 0, 0, 1])
        'it needs 2 images of a class, there is 1 anomalous one'
    """
    classes = np.asarray(labels, np.int64)
    patients, owner = number_patients(groups if groups is not None else range(len(classes)), len(classes))
    only_normal, only_anomalous, both = map(len, _strata(classes, owner, patients))
    unit = "image" if groups is None else "patient"
    kinds = (("normal", only_normal), ("anomalous", only_anomalous))
    for name, own in kinds:
        if own + both < 2:
            return f"it needs 2 {unit}s of a class, there is {own + both or 'no'} {name} one"
    for name, own in kinds:
        if own < 2 and both < 2:
            return f"it needs 2 patients alike, there is 1 with {name} images only and 1 with images of both classes"
    return None


def summarise_draws(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of a metric over support draws; the sd of a single draw is NaN.

    Args:
        values: One metric value per draw, at least one.

    Returns:
        (mean, sd).  NaN, not 0, for one draw: its spread is unknown, and 0 would read as "no spread".

    Raises:
        ValueError: `values` is empty.

    Example:
        >>> summarise_draws([0.5, 0.75, 1.0])
        (0.75, 0.25)
    """
    if len(values) == 0:
        raise ValueError("summarise_draws: got no values, expected one per support draw.")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _strata(labels: Integers, owner: Integers, patients: int) -> list[Integers]:
    """Patients with only normal images, only anomalous ones, and both."""
    share = np.bincount(owner, weights=labels, minlength=patients) / np.bincount(owner, minlength=patients)
    return [np.flatnonzero(chosen) for chosen in (share == 0, share == 1, (share > 0) & (share < 1))]


def number_patients(groups: Sequence[Any], images: int) -> tuple[int, Integers]:
    """Number the patients.

    Args:
        groups: Patient id of every image, none missing.
        images: Number of images.

    Returns:
        How many patients there are and, for every image, the number of its patient in the order of the sorted ids.

    Raises:
        ValueError: An id is missing.
    """
    missing = sum(group is None for group in groups)
    if len(groups) != images or missing:
        raise ValueError(
            f"patient ids: got {len(groups)} for {images} images, {missing} of them missing, expected one per image."
            " Leave images without an id out, or measure per image."
        )
    names, owner = np.unique(np.asarray(groups), return_inverse=True)
    return len(names), owner.astype(np.int64)


def checked_scores(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Integers]:
    """Take scores and labels as arrays, or refuse them.

    Args:
        scores: (N,).
        labels: (N,).

    Returns:
        Scores (N,) float64, all finite, and labels (N,) int64, all 0 or 1.

    Raises:
        ValueError: They are not.
    """
    values, classes = np.asarray(scores, np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != classes.shape:
        raise ValueError(f"metrics: got scores {values.shape} and labels {classes.shape}, expected (N,) twice.")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"metrics: {bad} of {len(values)} scores are NaN or infinite. Leave out images that failed.")
    if not ((classes == 0) | (classes == 1)).all():
        raise ValueError("metrics: a label is neither 0 (normal) nor 1 (anomalous). Leave out unlabelled images.")
    return values, classes.astype(np.int64)


def _require_both_classes(normal: int, anomalous: int, where: str = "metrics") -> None:
    if not normal or not anomalous:
        raise ValueError(f"{where}: needs both classes, got {normal} normal and {anomalous} anomalous.")


def _f1_max(values: Floats, classes: Integers) -> float:
    """The best F1 of calling everything anomalous that scores at least as high as some item."""
    order = np.argsort(-values)
    descending, hits = values[order], np.cumsum(classes[order])
    last = np.append(descending[1:] != descending[:-1], True)  # of equal scores: a threshold calls all or none
    called = np.arange(1, len(values) + 1)
    return float(np.max((2.0 * hits / (hits[-1] + called))[last]))
