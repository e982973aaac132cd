"""Find the support image that does not belong: every one judged by those of other patients.

Scores of normal images of one kind differ by a factor, so their logarithms are compared: each with the mean of the
other patients' means, in units of a spread to which the others' own and the usual one of kinds of images both
contribute (a moderated t-test, corrected for the number of supports).  `benchmarks/support_screening.py` measures what
it finds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The usual spread of the logarithms, and for how many observations it counts; rounded from eleven real sets.
_SPREAD, _COUNTS = 0.1, 4
#: A score below this share of the median says that another support is nearly the same image.
_TWIN = 0.5
_ALPHA = 0.05
#: Of three images two may be of one patient, and then the third would always stand out.
FEWEST = 4


class Screened(NamedTuple):
    """One support beside the others.

    Attributes:
        score: Its image score, judged by the others.
        ratio: That score over the geometric mean of the others'.
        p_value: Of K supports that all belong, how often at least one would stand out so much.
        odd: Whether it stands out, at 5 %.
        twin: Whether another support is nearly the same image.
    """

    score: float
    ratio: float
    p_value: float
    odd: bool
    twin: bool


def screen(scores: Sequence[float], patients: Sequence[int] = ()) -> tuple[Screened, ...]:
    """Say of every support whether it stands out among those of other patients.

    Args:
        scores: `SupportBank.normal_scores`: K, each of a support judged by the others, at least 0.
        patients: `SupportBank.patients`; without, all are of different ones.

    Returns:
        One entry per score; none where there are fewer than `FEWEST`.

    Example:
        >>> [one.odd for one in screen([0.20, 0.21, 0.19, 0.45])]
        [False, False, False, True]
    """
    from scipy.special import stdtr  # scipy.stats takes most of a second to load

    k = len(scores)
    if k < FEWEST:
        return ()
    values = np.asarray(scores, dtype=np.float64)
    floor = _TWIN * max(float(np.median(values)), 1e-12)
    logs = np.log(np.maximum(values, floor))  # or a pair of twins would hide everything else
    found = []
    _, numbers = np.unique(np.asarray(patients or range(k)), return_inverse=True)
    means = np.bincount(numbers, logs) / np.bincount(numbers)
    for number, score in enumerate(values.tolist()):
        others = np.delete(means, numbers[number])
        n, above = len(others), logs[number] - others.mean()
        freedom = _COUNTS + n - 1
        variance = (_COUNTS * _SPREAD**2 + ((others - others.mean()) ** 2).sum()) / freedom
        p_value = min(1.0, k * float(stdtr(freedom, -above / math.sqrt(variance * (n + 1) / n))))
        found.append(Screened(score, math.exp(above), p_value, p_value < _ALPHA, score < floor))
    return tuple(found)
