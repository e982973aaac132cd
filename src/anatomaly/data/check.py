"""What is wrong with a data set before anything is trained on it: the report behind `anatomaly data check`."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.findings import CheckReport, Count, DuplicateGroup, NearDuplicate, PatientLeak, row_name
from anatomaly.data.loading import read_ahead
from anatomaly.data.manifest import Manifest
from anatomaly.data.readers import read_image, read_mask_of, sniff_format
from anatomaly.data.support_range import Glance, find_fault, glance
from anatomaly.data.transforms import load, needs_voi
from anatomaly.errors import ReadError
from anatomaly.types import Image, Intensity, Preprocessing, Sample, Split

#: Edge similarity from which two images count as near-duplicates.  On four real sets (head CT, chest X-ray, brain MRI,
#: fundus) images of different patients stayed below 0.82 and re-encoded, resized, dimmed copies above 0.93.
NEAR_SIMILARITY = 0.9

_GRID = 32  # cells per side of the thumbnail the edges are taken from
_LARGE = 1e15  # squares of larger pixels overflow float32
_CHUNK = 1024  # rows of the similarity matrix held at once
_AHEAD = 8  # images read ahead of the one being looked at


def check_manifest(
    manifest: Manifest,
    *,
    near: bool = True,
    intensity: Intensity | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read every image and mask once and look for what would spoil a training or an evaluation.

    Args:
        manifest: The data set.
        near: Also look for near-duplicates across the splits of a task; takes 8 kB per image.
        intensity: The rule that `predict` and `fit` will be given; "auto" by default, as there.
        on_progress: Called with (images done, images in all) after every image.

    Returns:
        The findings; see `findings.format_report` for text.
    """
    readable: list[Sample] = []
    unreadable: list[tuple[str, str]] = []
    not_mapped: list[tuple[str, str]] = []
    rule = intensity or Intensity()
    preprocessing = None if rule.rule == "percentile" else Preprocessing(intensity=rule)  # becomes a range that fits
    bad_masks: list[tuple[str, str]] = []
    altered: list[str] = []
    groups: dict[tuple[str, int | None], list[Sample]] = defaultdict(list)
    signatures: list[NDArray[np.float32]] = []
    seen: dict[str, list[tuple[Sample, Glance]]] = defaultdict(list)
    notes: list[tuple[str, str]] = []
    looks = read_ahead(manifest, partial(_look, near=near, preprocessing=preprocessing), rows=_AHEAD, size=lambda _: 0)
    for done, (sample, look) in enumerate(zip(manifest, looks, strict=True), start=1):
        if isinstance(look, str):
            unreadable.append((row_name(sample), look))
        else:
            readable.append(sample)
            not_mapped += [] if look.fault is None else [(row_name(sample), look.fault)]
            bad_masks += look.mask_faults
            groups[look.sha256, sample.frame].append(sample)
            if sample.sha256 not in (None, look.sha256):
                altered.append(row_name(sample))
            if look.note is not None:
                notes.append((row_name(sample), look.note))
            if look.glance is not None:
                seen[sample.task].append((sample, look.glance))
            if look.signature is not None:
                signatures.append(look.signature)
        if on_progress is not None:
            on_progress(done, len(manifest))
    duplicates = [DuplicateGroup(tuple(group)) for group in groups.values() if len(group) > 1]
    return CheckReport(
        counts=_counts(manifest),
        unreadable=tuple(unreadable),
        bad_masks=tuple(bad_masks),
        altered=tuple(altered),
        duplicates=tuple(duplicates),
        near_duplicates=tuple(_near_duplicates(readable, signatures, duplicates)) if near else (),
        patients_in_two_splits=tuple(_patient_leaks(manifest)),
        not_mapped=tuple(not_mapped),
        left_out=manifest.left_out,
        notes=tuple(notes),
        faint=tuple(_faint(seen, rule)),
    )


def edge_signature(image: Image) -> NDArray[np.float32]:
    """Describe the outlines of an image such that resized, re-encoded or dimmed copies get nearly the same description.

    The differences between neighbouring cells of a 32 x 32 thumbnail, clipped at their mean size so that one bright
    rim (skull, fundus disc, film border) does not outweigh everything inside it, scaled to length 1.  A 64-bit
    difference hash was tried first: on chest X-rays and fundus photographs it matches hundreds of unrelated patients.

    Args:
        image: Any size of at least 1 x 1, any intensity range; `invert` is respected.

    Returns:
        (2 * 32 * 31,) float32 of length 1, or all 0 for an image without any edge.
    """
    import PIL.Image

    peak = max(1.0, float(np.abs(image.pixels).max()))
    pixels = image.pixels if peak < _LARGE else image.pixels / np.float32(peak)  # edges have no unit
    gray = pixels.mean(axis=0)
    small = np.asarray(PIL.Image.fromarray(gray).resize((_GRID, _GRID), PIL.Image.Resampling.BOX))
    edges = np.concatenate([np.diff(small, axis=0).ravel(), np.diff(small, axis=1).ravel()])
    limit = np.abs(edges).mean()
    edges = np.clip(edges, -limit, limit)
    length = np.linalg.norm(edges)
    edges = edges / length if length > 0 else np.zeros_like(edges)
    return (-edges if image.invert else edges).astype(np.float32)


