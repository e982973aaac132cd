"""What is wrong with a data set before anything is trained on it: the report behind `anatomaly data check`."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.listing import LeftOut, describe
from anatomaly.data.loading import read_ahead
from anatomaly.data.manifest import Manifest
from anatomaly.data.readers import read_image, read_mask_of, sniff_format
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
_LISTED = 10  # findings of one kind the text report prints
_LABEL_WORDS = {0: "normal", 1: "anomalous", None: "unknown"}


@dataclass(frozen=True, slots=True)
class Count:
    """How many rows one task, split and label has.

    Attributes:
        task: Name of the task.
        split: "train", "val" or "test".
        label: 0 normal, 1 anomalous, None unknown.
        images: Rows.
        with_mask: Rows that name a lesion mask.
        with_patient: Rows that name a patient.
    """

    task: str
    split: Split
    label: int | None
    images: int
    with_mask: int
    with_patient: int


@dataclass(frozen=True, slots=True)
class DuplicateGroup:
    """Rows whose files are equal byte for byte (and whose frame is the same)."""

    samples: tuple[Sample, ...]

    @property
    def crosses_splits(self) -> bool:
        """True where one task has the image in two splits."""
        return _varies(self.samples, lambda sample: sample.split)

    @property
    def labels_conflict(self) -> bool:
        """True where one task calls the image both normal and anomalous."""
        return _varies((s for s in self.samples if s.label is not None), lambda sample: sample.label)


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two images of one task, in different splits, that look the same.

    Attributes:
        first: Row of the earlier split (train before val before test).
        second: Row of the later split.
        similarity: Cosine of the two edge signatures, from `NEAR_SIMILARITY` to 1.
    """

    first: Sample
    second: Sample
    similarity: float


@dataclass(frozen=True, slots=True)
class PatientLeak:
    """A patient of one task whose images lie in several splits.

    Attributes:
        task: Name of the task.
        key: First 8 hex digits of the sha256 of patient_id; the id itself is never reported.
        rows: (split, number of rows) pairs.
    """

    task: str
    key: str
    rows: tuple[tuple[Split, int], ...]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Findings of `check_manifest`.

    Attributes:
        counts: Rows per task, split and label, sorted.
        unreadable: (row, reason) of every file that cannot be read as an image.
        not_mapped: (row, reason) of every image that the intensity rule cannot map to [0, 1]: `predict` refuses it too.
        bad_masks: (row, reason) of every mask that cannot be read or has another size than its image.
        altered: Rows whose file no longer has the sha256 the manifest gives.
        duplicates: Groups of equal files.
        near_duplicates: Look-alikes across splits, most similar first.
        patients_in_two_splits: Patients whose images lie in several splits.
        left_out: Files and folders that became no row, by reason.
        notes: (row, note) of every image whose pixels need a word, such as an unusable window.
    """

    counts: tuple[Count, ...]
    unreadable: tuple[tuple[str, str], ...] = ()
    bad_masks: tuple[tuple[str, str], ...] = ()
    altered: tuple[str, ...] = ()
    duplicates: tuple[DuplicateGroup, ...] = ()
    near_duplicates: tuple[NearDuplicate, ...] = ()
    patients_in_two_splits: tuple[PatientLeak, ...] = ()
    not_mapped: tuple[tuple[str, str], ...] = ()
    left_out: LeftOut = field(default_factory=dict)
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def ok(self) -> bool:
        """True without errors; warnings do not count."""
        return not self.errors

    @property
    def errors(self) -> list[str]:
        """Findings that make results wrong, one line each."""
        findings = {
            "patients have images in two splits": len(self.patients_in_two_splits),
            "images appear in two splits of one task": sum(group.crosses_splits for group in self.duplicates),
            "images are listed both as normal and as anomalous": sum(g.labels_conflict for g in self.duplicates),
            "files are not the ones the manifest was written for (sha256 differs)": len(self.altered),
        }
        lines = [f"{number} {what}" for what, number in findings.items() if number]
        if self.unreadable and len(self.unreadable) == sum(count.images for count in self.counts):
            lines.append("no file is readable")
        return lines

    @property
    def warnings(self) -> list[str]:
        """Findings a person should look at, one line each."""
        harmless = [g for g in self.duplicates if not g.crosses_splits and not g.labels_conflict]
        findings = {
            "files are unreadable": len(self.unreadable),
            "images are refused by the intensity rule, by fit and predict too (see --intensity)": len(self.not_mapped),
            "masks are unreadable or do not fit their image": len(self.bad_masks),
            "images are repeated within a split or across tasks": len(harmless),
            "pairs of images look the same across splits": len(self.near_duplicates),
        }
        noted = Counter(note for _, note in self.notes)
        lines = [f"{number} {what}" for what, number in findings.items() if number]
        return lines + [f"{number} images: {note}" for note, number in sorted(noted.items())] + _gaps(self.counts)


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
        The findings; see `format_report` for text.
    """
    readable: list[Sample] = []
    unreadable: list[tuple[str, str]] = []
    not_mapped: list[tuple[str, str]] = []
    if intensity is not None and intensity.rule == "percentile":  # becomes a range, which no image is refused by
        intensity = Intensity("range")
    preprocessing = Preprocessing(intensity=intensity or Intensity())
    bad_masks: list[tuple[str, str]] = []
    altered: list[str] = []
    groups: dict[tuple[str, int | None], list[Sample]] = defaultdict(list)
    signatures: list[NDArray[np.float32]] = []
    notes: list[tuple[str, str]] = []
    looks = read_ahead(manifest, partial(_look, near=near, preprocessing=preprocessing), rows=_AHEAD, size=lambda _: 0)
    for done, (sample, look) in enumerate(zip(manifest, looks, strict=True), start=1):
        if isinstance(look, str):
            unreadable.append((_row(sample), look))
        else:
            readable.append(sample)
            not_mapped += [] if look.fault is None else [(_row(sample), look.fault)]
            bad_masks += look.mask_faults
            groups[look.sha256, sample.frame].append(sample)
            if sample.sha256 not in (None, look.sha256):
                altered.append(_row(sample))
            if look.note is not None:
                notes.append((_row(sample), look.note))
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


