"""Which pixels of a map are marked: those that carry the call of their image, at the rate asked for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anatomaly.scoring import image_score

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from anatomaly.types import Scoring


class Marking(NamedTuple):
    """How pixels are marked in a run.

    Attributes:
        alpha: The false-positive rate at which images are called.
        threshold: The calibrated score: images above it are called.
        scoring: How maps became scores.
    """

    alpha: float
    threshold: float
    scoring: Scoring

    @property
    def name(self) -> str:
        """Such as "5 % false-positive rate"."""
        return f"{100 * self.alpha:.4g} % false-positive rate"


def marked(
    anomaly_map: NDArray[np.float32], *, score: float, p_value: float | None, marking: Marking
) -> NDArray[np.bool_]:
    """The pixels that carry a call.

    An image that is not called has none, so at most `alpha` of the normal units have a marked pixel.  In one that is,
    a pixel counts if its map, scaled so that it pools to the image's score, is above the threshold; there is at least
    one.  Where the score is pooled from the map itself, the scaling is 1, but for the way back to the source's pixels.

    Args:
        anomaly_map: (H, W) in map units.
        score: Of the image.
        p_value: Of the image; None (a support, an image calibrated on) is never called.
        marking: Rate, threshold and scoring.

    Returns:
        (H, W), True where marked.

    Example:
        >>> from anatomaly.types import Scoring
        >>> rule = Marking(0.1, threshold=2.0, scoring=Scoring(pooling="max"))
        >>> marked(np.float32([[1, 3, 4]]), score=4.0, p_value=0.05, marking=rule).tolist()
        [[False, True, True]]
        >>> marked(np.float32([[1, 3, 4]]), score=4.0, p_value=0.2, marking=rule).any().item()
        False
    """
    if p_value is None or p_value > marking.alpha:
        return np.zeros(anomaly_map.shape, np.bool_)
    values = np.nan_to_num(anomaly_map, nan=-np.inf)
    pooled, top = float(image_score(torch.from_numpy(values[None]), marking.scoring)), values.max()
    cut = marking.threshold * pooled / score if score > 0 else pooled
    return values > cut if cut < top else values == top


def rows_with_maps(out: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run's `scores.jsonl` whose map is on disk, in order."""
    with (out / "scores.jsonl").open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        yield from (row for row in rows if row["map"] is not None)
