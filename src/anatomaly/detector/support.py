"""The images of a support: which are refused, how they become the network's input, and what they say of each other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from anatomaly.data.layouts import rows_of
from anatomaly.data.patients import patient_groups
from anatomaly.data.support_range import glance, tell_supports
from anatomaly.data.transforms import load
from anatomaly.detector.places import judge_supports
from anatomaly.errors import ConfigError
from anatomaly.scoring import leave_one_out, scale_from_normals
from anatomaly.types import SupportBank

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from anatomaly.detector.detector import Detector
    from anatomaly.detector.places import Place
    from anatomaly.types import Intensity, Method, Origin, Preprocessing, Sample, Scoring


#: Supports that are slices may be hundreds, each of which would be compared with all others.
_MOST_SLICES = 128


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
    places: Sequence[Place] = (),
    near: float | None = None,
) -> Yardstick:
    """Judge each support by those of other patients; of other volumes, where they are slices.

    Args:
        method: As in `scoring.leave_one_out`.
        encoded: Likewise, K >= 1.
        tensors: Likewise.
        size: Likewise.
        scoring: Likewise.
        patients: From `groups_of`.
        places: As in `SupportBank`; of more than 128 slices only so many, evenly spread, are judged, for the scale.
        near: As in `SupportBank`.
    """
    guess = Yardstick((0.0, 0.5 * len(encoded)))  # nothing is left to compare with
    if len(patients) == 1:
        return guess
    if not places:
        found = leave_one_out(method, encoded, tensors, size=size, scoring=scoring, patients=patients)
        shares = [] if found.weights is None else (found.weights.mean(dim=(0, 1))).tolist()
        return Yardstick(
            scale_from_normals(list(found.maps.cpu().numpy())), tuple(found.scores.tolist()), tuple(shares)
        )
    judged = range(0, len(places), -(-len(places) // _MOST_SLICES))
    maps, scores = judge_supports(
        *(method, encoded, tensors),
        places=places,
        volumes=patients,
        near=near,
        judged=judged,
        size=size,
        scoring=scoring,
    )
    if not bool(torch.isfinite(scores).all()):
        return guess
    return Yardstick(
        scale_from_normals(list(maps.numpy())), tuple(scores.tolist()) if len(judged) == len(places) else ()
    )


def groups_of(samples: Sequence[Sample]) -> tuple[int, ...]:
    """`patient_groups`; slices of one volume are of one patient in any case."""
    volumes = [None if each.cut is None else each.cut.series or each.path for each in samples]
    if None in volumes:
        return patient_groups(samples)
    firsts = [samples[volumes.index(volume)] for volume in dict.fromkeys(volumes)]
    number = dict(zip(dict.fromkeys(volumes), patient_groups(firsts), strict=True))
    return tuple(number[volume] for volume in volumes)


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
        digests.append(sample.key(prepared.image.sha256))
        glances.append(glance(prepared))
        origins += [prepared.image.origin] if prepared.image.origin is not None else []
    if len(set(digests)) < len(digests):
        twice = next(s.name for s, d in zip(samples, digests, strict=True) if digests.count(d) > 1)
        raise ConfigError(f"support: {twice} is given twice, expected K different images. Remove the copies.")
    tell_supports(samples, glances, preprocessing.intensity)
    return ReadSupport(torch.stack(inputs), tuple(digests), tuple(origins))


def bank_without_images(detector: Detector, task: str, intensity: Intensity | None) -> SupportBank:
    """The bank of a method that compares with no images: the task's rule and colour scale.

    Raises:
        ConfigError: The method needs support images, or the task has no range of values.
    """
    if detector.method.needs_support:
        raise ConfigError(
            f"support: {detector.facts.name} needs normal images to compare with. Give --support or --bank."
        )
    ranges = detector.facts.map_ranges
    task = next(iter(ranges)) if task == "task" and len(ranges) == 1 else task  # unnamed: the one it was trained on
    rule = intensity or detector.task_intensity.get(task, detector.preprocessing.intensity)
    if rule.rule == "percentile":
        known = ", ".join(detector.task_intensity) or "none"
        raise ConfigError(f"task {task!r} has no range: take another --task ({known}) or --intensity range:0..255.")
    low, high = ranges.get(task, (0.0, 2.0))
    return SupportBank(
        tensors={},
        task=task,
        names=(),
        sha256=(),
        preprocessing=replace(detector.preprocessing, intensity=rule),
        model_hash=detector.model_hash,
        map_range=(float(low), float(high)),
        precision=detector.precision,
    )
