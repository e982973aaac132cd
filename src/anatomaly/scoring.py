"""The spine every number comes from: features -> comparisons -> anomaly map -> image score, without state.

Training calls `predict_tensor` and its two halves to choose a checkpoint, benchmarks call them to measure,
`Detector.predict` calls them to judge a scan: one function, and one promise, at `predict_tensor`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from anatomaly.types import Comparison, Method, Scoring


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
    total = comparisons[0].student.new_zeros(comparisons[0].student.shape[0], *size, dtype=torch.float32)
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


#: Distances below this count as this in a geometric mean: of two images that are the same, only rounding is left.
_SMALLEST = 1e-6


def level_scores(comparisons: Sequence[Comparison], scoring: Scoring) -> Tensor:
    """Pool each level's distances alone, whatever their scale; there is no blur, and surroundings play no part.

    Args:
        comparisons: As in `anomaly_map`; the largest grid among them is that of all.
        scoring: The pooling.

    Returns:
        (levels, B), float32, in [0, 2].
    """
    h, w = max((comparison.student.shape[2:] for comparison in comparisons), key=math.prod)
    plain = [anomaly_map([each._replace(scale=1.0, surround=0.0)], (h, w)) for each in comparisons]
    return torch.stack([image_score(level, scoring) for level in plain])


def geometric_mean(levels: Tensor, weights: Sequence[float]) -> Tensor:
    """What `level_scores` returned as one score an image: a level counts as its weight says, not as it is large.

    Args:
        levels: (levels, B), float32.
        weights: What each level counts, at least 0, not all 0: `Comparison.scale`.

    Returns:
        (B,), float32, at least 1e-6.

    Example:
        >>> geometric_mean(torch.tensor([[0.1], [0.4]]), [1.0, 1.0])
        tensor([0.2000])
    """
    shares = levels.new_tensor(weights) / sum(weights)
    return (shares @ levels.clamp_min(_SMALLEST).log()).exp()


#: Pixels of a map that a colour scale is made from.
_PIXELS_PER_MAP = 65536


def scale_from_normals(maps: Iterable[NDArray[Any]]) -> tuple[float, float]:
    """Suggest a fixed colour scale from anomaly maps of images that are known to be normal.

    The scale starts at the median pixel of the normal maps and spans three times the distance from there to their
    99.5th percentile: the brightest spots of a normal image end up in the dark third, and there is room above them.

    Args:
        maps: At least one (H, W) map; sizes may differ.  Pixels that are not finite are ignored.

    Returns:
        (low, high) in map units, low < high even when all maps are constant.

    Raises:
        ValueError: There is no finite pixel in any map.

    Example:
        >>> scale_from_normals([np.arange(201.0)[:, None]])
        (100.0, 397.0)
    """
    pixels = [_thinned(each) for each in maps]
    pooled = np.concatenate([values[np.isfinite(values)] for values in pixels]) if pixels else np.empty(0)
    if pooled.size == 0:
        raise ValueError(f"scale_from_normals: got {len(pixels)} maps without a finite pixel, expected at least one.")
    low, top = (float(value) for value in np.percentile(pooled, (50.0, 99.5)))
    span = 3 * (top - low)
    return low, low + max(span, 1e-6 * max(1.0, abs(low)))


def _thinned(anomaly_map: NDArray[Any]) -> NDArray[np.float64]:
    """Every n-th row and column, so that a large image has no more say than a small one."""
    step = max(1, math.ceil(math.sqrt(anomaly_map.size / _PIXELS_PER_MAP)))
    return np.asarray(anomaly_map[::step, ::step], dtype=np.float64).ravel()


#: Of teacher and student; maps and scores are float32 in any case.
Precision = Literal["fp32", "bf16"]
#: Images a CPU computes at a time, at most.  PyTorch takes another convolution for one image and, in one thread, for 16
#: and more, whose last digits differ and are multiplied in what follows; from 2 to 15 it takes one and the same.
_PART = 4


class Scored(NamedTuple):
    """What `predict_tensor` returns: maps (B, H, W), scores (B,) and weights (B, levels, K) or None."""

    maps: Tensor
    scores: Tensor
    weights: Tensor | None


def encode_tensor(method: Method, images: Tensor, *, precision: Precision = "fp32") -> Sequence[Tensor]:
    """The part of a prediction that needs no support: (B, 3, H, W) images in [0, 1] -> student features per level."""
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        parts = [method.encode(method.extract(part)) for part in _parts(images)]
        return [torch.cat(level)[: len(images)] for level in zip(*parts, strict=True)]


def embed_tensor(
    method: Method, images: Tensor, *, precision: Precision = "fp32"
) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
    """Supports (K, 3, H, W) in [0, 1] -> what `method.embed_support` and `method.encode` say of them."""
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        embedded, encoded = [], []
        for part in _parts(images):
            features = method.extract_support(part)
            embedded.append(method.embed_support(features))
            encoded.append(method.encode(features))
        bank = {name: torch.cat([each[name] for each in embedded])[: len(images)] for name in embedded[0]}
        return bank, [torch.cat(level)[: len(images)] for level in zip(*encoded, strict=True)]


def _parts(images: Tensor) -> Iterator[Tensor]:
    """A batch in parts whose sizes change no digit on a CPU, see `_PART`; a lone image comes twice."""
    if images.device.type != "cpu":
        yield images
    elif len(images) == 1:
        yield images.expand(2, *images.shape[1:])
    else:
        yield from torch.tensor_split(images, max(1, math.ceil(len(images) / _PART)))


def compare_tensor(
    method: Method,
    encoded: Sequence[Tensor],
    support: Mapping[str, Tensor],
    *,
    size: tuple[int, int],
    scoring: Scoring,
) -> Scored:
    """The part of a prediction that does: encoded queries and an embedded support -> maps, scores and weights."""
    with torch.inference_mode():
        comparisons = method.compare(encoded, support)
        maps = blur(anomaly_map(comparisons, size), scoring.blur)
        if scoring.levels == "sum":
            scores = image_score(maps, scoring)
        else:
            scores = geometric_mean(level_scores(comparisons, scoring), [each.scale for each in comparisons])
        return Scored(maps, scores, _weights(comparisons))


def predict_tensor(
    method: Method,
    images: Tensor,
    support: Mapping[str, Tensor],
    *,
    scoring: Scoring,
    precision: Precision = "fp32",
) -> Scored:
    """Judge a batch of images against a support.

    The promise: on a CPU an image's score, map and weights depend on the image, the model and the support alone, to
    within 1e-5; batch size and neighbours change nothing more.  It holds on every set of instructions, though two of
    them may differ by more, and so may 1 and 2 threads.

    Args:
        method: In eval mode.
        images: (B, 3, H, W), float32, in [0, 1].
        support: What `method.embed_support` returned.
        scoring: Blur and pooling.
        precision: Of teacher and student; maps and scores are float32 in any case.
    """
    encoded = encode_tensor(method, images, precision=precision)
    return compare_tensor(method, encoded, support, size=(images.shape[2], images.shape[3]), scoring=scoring)


def _weights(comparisons: Sequence[Comparison]) -> Tensor | None:
    weights = [comparison.weights for comparison in comparisons if comparison.weights is not None]
    return torch.stack(weights, dim=1) if weights else None


def leave_one_out(
    method: Method,
    encoded: Sequence[Tensor],
    support: Mapping[str, Tensor],
    *,
    size: tuple[int, int],
    scoring: Scoring,
    patients: Sequence[int] | None = None,
) -> Scored:
    """Maps, scores and weights of the K supports, each judged against those of other patients.

    Args:
        method: In eval mode.
        encoded: `method.encode` of the supports, each (K, C, h, w), K >= 2.
        support: `method.embed_support` of the supports.
        size: (H, W) of the maps.
        scoring: Blur and pooling.
        patients: K numbers, at least two different ones, equal for images of one patient; without, all differ.

    Returns:
        (K, H, W), (K,) and (K, levels, K), float32; what an image was not compared with has weight 0.
    """
    numbers = torch.as_tensor(range(len(encoded[0])) if patients is None else patients)
    judged, weights = [], []
    for k, number in enumerate(numbers):
        rest = torch.nonzero(numbers != number)[:, 0].to(encoded[0].device)
        others = {name: tensor[rest] for name, tensor in support.items()}
        found = compare_tensor(method, [level[k : k + 1] for level in encoded], others, size=size, scoring=scoring)
        judged.append(found)
        if found.weights is not None:
            whole = found.weights.new_zeros(1, found.weights.shape[1], len(numbers), dtype=torch.float32)
            weights.append(whole.index_copy(2, rest, found.weights.float()))
    maps, scores = torch.cat([each.maps for each in judged]), torch.cat([each.scores for each in judged])
    return Scored(maps, scores, torch.cat(weights) if weights else None)
