"""The spine every number comes from: `predict_tensor` and its two halves, without state.

Training calls it to choose a checkpoint, benchmarks call it to measure, `Detector.predict` calls it to judge a scan:
one function, and one promise, at `predict_tensor`.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from anatomaly.scoring import anomaly_map, blur, image_score

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from anatomaly.types import Comparison, Method, Scoring

#: Of teacher and student; maps and scores are float32 in any case.
Precision = Literal["fp32", "bf16"]


#: Images a CPU computes at a time, at most.  PyTorch takes another convolution for one image and, in one thread, for 16
#: and more, whose last digits differ and are multiplied in what follows; from 2 to 15 it takes one and the same.
_PART = 8


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
        yield from torch.tensor_split(images, max(1, ceil(len(images) / _PART)))


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
        return Scored(maps, image_score(maps, scoring), _weights(comparisons))


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


def leave_one_out_maps(
    method: Method, encoded: Sequence[Tensor], support: Mapping[str, Tensor], *, size: tuple[int, int], scoring: Scoring
) -> Tensor:
    """Maps of the K supports, each judged against the other K - 1.

    Args:
        method: In eval mode.
        encoded: `method.encode` of the supports, each (K, C, h, w), K >= 2.
        support: `method.embed_support` of the supports.
        size: (H, W) of the maps.
        scoring: Blur and pooling.

    Returns:
        (K, H, W), float32.
    """
    maps = []
    for k in range(len(encoded[0])):
        others = {name: torch.cat([tensor[:k], tensor[k + 1 :]]) for name, tensor in support.items()}
        query = [level[k : k + 1] for level in encoded]
        maps.append(compare_tensor(method, query, others, size=size, scoring=scoring).maps)
    return torch.cat(maps)
