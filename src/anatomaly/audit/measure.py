"""What the same maps are worth under every protocol, and what a lucky draw, epoch or file order adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from anatomaly.audit.published import (
    ACROSS,
    FIRST,
    PROTOCOLS,
    SOUND,
    Floats,
    Judged,
    Protocol,
    RunScores,
    auroc_of,
    judge,
    other_file_names,
)
from anatomaly.errors import ManifestError
from anatomaly.evaluation.metrics import Interval, auroc, bootstrap, image_metrics, no_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anatomaly.types import Sample

_ORDERS = 200  # random file names for `FIRST`


@dataclass(frozen=True)
class Runs:
    """Scores of one task's test images for every support draw, and for every kept epoch where there are any.

    Attributes:
        source: The model or the files, as the user named it.
        method: Name of the method, or "files" for another tool's.
        task: The task.
        shots: K; 0 without support, None where it is not known.
        samples: The N scored rows, in file order.
        labels: (N,) 0 normal, 1 anomalous.
        unreadable: Rows without a score, and why.
        draws: Scores by draw, at the checkpoint that would be used.
        shuffled: AUROC of `audit.published.ACROSS` with a shuffled loader, one per random order; empty without maps.
        epochs: Scores by epoch and draw; empty where no checkpoints were kept.
        chosen: The epoch in `epochs` that was chosen without test labels, or None.
        given: (draws, N) scores of the tool itself, where maps were judged beside them.
        notes: What a reader must know of this audit, one sentence each.
    """

    source: str
    method: str
    task: str
    shots: int | None
    samples: tuple[Sample, ...]
    labels: NDArray[np.int64]
    unreadable: tuple[tuple[Sample, str], ...]
    draws: tuple[RunScores, ...]
    shuffled: tuple[float, ...] = ()
    epochs: Mapping[int, tuple[RunScores, ...]] = field(default_factory=dict)
    chosen: int | None = None
    given: Floats | None = None
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Number of test images, those without a score included."""
        return len(self.labels) + len(self.unreadable)


@dataclass(frozen=True)
class ProtocolResult:
    """One protocol's figures; NaN where what it scores is of one class only.

    Attributes:
        protocol: One of `audit.published.PROTOCOLS`, or "as given" for the scores of the tool itself.
        scored: Images that have a score under it.
        total: Images there are, those without a score included.
        relabelled: Scored normal images that count as anomalous.
        draws: Image AUROC by draw.
        interval: Mean over the draws and its 95 % bootstrap interval over test images (patients where known).
        ap: Average precision, mean over the draws.
        f1max: Best F1 over all thresholds, chosen on these labels; mean over the draws.
        unreadable: Images without a score, as they could not be read or the tool gave none.
        undefined: Why figures cannot be had, by name: "auroc", "ap", "f1max", "interval".
    """

    protocol: str
    scored: int
    total: int
    relabelled: int
    draws: tuple[float, ...]
    interval: Interval
    ap: float
    f1max: float
    unreadable: int = 0
    undefined: Mapping[str, str] = field(default_factory=dict)

    @property
    def auroc(self) -> float:
        """Mean over the draws."""
        return self.interval.value

    @property
    def luck(self) -> float:
        """What the best draw has above the mean of all."""
        return max(self.draws) - self.auroc


@dataclass(frozen=True)
class EpochChoice:
    """Image AUROC on the test images of every kept epoch under one protocol, mean over the draws.

    Attributes:
        protocol: The protocol.
        aurocs: By epoch.
        chosen: The epoch chosen without test labels, or None.
    """

    protocol: Protocol
    aurocs: Mapping[int, float]
    chosen: int | None

    @property
    def last(self) -> int:
        """The last kept epoch."""
        return max(self.aurocs)

    @property
    def best(self) -> int:
        """The epoch with the highest AUROC on the test labels, the first of equals: the releases' rule."""
        return max(sorted(self.aurocs), key=lambda epoch: self.aurocs[epoch])

    @property
    def adds(self) -> float:
        """What choosing by test labels has above the epoch chosen without them (the last one where none was)."""
        return self.aurocs[self.best] - self.aurocs[self.last if self.chosen is None else self.chosen]


@dataclass(frozen=True)
class AsReleased:
    """All of a release's habits at once: its protocol, the best epoch by test labels, a single support draw.

    Attributes:
        protocol: The release's protocol.
        first: Image AUROC of the first draw at its best epoch.
        luckiest: Of the best draw at its best epoch.
        epoch: Best epoch of the first draw, or None where no checkpoints were kept.
    """

    protocol: Protocol
    first: float
    luckiest: float
    epoch: int | None


