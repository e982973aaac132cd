"""The images of a support: which are refused, how they become the network's input, and what they say of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from anatomaly.data.layouts import rows_of
from anatomaly.data.support_range import glance, tell_supports
from anatomaly.data.transforms import load
from anatomaly.errors import ConfigError
from anatomaly.scoring import leave_one_out, scale_from_normals

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from anatomaly.types import Method, Origin, Preprocessing, Sample, Scoring


def support_samples(images: Iterable[str | Path | Sample], task: str) -> list[Sample]:
    """Rows of the images given as support.

    Args:
        images: Files or manifest rows.
        task: Name of the task of images given as files.

    Raises:
        ConfigError: There is none, or one is labelled anomalous.
    """
    samples = list(rows_of(images, task=task))
    if not samples:
        raise ConfigError("support: got no images, expected at least 1 normal image. Check the support folder.")
    if anomalous := [sample.name for sample in samples if sample.label == 1]:
        raise ConfigError(f"support: {anomalous[0]} is labelled anomalous, expected normal images only. Leave it out.")
    return samples


class ReadSupport(NamedTuple):
    """The images of a support.

    Attributes:
        inputs: (K, 3, H, W) float32 in [0, 1].
        sha256: K entries `digest#frame`, as `SupportBank.sha256` has them.
        origins: Where each comes from.
    """

    inputs: Tensor
    sha256: tuple[str, ...]
    origins: tuple[Origin, ...]


class Yardstick(NamedTuple):
    """What supports say of each other.

    Attributes:
        map_range: As in `SupportBank`; likewise the others.
        normal_scores: Of each.
        attention_shares: Of each.
    """

    map_range: tuple[float, float]
    normal_scores: tuple[float, ...] = ()
    attention_shares: tuple[float, ...] = ()


def judge_each_other(
    method: Method,
    encoded: Sequence[Tensor],
    tensors: Mapping[str, Tensor],
    *,
    size: tuple[int, int],
    scoring: Scoring,
    patients: Sequence[int],
) -> Yardstick:
    """Judge each support by those of other patients; arguments as in `scoring.leave_one_out`, K may be 1."""
    if len(patients) == 1:
        return Yardstick((0.0, 0.5 * len(encoded)))  # a fixed guess: nothing is left to compare with
    found = leave_one_out(method, encoded, tensors, size=size, scoring=scoring, patients=patients)
    shares = [] if found.weights is None else (found.weights.mean(dim=(0, 1))).tolist()
    return Yardstick(scale_from_normals(list(found.maps.cpu().numpy())), tuple(found.scores.tolist()), tuple(shares))


def read_support(samples: Sequence[Sample], preprocessing: Preprocessing) -> ReadSupport:
    """Read the images of a support; one line says so where they show next to nothing after their intensity rule.

    Args:
        samples: K rows.
        preprocessing: With a fixed intensity rule.

    Raises:
        ReadError: An image cannot be read.
        ConfigError: The same image is given twice, or all are blank.
    """
    inputs, digests, glances, origins = [], [], [], []
    for sample in samples:
        prepared = load(sample, preprocessing)
        inputs.append(torch.from_numpy(prepared.input))
        digests.append(f"{prepared.image.sha256}#{sample.frame or 0}")
        glances.append(glance(prepared))
        origins += [prepared.image.origin] if prepared.image.origin is not None else []
    if len(set(digests)) < len(digests):
        twice = next(s.name for s, d in zip(samples, digests, strict=True) if digests.count(d) > 1)
        raise ConfigError(f"support: {twice} is given twice, expected K different images. Remove the copies.")
    tell_supports(samples, glances, preprocessing.intensity)
    return ReadSupport(torch.stack(inputs), tuple(digests), tuple(origins))