def format_report(report: CheckReport) -> str:
    """Lay out a report as plain text for a terminal; long lists are cut after ten entries."""
    table = [("task", "split", "label", "images", "masks", "patients given")]
    table += [
        (c.task, c.split, _LABEL_WORDS[c.label], str(c.images), str(c.with_mask), str(c.with_patient))
        for c in report.counts
    ]
    widths = [max(len(row[column]) for row in table) for column in range(6)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    lines += _listing("Unreadable files", [f"{row}: {reason}" for row, reason in report.unreadable])
    lines += _listing("Refused by the intensity rule", [f"{row}: {reason}" for row, reason in report.not_mapped])
    lines += _listing("Masks", [f"{row}: {reason}" for row, reason in report.bad_masks])
    lines += _listing("Files that changed since the manifest was written", report.altered)
    lines += _listing("Duplicates", [_describe(group) for group in report.duplicates])
    lines += _listing(
        "Look-alikes across splits",
        [f"{n.similarity:.3f}  {_row(n.first)} = {_row(n.second)}" for n in report.near_duplicates],
    )
    lines += _listing(
        "Patients in two splits",
        [
            f"{leak.task}: patient #{leak.key}: " + ", ".join(f"{rows} in {split}" for split, rows in leak.rows)
            for leak in report.patients_in_two_splits
        ],
    )
    lines += ["", *filter(None, [describe(report.left_out)])]
    lines += [*(f"error: {line}" for line in report.errors), *(f"warning: {line}" for line in report.warnings)]
    return "\n".join([*lines, "ok" if report.ok else "not ok"])


class _Look(NamedTuple):
    """What is kept of an image that was read."""

    sha256: str
    mask_faults: list[tuple[str, str]]
    note: str | None
    signature: NDArray[np.float32] | None
    fault: str | None  # why `fit` and `predict` could not prepare it


def _look(sample: Sample, *, near: bool, preprocessing: Preprocessing) -> _Look | str:
    """Read an image and its mask; the reason where the image cannot be read."""
    fault = None
    try:
        try:
            image = load(sample, preprocessing).image  # so that what is refused later is told here
        except ReadError as err:
            fault = _reason(err, sample.path)
            image = read_image(sample.path, frame=sample.frame)
    except ReadError as err:
        return _reason(err, sample.path)
    faults, signature = list(_mask_faults(sample, image)), None
    if near:  # look-alikes are found in what the file holds, not in what its window leaves of it
        windowed = fault is None and needs_voi(preprocessing.intensity) and sniff_format(sample.path) == "dicom"
        signature = edge_signature(read_image(sample.path, frame=sample.frame) if windowed else image)
    return _Look(image.sha256, faults, image.note, signature, fault)


def _mask_faults(sample: Sample, image: Image) -> Iterator[tuple[str, str]]:
    """Yield (row, reason) if the sample has a mask that cannot be used."""
    if sample.mask is None:
        return
    try:
        mask = read_mask_of(sample)
    except ReadError as err:
        yield _row(sample), f"{sample.mask.name} {_reason(err, sample.mask)}"
        return
    if mask is not None and mask.shape != image.size:
        yield _row(sample), f"{sample.mask.name} has {_pixels(mask.shape)} pixels, the image {_pixels(image.size)}"


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


def _gaps(counts: Sequence[Count]) -> list[str]:
    """Warnings about what the table does not say."""
    lines = []
    for task in dict.fromkeys(count.task for count in counts):
        own = [count for count in counts if count.task == task]
        nameless = sum(count.images - count.with_patient for count in own)
        if nameless and len({count.split for count in own}) > 1:
            lines.append(f"{task}: {nameless} images name no patient, so leakage between splits cannot be ruled out")
        unlabelled = sum(count.images for count in own if count.split == "train" and count.label is None)
        if unlabelled:
            lines.append(f"{task}: {unlabelled} training images have no label; training takes them as normal")
        lesions = [count for count in own if count.label == 1]
        masked, total = sum(count.with_mask for count in lesions), sum(count.images for count in lesions)
        if 0 < masked < total:
            lines.append(f"{task}: only {masked} of {total} anomalous images have a mask")
    return lines


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


def _varies(samples: Iterable[Sample], value: Callable[[Sample], object]) -> bool:
    """True where the value differs between two samples of one task."""
    per_task: dict[str, set[object]] = defaultdict(set)
    for sample in samples:
        per_task[sample.task].add(value(sample))
    return any(len(values) > 1 for values in per_task.values())


def _describe(group: DuplicateGroup) -> str:
    notes = ["two splits"] * group.crosses_splits + ["labels conflict"] * group.labels_conflict
    return " = ".join(_row(sample) for sample in group.samples) + (f"  ({', '.join(notes)})" if notes else "")


def _row(sample: Sample) -> str:
    return f"{sample.task}/{sample.split}/{sample.name}"


def _listing(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    rest = len(entries) - _LISTED
    more = [f"  ... and {rest} more"] if rest > 0 else []
    return ["", f"{title} ({len(entries)})", *(f"  {entry}" for entry in entries[:_LISTED]), *more]


def _split_rank(split: Split) -> int:
    return ("train", "val", "test").index(split)
