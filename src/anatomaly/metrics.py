"""How well scores separate normal from anomalous: per image, per pixel, per patient, and how sure we are of it.

Scores are raw and unbounded: only their order counts, and nothing here rescales or guesses what they mean.  Image
AUROC and AP are scikit-learn's.  Pixel metrics rest on one table (`_Counts`): for each lesion pixel, how many lesion
and how many normal pixels score at least as high.  All curves change only there, so they are exact, ties included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: AUPRO is the area under the per-region overlap up to this false positive rate (the convention since MVTec AD).
AUPRO_LIMIT = 0.3

Scores = NDArray[np.float32] | NDArray[np.float64]  # of one precision within a call: comparisons must be exact
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Interval(NamedTuple):
    """A metric with its bootstrap confidence interval.

    Attributes:
        value: The metric on the data as they are.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float


class _Counts(NamedTuple):
    """What passes a threshold set to the score of each of the P anomalous items, by ascending score; each (P,)."""

    hits: Integers  # anomalous items that score at least as high
    false_alarms: Integers  # normal items that score at least as high
    outright: Integers  # of these, the ones that score strictly higher; the rest are ties
    normals: int  # normal items in all


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

    counts = _count_images(scores, labels)
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "ap": float(average_precision_score(labels, scores)),
        "f1max": _f1_max(counts),
        "f1max_floor": _f1_floor(counts),
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
    _require_both_classes("auroc", normals, found, "anomalous")
    ranks = rankdata(np.asarray(scores, np.float64), axis=-1)[..., anomalous].sum(axis=-1)
    return float(np.mean((ranks - found * (found + 1) / 2) / (found * normals)))


def pool_by_patient(
    scores: ArrayLike, labels: ArrayLike, patient_ids: Sequence[str], how: Literal["max", "mean"] = "max"
) -> tuple[Floats, Integers]:
    """Turn image scores into patient scores: images of one patient are no independent evidence.

    Args:
        scores: (N,) finite.
        labels: (N,) 0 normal, 1 anomalous.
        patient_ids: N grouping keys, none missing.
        how: "max" fits a lesion seen on few slices but grows with the number of slices; "mean" does not.

    Returns:
        Scores (P,) float64 and labels (P,) int64 in the order of the sorted ids; a patient is
        anomalous if any image is.

    Raises:
        ValueError: An id is missing, lengths differ, or scores or labels are unusable.

    Example:
        >>> pool_by_patient([0.1, 0.9, 0.2], [0, 1, 0], ["a", "a", "b"])
        (array([0.9, 0.2]), array([1, 0]))
    """
    image_scores, image_labels = _scores_and_labels(scores, labels)
    patients, owner = _owners(patient_ids, len(image_scores))
    pooled_labels = np.zeros(patients, np.int64)
    np.maximum.at(pooled_labels, owner, image_labels)
    if how == "max":
        pooled = np.full(patients, -np.inf)
        np.maximum.at(pooled, owner, image_scores)
    elif how == "mean":
        pooled = np.bincount(owner, weights=image_scores) / np.bincount(owner)
    else:
        raise ValueError(f"pool_by_patient: how is {how!r}, expected 'max' or 'mean'.")
    return pooled, pooled_labels


def pixel_metrics(maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]) -> dict[str, float]:
    """Measure how well anomaly maps find the lesion pixels, all images pooled.

    Exact: no histogram, no subsampling.  Maps and masks are walked through twice, one at a time, so with sequences that
    load their items on demand the memory peaks near 100 bytes per lesion pixel; normal pixels cost none.

    Args:
        maps: (H, W) each, float32, finite, any range; sizes may differ from image to image.
        masks: (H, W) bool each, True = lesion, all False for a normal image.  Images that are anomalous but have no
            mask must be left out by the caller.

    Returns:
        "pixel_auroc"; "aupro", the overlap averaged over lesions (8-connected regions, so that small ones count as
        much as large ones) integrated over false positive rates 0 to 0.3 and divided by 0.3; "dice_max", the best
        Dice over all thresholds: the threshold is chosen on these very masks, so it is an upper bound for any fixed
        one; "dice_floor", the Dice of calling every pixel a lesion.  All in [0, 1].

    Raises:
        ValueError: No lesion or no normal pixel, shapes or lengths differ, a mask is not bool, a map is not finite.

    Example:
        >>> mask = np.zeros((4, 4), bool)
        >>> mask[1, 1] = True
        >>> pixel_metrics([mask.astype(np.float32)], [mask])["aupro"]
        1.0
    """
    scores, shares = _lesion_pixels(maps, masks)
    counts = _count(scores, (anomaly_map[~mask] for anomaly_map, mask in _pairs(maps, masks)))
    _require_both_classes("pixel_metrics", counts.normals, len(scores), "lesion pixels")
    return {
        "pixel_auroc": _area(counts, limit=1.0),
        "aupro": _area(counts, limit=AUPRO_LIMIT, shares=shares),
        "dice_max": _f1_max(counts),
        "dice_floor": _f1_floor(counts),
    }