@dataclass(frozen=True)
class Audit:
    """Everything `anatomaly audit` says.

    Attributes:
        runs: What was audited.
        results: One per protocol that could be computed, the sound one first.
        file_names: AUROC of `audit.published.FIRST` on the first draw under other file names, NaN where undefined.
        epochs: One per protocol; empty where no checkpoints were kept.
        as_released: One per published protocol that could be computed.
    """

    runs: Runs
    results: tuple[ProtocolResult, ...]
    file_names: tuple[float, ...]
    epochs: tuple[EpochChoice, ...]
    as_released: tuple[AsReleased, ...]

    @property
    def release(self) -> Protocol:
        """The published protocol of methods like the audited one: `ACROSS` with supports, if there are maps for it."""
        few_shot = self.runs.shots != 0 and any(result.protocol == ACROSS for result in self.results)
        return ACROSS if few_shot else FIRST

    def result(self, protocol: str) -> ProtocolResult:
        """The figures of one protocol."""
        return next(result for result in self.results if result.protocol == protocol)

    def file_name_range(self) -> tuple[float, float, float, float]:
        """Mean, standard deviation, lowest and highest of `file_names` where defined; NaN where none is."""
        values = np.array([value for value in self.file_names if np.isfinite(value)])
        if len(values) < 2:
            return (float("nan"),) * 4
        return float(values.mean()), float(values.std(ddof=1)), float(values.min()), float(values.max())


def require_labels(labels: Sequence[int | None], task: str) -> None:
    """Refuse test images that cannot be judged.

    Raises:
        ManifestError: A label is missing, or a class.
    """
    normal, anomalous = (sum(label == value for label in labels) for value in (0, 1))
    if not normal or not anomalous or normal + anomalous < len(labels):
        raise ManifestError(
            f"audit: task {task!r} has {normal} normal, {anomalous} anomalous and {len(labels) - normal - anomalous} "
            "unlabelled test images with a score, expected both classes and no unlabelled ones. Complete the data."
        )


def measure(runs: Runs, *, seed: int = 0) -> Audit:
    """Judge the same scores under every protocol.

    Args:
        runs: The scores, images in file order.
        seed: Of the random file names.
    """
    results = [_result(protocol, runs, judged) for protocol in PROTOCOLS if (judged := _judged(protocol, runs))]
    if runs.given is not None:
        places = np.arange(len(runs.labels))
        judged = [Judged(row, runs.labels, places, len(places)) for row in runs.given]
        results.insert(1, _result("as given", runs, judged))
    names = other_file_names(runs.draws[0].released, runs.labels, orders=_ORDERS, seed=seed)
    published = [protocol for protocol in PROTOCOLS[1:] if any(result.protocol == protocol for result in results)]
    return Audit(
        runs=runs,
        results=tuple(results),
        file_names=tuple(names.tolist()),
        epochs=tuple(_epochs(protocol, runs) for protocol in (SOUND, *published) if runs.epochs),
        as_released=tuple(_as_released(protocol, runs) for protocol in published),
    )


def _judged(protocol: Protocol, runs: Runs) -> list[Judged]:
    """One per draw; none where the protocol cannot be computed or scores nothing."""
    found = [judge(protocol, scores, runs.labels) for scores in runs.draws]
    return [judged for judged in found if judged is not None and len(judged.scores)]


def _result(protocol: str, runs: Runs, judged: Sequence[Judged]) -> ProtocolResult:
    first = judged[0]
    scores = np.stack([one.scores for one in judged])
    patients = [runs.samples[place].patient_id for place in first.positions]
    known = [patient for patient in patients if patient is not None]
    groups = known if len(known) == len(patients) else None
    nan = float("nan")
    interval, ap, f1max = Interval(nan, nan, nan), nan, nan
    if len(np.unique(first.labels)) < 2:
        kind = "anomalous" if first.labels.all() else "normal"
        scored = f"all {len(first.labels)} images scored are" if len(first.labels) > 1 else "the one image scored is"
        reason = f"it needs both classes, {scored} {kind}"
        undefined = dict.fromkeys(("auroc", "ap", "f1max", "interval"), reason)
    else:
        lacking = no_interval(first.labels, groups)
        undefined = {} if lacking is None else {"interval": lacking}
        interval = bootstrap(auroc, scores, first.labels, groups=groups)
        figures = [image_metrics(row, first.labels) for row in scores]
        ap, f1max = (float(np.mean([figure[name] for figure in figures])) for name in ("ap", "f1max"))
    return ProtocolResult(
        protocol=protocol,
        scored=len(first.scores),
        total=first.total + len(runs.unreadable),
        relabelled=int((first.labels != runs.labels[first.positions]).sum()),
        draws=tuple(auroc_of(one) for one in judged),
        interval=interval,
        ap=ap,
        f1max=f1max,
        unreadable=len(runs.unreadable),
        undefined=undefined,
    )


def _auroc(protocol: Protocol, scores: RunScores, labels: NDArray[np.int64]) -> float:
    judged = judge(protocol, scores, labels)
    return float("nan") if judged is None else auroc_of(judged)


def _epochs(protocol: Protocol, runs: Runs) -> EpochChoice:
    aurocs = {
        epoch: float(np.mean([_auroc(protocol, scores, runs.labels) for scores in draws]))
        for epoch, draws in sorted(runs.epochs.items())
    }
    return EpochChoice(protocol, aurocs, runs.chosen)


def _as_released(protocol: Protocol, runs: Runs) -> AsReleased:
    epochs = sorted(runs.epochs)
    by_epoch = [runs.epochs[epoch] for epoch in epochs] or [runs.draws]
    found = np.array([[_auroc(protocol, scores, runs.labels) for scores in draws] for draws in by_epoch])
    best = found.max(axis=0)  # (draws,), every draw at its own best epoch
    epoch = epochs[int(found[:, 0].argmax())] if epochs else None
    return AsReleased(protocol, float(best[0]), float(best.max()), epoch)
