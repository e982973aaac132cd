"""Comparisons -> anomaly map -> image score, each image by itself (the promise of `spine.predict_tensor`)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from anatomaly.types import Comparison, Scoring


def anomaly_map(comparisons: Sequence[Comparison], size: tuple[int, int]) -> Tensor:
    """Sum the cosine distances of all levels at pixel resolution, each as `Comparison` says it counts.

    Args:
        comparisons: Pairs (student, target), each (B, C, h, w); levels may differ in C, h, w.
        size: (H, W) of the map.

    Returns:
        (B, H, W), float32, no blur, no normalisation; in [0, 2 * len(comparisons)] where all levels have scale 1 and
        surround 0, below 0 where a place is more normal than its surroundings.

    Raises:
        ValueError: `comparisons` is empty.

    Example:
        >>> from anatomaly.types import Comparison
        >>> f = torch.ones(2, 8, 4, 4)
        >>> anomaly_map([Comparison(f, f), Comparison(f, -f)], (16, 16)).mean()
        tensor(2.)
    """
    if not comparisons:
        raise ValueError("anomaly_map: got an empty sequence, expected at least one Comparison.")
    total = comparisons[0].student.new_zeros(len(comparisons[0].student), *size, dtype=torch.float32)
    judged = torch.zeros_like(total)  # what counts by how much it exceeds its surroundings
    for student, target, _, scale, surround in comparisons:
        distance = 1.0 - F.cosine_similarity(student.float(), target.float(), dim=1)  # (B, h, w)
        level = F.interpolate(distance[:, None], size, mode="bilinear", align_corners=True)[:, 0]
        total += scale * level
        if surround:
            judged += scale * surround * level
    return total - surroundings(judged) if any(comparison.surround for comparison in comparisons) else total


#: Standard deviation of the surroundings, as a share of the map's side.
_SURROUNDINGS = 3 / 16


def surroundings(distances: Tensor) -> Tensor:
    """A wide Gaussian average around every place, borders mirrored.

    Args:
        distances: (B, h, w), float32.

    Returns:
        (B, h, w), float32; differentiable.
    """
    h, w = distances.shape[1:]
    rows, columns = (torch.from_numpy(_gaussian(side)).to(distances.device) for side in (h, w))
    return rows @ distances @ columns.T


@lru_cache
def _gaussian(side: int) -> NDArray[np.float32]:
    """(side, side) matrix whose rows average the surroundings of their place along one axis."""
    from scipy.ndimage import gaussian_filter1d

    smoothed: NDArray[np.float32] = gaussian_filter1d(np.eye(side, dtype=np.float32), _SURROUNDINGS * side, axis=0)
    return smoothed


def blur(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of each map alone.

    Args:
        maps: (B, H, W), float32.
        sigma: Standard deviation in pixels; 0 returns the maps unchanged.

    Returns:
        (B, H, W), float32, on the same device.

    Note: differs from D24FAD's release, which also blurs across the images of a batch.
    """
    if sigma == 0:
        return maps
    from scipy.ndimage import gaussian_filter

    blurred = gaussian_filter(maps.cpu().numpy(), sigma=(0, sigma, sigma))
    return torch.from_numpy(blurred).to(maps.device)


def image_score(maps: Tensor, scoring: Scoring) -> Tensor:
    """Pool each map to one number.

    Args:
        maps: (B, H, W), float32.
        scoring: The pooling.

    Returns:
        (B,), float32.

    Example:
        >>> from anatomaly.types import Scoring
        >>> maps = torch.arange(8.0).reshape(1, 2, 4)
        >>> image_score(maps, Scoring(pooling="topk", top_fraction=0.25))
        tensor([6.5000])
    """
    flat = maps.flatten(1)
    if scoring.pooling == "max":
        return flat.amax(dim=1)
    if scoring.pooling == "mean":
        return flat.mean(dim=1)
    count = max(1, round(scoring.top_fraction * flat.shape[1]))
    return flat.topk(count, dim=1).values.mean(dim=1)