class _Look(NamedTuple):
    """What is kept of an image that was read."""

    sha256: str
    mask_faults: list[tuple[str, str]]
    note: str | None
    signature: NDArray[np.float32] | None
    fault: str | None  # why `fit` and `predict` could not prepare it
    glance: Glance | None


def _look(sample: Sample, *, near: bool, preprocessing: Preprocessing | None) -> _Look | str:
    """Read an image and its mask; the reason where the image cannot be read."""
    fault = seen = None
    try:
        image = None
        if preprocessing is not None:
            try:
                prepared = load(sample, preprocessing)  # so that what is refused later is told here
                image, seen = prepared.image, glance(prepared)
            except ReadError as err:
                fault = _reason(err, sample.path)
        image = image or read_image(sample.path, frame=sample.frame)
    except ReadError as err:
        return _reason(err, sample.path)
    faults, signature = list(_mask_faults(sample, image)), None
    if near:  # look-alikes are found in what the file holds, not in what its window leaves of it
        windowed = seen is not None and preprocessing is not None and needs_voi(preprocessing.intensity)
        windowed = windowed and sniff_format(sample.path) == "dicom"
        signature = edge_signature(read_image(sample.path, frame=sample.frame) if windowed else image)
    return _Look(image.sha256, faults, image.note, signature, fault, seen)


def _faint(seen: Mapping[str, Sequence[tuple[Sample, Glance]]], rule: Intensity) -> Iterator[str]:
    """For each task whose images show next to nothing: what is wrong, and the rule to give."""
    for task, looked in seen.items():
        if fault := find_fault([sample for sample, _ in looked], [each for _, each in looked], rule):
            yield f"{task}: {fault.line}"


def _mask_faults(sample: Sample, image: Image) -> Iterator[tuple[str, str]]:
    """Yield (row, reason) if the sample has a mask that cannot be used."""
    if sample.mask is None:
        return
    try:
        mask = read_mask_of(sample)
    except ReadError as err:
        yield row_name(sample), f"{sample.mask.name} {_reason(err, sample.mask)}"
        return
    if mask is not None and mask.shape != image.size:
        yield row_name(sample), f"{sample.mask.name} has {_pixels(mask.shape)} pixels, the image {_pixels(image.size)}"


def _reason(err: ReadError, path: Path) -> str:
    """The message without the path in front: the row already names the file."""
    return str(err).removeprefix(f"{path}: ")


def _pixels(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _counts(samples: Iterable[Sample]) -> tuple[Count, ...]:
    groups: dict[tuple[str, Split, int | None], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.task, sample.split, sample.label].append(sample)
    order = sorted(groups, key=lambda key: (key[0], _split_rank(key[1]), 2 if key[2] is None else key[2]))
    return tuple(
        Count(
            *key,
            images=len(groups[key]),
            with_mask=sum(sample.mask is not None for sample in groups[key]),
            with_patient=sum(sample.patient_id is not None for sample in groups[key]),
        )
        for key in order
    )


def _patient_leaks(samples: Iterable[Sample]) -> Iterator[PatientLeak]:
    rows: dict[tuple[str, str], Counter[Split]] = defaultdict(Counter)
    for sample in samples:
        if sample.patient_id is not None:
            rows[sample.task, sample.patient_id][sample.split] += 1
    for (task, patient_id), per_split in sorted(rows.items()):
        if len(per_split) > 1:
            key = hashlib.sha256(patient_id.encode(errors="surrogatepass")).hexdigest()[:8]
            yield PatientLeak(task, key, tuple(sorted(per_split.items(), key=lambda item: _split_rank(item[0]))))


def _near_duplicates(
    samples: Sequence[Sample], signatures: Sequence[NDArray[np.float32]], duplicates: Sequence[DuplicateGroup]
) -> list[NearDuplicate]:
    """Compare all pairs of one task and different splits; byte-for-byte duplicates are reported elsewhere."""
    group_of = {sample: number for number, group in enumerate(duplicates) for sample in group.samples}
    members: dict[str, dict[Split, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, sample in enumerate(samples):
        members[sample.task][sample.split].append(index)
    found = []
    for splits in members.values():
        for one, other in combinations(sorted(splits, key=_split_rank), 2):
            for i, j, similarity in _similar_pairs(splits[one], splits[other], signatures):
                first, second = samples[i], samples[j]
                if first not in group_of or group_of[first] != group_of.get(second):
                    found.append(NearDuplicate(first, second, similarity))
    return sorted(found, key=lambda pair: -pair.similarity)


def _similar_pairs(
    rows: Sequence[int], columns: Sequence[int], signatures: Sequence[NDArray[np.float32]]
) -> Iterator[tuple[int, int, float]]:
    right = np.stack([signatures[index] for index in columns]).T  # (D, columns)
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        similarity = np.stack([signatures[index] for index in part]) @ right  # (part, columns)
        for i, j in np.argwhere(similarity >= NEAR_SIMILARITY):
            yield part[i], columns[j], min(1.0, float(similarity[i, j]))


def _split_rank(split: Split) -> int:
    return ("train", "val", "test").index(split)