def _pairs(
    maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    if len(maps) != len(masks):
        raise ValueError(f"pixel_metrics: got {len(maps)} maps and {len(masks)} masks, expected one mask per map.")
    for index, (item, mask) in enumerate(zip(maps, masks, strict=True)):
        anomaly_map, mask = np.asarray(item, np.float32), np.asarray(mask)
        if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:
            raise ValueError(
                f"pixel_metrics: map {index} is {anomaly_map.shape} and its mask {mask.shape}, expected (H, W) twice."
            )
        if mask.dtype != np.bool_:  # 0.5 after resampling, 255, class numbers: what counts as lesion is not guessed
            raise ValueError(f"pixel_metrics: mask {index} is {mask.dtype}, expected bool. Pass e.g. mask > 0.")
        if not np.isfinite(anomaly_map).all():
            raise ValueError(f"pixel_metrics: map {index} holds NaN or infinite values, expected finite scores.")
        yield anomaly_map, mask


def _lesion_pixels(
    maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]
) -> tuple[NDArray[np.float32], Floats]:
    """Scores of all lesion pixels, ascending, and the share of its region that each pixel makes up."""
    from scipy import ndimage

    scores, shares = [np.empty(0, np.float32)], [np.empty(0)]
    for anomaly_map, mask in _pairs(maps, masks):
        regions, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        region = regions[mask]
        scores.append(anomaly_map[mask])
        shares.append(1.0 / np.bincount(region)[region])
    pooled = np.concatenate(scores)
    order = np.argsort(pooled)
    return pooled[order], np.concatenate(shares)[order]


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
    its bound: a perfect AUROC gives (1, 1) however few images there are.

    Args:
        metric: Takes scores (M,) or (D, M) float64 and labels (M,) int64, such as `auroc`.
        scores: (N,), or (D, N) for D support draws of the same images; finite.
        labels: (N,) 0 normal, 1 anomalous.
        groups: N patient ids, none missing.
        samples: Number of resamples, >= 1.
        confidence: Coverage aimed at, in (0, 1).
        seed: Seed of the resampling.

    Returns:
        The metric on all data and the two ends of its interval.

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
        _, image_labels = _scores_and_labels(row, labels)
    images_in_all = len(image_labels)
    patients, owner = _owners(groups if groups is not None else range(images_in_all), images_in_all)
    strata = _strata(image_labels, owner, patients)
    value = float(metric(values_by_draw, image_labels))
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


def _owners(groups: Sequence[Any], images: int) -> tuple[int, Integers]:
    """Number of patients and, for every image, the number of its patient in the order of the sorted ids."""
    missing = sum(group is None for group in groups)
    if len(groups) != images or missing:
        raise ValueError(
            f"patient ids: got {len(groups)} for {images} images, {missing} of them missing, expected one per image."
            " Leave images without an id out, or measure per image."
        )
    names, owner = np.unique(np.asarray(groups), return_inverse=True)
    return len(names), owner.astype(np.int64)


def _scores_and_labels(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Integers]:
    values, classes = np.asarray(scores, np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != classes.shape:
        raise ValueError(f"metrics: got scores {values.shape} and labels {classes.shape}, expected (N,) twice.")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"metrics: {bad} of {len(values)} scores are NaN or infinite. Leave out images that failed.")
    if not ((classes == 0) | (classes == 1)).all():
        raise ValueError("metrics: a label is neither 0 (normal) nor 1 (anomalous). Leave out unlabelled images.")
    return values, classes.astype(np.int64)


def _count_images(scores: ArrayLike, labels: ArrayLike) -> _Counts:
    values, classes = _scores_and_labels(scores, labels)
    anomalous, normal = np.sort(values[classes == 1]), values[classes == 0]
    _require_both_classes("metrics", len(normal), len(anomalous), "anomalous")
    return _count(anomalous, [normal])


def _require_both_classes(where: str, normal: int, anomalous: int, name: str) -> None:
    if not normal or not anomalous:
        raise ValueError(f"{where}: needs both classes, got {normal} normal and {anomalous} {name}.")


def _count(anomalous: Scores, normals: Iterable[Scores]) -> _Counts:
    """Fill the table from the anomalous scores, ascending, and the normal scores in any number of chunks."""
    false_alarms, outright = np.zeros((2, len(anomalous) + 1), np.int64)
    total = 0
    for chunk in normals:
        ascending = np.sort(chunk)  # look-ups in order stay in the cache
        np.add.at(outright, np.searchsorted(anomalous, ascending, "left"), 1)
        np.add.at(false_alarms, np.searchsorted(anomalous, ascending, "right"), 1)
        total += len(chunk)
    for histogram in (false_alarms, outright):  # a normal item at place i passes the thresholds 0 .. i - 1
        np.cumsum(histogram[::-1], out=histogram[::-1])
    hits = len(anomalous) - np.searchsorted(anomalous, anomalous, "left")
    return _Counts(hits, false_alarms[1:], outright[1:], total)


def _area(counts: _Counts, *, limit: float, shares: Floats | None = None) -> float:
    """Area under the curve of found shares over false positive rates 0 to `limit`, divided by `limit`.

    The curve rises by a pixel's share where the false positive rate passes from `start` (normals strictly above it) to
    `stop` (ties included), linearly in between; what lies beyond the limit is cut off at the limit exactly.
    """
    start, stop = counts.outright / counts.normals, counts.false_alarms / counts.normals
    ties = np.maximum(stop - start, np.finfo(np.float64).tiny)
    start, stop = np.minimum(start, limit), np.minimum(stop, limit)
    risen = (stop - start) / ties  # how far the rise got before the limit; 0 without ties
    beyond = limit - stop + (stop - start) * risen / 2.0  # area that a rise of 1 leaves to its right, up to the limit
    return float(np.average(beyond / limit, weights=shares))


def _f1_max(counts: _Counts) -> float:
    return float(np.max(2.0 * counts.hits / (len(counts.hits) + counts.hits + counts.false_alarms)))


def _f1_floor(counts: _Counts) -> float:
    """2p / (1 + p) for a share p of anomalous items."""
    return 2.0 * len(counts.hits) / (2.0 * len(counts.hits) + counts.normals)
