"""Which of two methods is better on the same images, and how sure that is.

Two methods that judge the same images make the same mistakes for a part: their difference is surer than their two
intervals suggest.  The tests here use that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anatomaly.evaluation.metrics import checked_scores, number_patients

Floats = NDArray[np.float64]
_CONFIDENCE = 0.95


class Difference(NamedTuple):
    """How much higher the AUROC of a first method is than that of a second one.

    Attributes:
        difference: AUROC of the first minus AUROC of the second.
        low: Lower end of its confidence interval.
        high: Upper end.
        p: Two-sided p-value of "there is no difference".
    """

    difference: float
    low: float
    high: float
    p: float


def compare_auroc(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    labels: ArrayLike,
    *,
    groups: Sequence[str] | None = None,
) -> Difference:
    """Test whether two methods have the same AUROC, given their scores of the same images.

    The mean AUROC over support draws (or seeds) is a mean of U-statistics of the same images, so the components that
    DeLong et al. give for one scoring are averaged over the draws; they come from ranks (Sun and Xu).  Components are
    summed by patient where `groups` is given, and patients are the units of the variance (Obuchowski); with one image
    per patient that is DeLong's variance, without any factor.  The components of both methods are subtracted before
    they are squared, which is the contrast (1, -1) of the 2 x 2 covariance matrix.

    The statement is about other test images (patients) of the same kind.  Draws and seeds are taken as they are.

    `bootstrap` of `lambda s, y: auroc(s[:d], y) - auroc(s[d:], y)` over both methods' scores, one above the other,
    gives much the same interval without the normal approximation.

    Args:
        scores_a: (N,), or (D, N) for D draws; finite, any range, higher = more anomalous.
        scores_b: (N,) or (E, N), of the same images in the same order.
        labels: (N,) 0 normal, 1 anomalous; both classes in two patients at least (without `groups`, two images).
        groups: N patient ids, none missing.

    Returns:
        The difference, its 95 % interval (not cut at -1 and 1) and p.  Where all patients say the same the variance is
        estimated as 0: p is 1 without a difference (two methods that rank alike) and 0 with one (a perfect method
        beside one that gives all images the same score), which overstates what few images can show.

    Raises:
        ValueError: Scores or labels are unusable, an id is missing, a class has too few images, or the numbers of
            images differ.

    Example:
        >>> found = compare_auroc([1, 2, 3, 4, 5, 6], [1, 5, 3, 4, 2, 6], [0, 0, 0, 1, 1, 1])
        >>> round(found.difference, 4), round(found.p, 4)
        (0.3333, 0.2207)

    Source:
        DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988) 837; Sun and Xu, IEEE Signal Processing Letters 21
        (2014) 1389; Obuchowski, Biometrics 53 (1997) 567.
    """
    from scipy.special import ndtr, ndtri

    first, second, anomalous = *_by_draw(scores_a, scores_b, labels), np.asarray(labels) == 1
    patients, owner = number_patients(groups if groups is not None else range(len(anomalous)), len(anomalous))
    for name, chosen in (("normal", ~anomalous), ("anomalous", anomalous)):
        if (found := len(np.unique(owner[chosen]))) < 2:
            unit = "images" if groups is None else "patients with images"
            raise ValueError(f"compare_auroc: got {found} {unit} that are {name}, expected 2 of either class or more.")
    won_a, won_b = _won(first, anomalous), _won(second, anomalous)
    won = len(second) * won_a.sum(axis=0) - len(first) * won_b.sum(axis=0)  # (N,), exact: equal methods give exactly 0
    pairs = float(np.count_nonzero(anomalous) * np.count_nonzero(~anomalous))
    scale = pairs * len(first) * len(second)
    difference = float(won[anomalous].sum() / scale)
    variance = _variance(won, anomalous, owner, patients) / scale**2
    if variance == 0.0:
        return Difference(difference, difference, difference, float(difference == 0.0))
    error = math.sqrt(variance)
    tail = (1.0 - _CONFIDENCE) / 2.0  # not 0.025: the last digit of stored figures
    margin, p = -float(ndtri(tail)) * error, 2.0 * float(ndtr(-abs(difference) / error))
    return Difference(difference, difference - margin, difference + margin, p)


def _by_draw(scores_a: ArrayLike, scores_b: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Both methods' scores as (draws, N), checked."""
    first, second = (np.atleast_2d(np.asarray(scores, np.float64)) for scores in (scores_a, scores_b))
    if not len(first) or not len(second):
        raise ValueError("compare_auroc: got no draws, expected at least one of each method.")
    for row in (*first, *second):
        checked_scores(row, labels)
    return first, second


def _won(scores: Floats, anomalous: NDArray[np.bool_]) -> Floats:
    """How many images of the other class each image is on the right side of, ties one half; (draws, N), exact.

    Ranks among all images and ranks within the class differ by the images of the other class that score lower.
    """
    from scipy.stats import rankdata

    won = rankdata(scores, axis=-1)
    for chosen in (anomalous, ~anomalous):
        won[:, chosen] -= rankdata(scores[:, chosen], axis=-1)
    won[:, ~anomalous] = np.count_nonzero(anomalous) - won[:, ~anomalous]
    return won


def _variance(won: Floats, anomalous: NDArray[np.bool_], owner: NDArray[np.int64], patients: int) -> float:
    """Obuchowski's variance of the sum of `won` over the anomalous images (which is that over the normal ones)."""
    sums, factors = [], []
    for chosen in (anomalous, ~anomalous):
        images = np.bincount(owner[chosen], minlength=patients)
        mean = won[chosen].sum() / np.count_nonzero(chosen)
        sums.append(np.bincount(owner[chosen], won[chosen], minlength=patients) - images * mean)
        concerned = np.count_nonzero(images)
        factors.append(concerned / (concerned - 1))
    both = patients / (patients - 1)
    of_anomalous, of_normal = sums
    total = factors[0] * of_anomalous @ of_anomalous + factors[1] * of_normal @ of_normal
    return max(0.0, float(total + 2.0 * both * of_anomalous @ of_normal))


def holm(p_values: ArrayLike) -> Floats:
    """Adjust p-values of several comparisons so that the chance of any false finding stays below the level.

    Args:
        p_values: (M,), each in [0, 1], in any order.

    Returns:
        (M,) adjusted p-values in the order given: reject where they are at most the level.  Never below the p-values,
        never above 1, and in the same order as the p-values.

    Raises:
        ValueError: A p-value is missing or out of range.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        array([0.03, 0.06, 0.06])

    Source:
        Holm, Scandinavian Journal of Statistics 6 (1979) 65.
    """
    values = np.asarray(p_values, np.float64)
    if values.ndim != 1 or not ((values >= 0.0) & (values <= 1.0)).all():
        raise ValueError(
            "holm: a p-value is missing or not between 0 and 1, or they are no list. Leave such tests out."
        )
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return adjusted
