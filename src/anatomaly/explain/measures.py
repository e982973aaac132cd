"""Numbers about a map of values >= 0: how far it spreads, and what it has to do with another map or with a lesion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

#: Share of the pixels that `top_share` counts.
TOP = 0.05


def entropy(heat: NDArray[Any]) -> float:
    """How far a map is spread: its entropy as a distribution over the pixels, divided by the largest possible.

    Args:
        heat: (H, W), finite, >= 0, at least two pixels.

    Returns:
        0 for a single pixel, 1 for a uniform map, NaN for a map of zeros.

    Raises:
        ValueError: A value is negative or not finite.

    Example:
        >>> entropy(np.ones((4, 4))), entropy(np.array([[1.0, 1.0, 0.0, 0.0]]))
        (1.0, 0.5)
    """
    shares = _shares(heat)
    used = shares[shares > 0]
    spread = -float((used * np.log(used)).sum()) / math.log(shares.size) if used.size else math.nan
    return spread if math.isnan(spread) else min(1.0, max(0.0, spread))  # rounding may step over the bounds


def area(heat: NDArray[Any]) -> float:
    """The same spread as a share of the picture: that of a uniform patch of equal entropy, in (0, 1].

    Example:
        >>> area(np.array([[1.0, 1.0, 0.0, 0.0]]))
        0.5
    """
    return float(heat.size ** (entropy(heat) - 1.0))


def top_share(heat: NDArray[Any]) -> float:
    """Share of a map's mass in the highest 5 % of its pixels; at least one pixel, NaN for a map of zeros."""
    shares = np.sort(_shares(heat), axis=None)
    return float(shares[-max(1, round(TOP * shares.size)) :].sum())


def agreement(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Spearman's rank correlation of two (H, W) maps over their pixels; NaN where one of them is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(heat) - (heat.size + 1) / 2 for heat in (one, other)]  # ties share their mean rank
    norms = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1]) / norms if norms else math.nan


def lift(heat: NDArray[Any], mask: NDArray[np.bool_]) -> float:
    """Share of a map's mass inside the lesion over the lesion's share of the area.

    Args:
        heat: (H, W), finite, >= 0.
        mask: (H, W), True = lesion.

    Returns:
        1 for a map that knows nothing of the lesion, 1 / area for one that lies inside it, NaN without a lesion.
    """
    return float(_shares(heat)[mask].sum() / mask.mean()) if mask.any() else math.nan


def _shares(heat: NDArray[Any]) -> NDArray[np.float64]:
    """A map divided by its sum, NaN everywhere if that is 0."""
    values = np.asarray(heat, np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("map: holds a negative or non-finite value, expected finite values >= 0.")
    total = values.sum()
    shares: NDArray[np.float64] = values / total if total else np.full(values.shape, math.nan)
    return shares


def mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean of one column over the rows that have a number there, NaN where none has."""
    values = [row[key] for row in rows if not math.isnan(row[key])]
    return float(np.mean(values)) if values else math.nan
