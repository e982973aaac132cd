"""What `anatomaly data check` found in a data set: the findings as records, and their text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from anatomaly.data.listing import LeftOut, describe
from anatomaly.types import Sample, Split

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
        similarity: Cosine of the two edge signatures, from `check.NEAR_SIMILARITY` to 1.
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
    """Findings of `check.check_manifest`.

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
        faint: A line for each task whose images show next to nothing after the intensity rule.
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
    faint: tuple[str, ...] = ()

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
        noted = Counter(each for _, note in self.notes for each in note.split("; "))
        lines = [f"{number} {what}" for what, number in findings.items() if number]
        lines += [f"{number} images: {note}" for note, number in sorted(noted.items())]
        return [*lines, *self.faint, *_gaps(self.counts)]


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
        [f"{n.similarity:.3f}  {row_name(n.first)} = {row_name(n.second)}" for n in report.near_duplicates],
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


def row_name(sample: Sample) -> str:
    """How a report names a row: task, split and file."""
    return f"{sample.task}/{sample.split}/{sample.name}"


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


def _varies(samples: Iterable[Sample], value: Callable[[Sample], object]) -> bool:
    """True where the value differs between two samples of one task."""
    per_task: dict[str, set[object]] = defaultdict(set)
    for sample in samples:
        per_task[sample.task].add(value(sample))
    return any(len(values) > 1 for values in per_task.values())


def _describe(group: DuplicateGroup) -> str:
    notes = ["two splits"] * group.crosses_splits + ["labels conflict"] * group.labels_conflict
    return " = ".join(row_name(sample) for sample in group.samples) + (f"  ({', '.join(notes)})" if notes else "")


def _listing(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    rest = len(entries) - _LISTED
    more = [f"  ... and {rest} more"] if rest > 0 else []
    return ["", f"{title} ({len(entries)})", *(f"  {entry}" for entry in entries[:_LISTED]), *more]
