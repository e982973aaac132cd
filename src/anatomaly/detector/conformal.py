"""Conformal p-values: how rare a score is among scores of images known to be normal.

Numbers only: scores in, p-values, thresholds and error rates out.  What a p-value promises, and when it does not, is in
docs/calibration.md.  n is the number of calibration units (patients, scans or images), alpha a false-positive rate.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from anatomaly.types import Calibration, Prediction, Sample, SupportBank


class Call(NamedTuple):
    """A rule that calls images anomalous, applied to a run.

    Attributes:
        name: Such as "5 % false-positive rate".
        p: Images with a p-value up to this are called; 0 calls none.
        score: The same rule on the raw score: images above it are called; infinite calls none.
    """

    name: str
    p: float
    score: float


class Exchangeability(NamedTuple):
    """Whether new normals still score like those calibrated on; each a two-sided p-value, low = they do not.

    Attributes:
        rank: Of the Mann-Whitney test: the new scores are higher, or lower, as a whole.
        shape: Of the Kolmogorov-Smirnov test: any difference between the distributions.
        higher: Share of pairs in which the new score is the higher one, ties counted half; 0.5 where nothing moved.
    """

    rank: float
    shape: float
    higher: float


def p_values(scores: ArrayLike, normals: ArrayLike) -> NDArray[np.float64]:
    """Split-conformal p-values: (1 + number of normals scored at least as high) / (n + 1).

    Args:
        scores: Of the images to judge, any shape, higher = more anomalous; NaN gives NaN.
        normals: (n,) calibration scores, n >= 1, finite.  A tie counts against calling the image anomalous.

    Returns:
        float64 in [1 / (n + 1), 1], the shape of `scores`.

    Raises:
        ValueError: There are no calibration scores, or one is not finite.

    Example:
        >>> p_values([0.0, 2.0, 9.0], [1.0, 2.0, 3.0]).tolist()
        [1.0, 0.75, 0.25]
    """
    ordered = _ordered(normals)
    values = np.asarray(scores, dtype=np.float64)
    as_high = len(ordered) - np.searchsorted(ordered, values, side="left")
    found: NDArray[np.float64] = np.where(np.isnan(values), np.nan, (1 + as_high) / (len(ordered) + 1))
    return found


def needed_normals(alpha: float) -> int:
    """The smallest n whose smallest p-value, 1 / (n + 1), reaches alpha: 19 for 5 %, 99 for 1 %.

    Raises:
        ValueError: alpha is not in (0, 1).
    """
    _check_rate("needed_normals", alpha)
    n = max(1, math.ceil(1 / alpha) - 1)
    return n if 1 / (n + 1) <= alpha else n + 1  # 1 / alpha is rounded


def threshold(normals: ArrayLike, alpha: float) -> float:
    """The score above which an image is called, at a false-positive rate of at most alpha.

    This is the ceil((1 - alpha)(n + 1))-th smallest of the n scores; `score > threshold` is `p_value <= alpha`.

    Args:
        normals: (n,) calibration scores, finite.
        alpha: In (0, 1).

    Raises:
        ValueError: n is too small for alpha (the message says what n would do), or alpha not in (0, 1).

    Example:
        >>> threshold(range(1, 20), 0.05), threshold(range(1, 20), 0.1)
        (19.0, 18.0)
    """
    ordered = _ordered(normals)
    n = len(ordered)
    return float(ordered[n - _ranks("threshold", n, alpha)])


def false_positive_range(n: int, alpha: float, *, coverage: float = 0.9) -> tuple[float, float]:
    """Where the false-positive rate of one calibration lies: alpha is its bound on average over calibrations.

    For continuous scores, the rate of the threshold from n units is Beta(j, n + 1 - j) distributed with
    j = floor(alpha (n + 1)) (Vovk 2012, arXiv 1209.2673).

    Args:
        n: Number of calibration units.
        alpha: In (0, 1), at least 1 / (n + 1).
        coverage: Probability that the range holds the rate.

    Returns:
        (low, high), the central range.

    Raises:
        ValueError: As `threshold`.

    Example:
        >>> [round(rate, 3) for rate in false_positive_range(99, 0.05)]
        [0.02, 0.09]
    """
    from scipy.stats import beta

    _check_rate("false_positive_range: coverage", coverage)
    j = _ranks("false_positive_range", n, alpha)
    tail = (1 - coverage) / 2
    return float(beta.ppf(tail, j, n + 1 - j)), float(beta.ppf(1 - tail, j, n + 1 - j))


def rejected_up_to(found: ArrayLike, q: float, *, dependent: bool = False) -> float:
    """Benjamini-Hochberg over a batch: the largest p-value called when a share q of the calls may be false.

    Args:
        found: p-values of the batch; those that are NaN take no part.
        q: False discovery rate, in (0, 1).
        dependent: Benjamini-Yekutieli instead, which holds under any dependence and calls fewer.

    Returns:
        The largest rejected p-value, or 0 if none is rejected.

    Raises:
        ValueError: q is not in (0, 1), or a p-value not in [0, 1].

    Example:
        >>> rejected_up_to([0.01, 0.02, 0.5, 0.9], 0.1)
        0.02
    """
    from scipy.stats import false_discovery_control

    _check_rate("rejected_up_to", q)
    values = np.asarray(found, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    if values.size == 0:
        return 0.0
    adjusted = false_discovery_control(values, method="by" if dependent else "bh")
    return float(values[adjusted <= q * (1 + 1e-12)].max(initial=0.0))  # p m / i may round to just above q


def needed_calls(n: int, m: int, q: float, *, dependent: bool = False) -> int:
    """The fewest of m that false discovery control can call at once, since no p-value is below 1 / (n + 1).

    Args:
        n: Number of calibration units.
        m: Size of the batch.
        q: False discovery rate, in (0, 1).
        dependent: As in `rejected_up_to`.

    Returns:
        At least 1; above m where not even a batch of nothing but anomalies could be called.

    Example:
        >>> needed_calls(19, 40, 0.1), needed_calls(8, 40, 0.1)
        (20, 45)
    """
    _check_rate("needed_calls", q)
    penalty = sum(1 / i for i in range(1, m + 1)) if dependent else 1.0
    return max(1, math.ceil(m * penalty / (q * (n + 1)) - 1e-9))


def exchangeability(normals: ArrayLike, new: ArrayLike) -> Exchangeability:
    """Compare the scores of new normals with those calibrated on.

    Both samples are random, so this is a two-sample test of the scores (equal to one of the p-values' ranks): p-values
    that share one calibration set are neither independent nor continuous, and a one-sample test against the uniform
    distribution would reject sound calibrations.

    Args:
        normals: (n,) calibration scores, one per unit.
        new: (m,) scores of other normal units, pooled in the same way.

    Raises:
        ValueError: Either holds no score, or one that is not finite.

    Example:
        >>> exchangeability(range(20), range(100, 110)).higher
        1.0
    """
    from scipy.stats import ks_2samp, mannwhitneyu

    old, recent = _ordered(normals), _ordered(new)
    rank = mannwhitneyu(recent, old, alternative="two-sided")
    higher = float(rank.statistic) / (len(old) * len(recent))
    return Exchangeability(float(rank.pvalue), float(ks_2samp(recent, old).pvalue), higher)


def unit_of(sample: Sample, sha256: str, unit: Literal["patient", "scan", "image"]) -> Hashable:
    """The key of the unit an image belongs to; an image of an unknown patient belongs to its file.

    Args:
        sample: The row.
        sha256: Its `digest#frame`.
        unit: As in `Calibration`.
    """
    if unit == "image":
        return sha256
    if unit == "patient" and sample.patient_id is not None:
        return ("patient", sample.patient_id)
    return ("scan", sha256.partition("#")[0])


def misfit(calibration: Calibration, wanted: Calibration) -> list[str]:
    """In what a calibration differs from the setting to judge in; empty where its p-values hold.

    Args:
        calibration: The stored one.
        wanted: The setting: every fact but the scores and images.
    """
    differences = []
    if calibration.task != wanted.task:
        differences.append(f"task {calibration.task!r} instead of {wanted.task!r}")
    if calibration.model_hash != wanted.model_hash:
        differences.append("another model")
    if calibration.bank_digest != wanted.bank_digest:
        differences.append("another support bank")
    if calibration.preprocessing != wanted.preprocessing:
        differences.append("another preprocessing")
    if calibration.scoring != wanted.scoring:
        differences.append("another scoring")
    if calibration.precision != wanted.precision:
        differences.append(f"{calibration.precision} instead of {wanted.precision}")
    return differences


def best_fit(calibrations: Sequence[Calibration], wanted: Calibration) -> tuple[Calibration | None, str]:
    """The calibration for a setting, and one line to say about it.

    Args:
        calibrations: Those stored.  Of several that fit, one on held-out images comes before the support's own, then
            the one on more units.
        wanted: As in `misfit`.

    Returns:
        The calibration, or None; the line says why there is none and is empty where nothing was ever calibrated.
    """
    found = sorted(
        ((misfit(each, wanted), each) for each in calibrations),
        key=lambda pair: (len(pair[0]), pair[1].kind != "held-out", -pair[1].n),
    )
    if not found:
        return None, ""
    differences, nearest = found[0]
    if differences:
        made = ", ".join(differences)
        return None, f"no p-values: calibrated with {made}. Run anatomaly calibrate for what is judged here."
    return nearest, f"p-values: {describe(nearest)}"


def beside(calibrations: Sequence[Calibration], new: Calibration, *, replace_all: bool) -> tuple[Calibration, ...]:
    """A new calibration and those that stay beside it: of other settings, and better ones of its own.

    Args:
        calibrations: Those of before.
        new: It takes the place of those of the same setting and kind on no more units.
        replace_all: It takes the place of all of the same setting.
    """

    def stays(each: Calibration) -> bool:
        better = each.kind != new.kind or each.n > new.n
        return bool(misfit(each, new)) or (better and not replace_all)

    return (*filter(stays, calibrations), new)


def with_p_value(prediction: Prediction, bank: SupportBank, calibration: Calibration | None) -> Prediction:
    """Add the p-value, or a note where the model has seen the very image.

    Args:
        prediction: As scored against `bank`.
        bank: The supports.
        calibration: One that fits, or None.
    """
    if prediction.sha256 in bank.sha256:
        return _noted(prediction, "one of the support images: compared with itself")
    if calibration is None or (prediction.sample.cut is not None and not bank.places):  # calibrated on other slices
        return prediction
    if prediction.sha256 in calibration.sha256:
        return _noted(prediction, "one of the calibration images: no p-value")
    value = float(p_values(prediction.score, calibration.scores))
    return prediction if np.isnan(value) else replace(prediction, p_value=value)


def _noted(prediction: Prediction, note: str) -> Prediction:
    """The prediction with one more note."""
    return replace(prediction, note=note if prediction.note is None else f"{prediction.note}; {note}")


def describe(calibration: Calibration) -> str:
    """A calibration in a line, such as "50 normal patients held out, smallest possible 0.0196"."""
    held = "held out" if calibration.kind == "held-out" else "of the support, each judged by the others"
    vague = ", approximate" if calibration.guarantee == "approximate" else ""
    n, unit = calibration.n, calibration.unit
    return f"{n} normal {unit}{'s' * (n != 1)} {held}{vague}; smallest possible {1 / (n + 1):.3g}."


def _ordered(normals: ArrayLike) -> NDArray[np.float64]:
    ordered = np.sort(np.asarray(normals, dtype=np.float64).ravel())
    if ordered.size == 0 or not np.isfinite(ordered).all():
        raise ValueError(
            f"calibration: got {ordered.size} scores, {int((~np.isfinite(ordered)).sum())} of them not finite; "
            "expected at least one, all finite."
        )
    return ordered


def _ranks(where: str, n: int, alpha: float) -> int:
    """How many of the n + 1 ranks may be called: the largest j with j / (n + 1) <= alpha."""
    needed = needed_normals(alpha)
    if n < needed:
        raise ValueError(
            f"{where}: a false-positive rate of {alpha:.4g} needs at least {needed} normal units, got {n}: their "
            f"smallest possible p-value is {1 / (n + 1):.3g}."
        )
    j = int(alpha * (n + 1))
    return j + 1 if (j + 1) / (n + 1) <= alpha else j  # the product is rounded, as 0.07 * 100 to 7.000000000000001


def _check_rate(where: str, rate: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"{where}: got {rate}, expected a rate between 0 and 1, such as 0.05.")
