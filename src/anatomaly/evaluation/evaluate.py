"""Judge a detector on a task: several support draws, every test image, intervals."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from anatomaly.data.loading import load_batches
from anatomaly.data.readers import read_mask_of
from anatomaly.data.transforms import mask_to_input
from anatomaly.errors import AnatomalyError, ConfigError, ManifestError
from anatomaly.evaluation.evaluation import Evaluation
from anatomaly.evaluation.metrics import auroc, bootstrap, image_metrics, no_interval, pool_by_patient
from anatomaly.evaluation.pixel_metrics import PIXEL_METRICS, PixelCounts, region_shares
from anatomaly.evaluation.protocols import draw_supports, forbid_leak, samples_to_test
from anatomaly.types import Intensity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from anatomaly.data.loading import Loaded
    from anatomaly.data.manifest import Manifest
    from anatomaly.types import Preprocessing, Sample

#: Rows that are gone through together when banks prepare images differently, so that each mask is read once.
_BLOCK = 256


class Bank(Protocol):
    """What a `Judge` knows of a task; anything else about it is the judge's own business."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How the images that are compared with it are prepared."""
        ...


class _Supported(Protocol):
    @property
    def needs_support(self) -> bool: ...


class _Verdict(Protocol):
    @property
    def maps(self) -> Tensor: ...
    @property
    def scores(self) -> Tensor: ...


AnyBank = TypeVar("AnyBank", bound=Bank)


class Judge(Protocol[AnyBank]):
    """What `evaluate` needs of a detector: `detector.detector.Detector`, or anything else that has these members."""

    @property
    def method(self) -> _Supported:
        """Something whose `needs_support` says whether banks are made of normal images of the task."""
        ...

    def empty_bank(self, task: str, /) -> AnyBank:
        """The bank of a task, for a method without support."""
        ...

    def make_bank(self, images: Sequence[Sample], /, *, task: str) -> AnyBank:
        """The bank of K normal images of a task."""
        ...

    def encode(self, inputs: Sequence[NDArray[np.float32]], /) -> Any:
        """Whatever `compare` needs to know of B images, each (3, H, W) and prepared as their bank says."""
        ...

    def compare(self, encoded: Any, bank: AnyBank, /) -> _Verdict:
        """A record whose `maps` are (B, H, W) float32 and whose `scores` are (B,), higher = more anomalous, finite."""
        ...


class _Scores(NamedTuple):
    """What one pass over the test rows collects for every bank."""

    samples: tuple[Sample, ...]
    unreadable: tuple[tuple[Sample, str], ...]
    unusable_masks: tuple[tuple[Sample, str], ...]
    scores: NDArray[np.float64]  # (banks, N)
    pixels: list[PixelCounts]  # by bank


class _Lesions(NamedTuple):
    """A lesion mask at the network's input size; None where it is unknown, with the reason where there is a file."""

    mask: NDArray[np.bool_] | None
    shares: NDArray[np.float64] | None = None  # `region_shares`
    problem: str | None = None


def evaluate(
    detector: Judge[AnyBank],
    manifest: Manifest,
    *,
    task: str,
    shots: Sequence[int] = (2, 4, 8),
    draws: int = 5,
    seed: int = 0,
    supports: Sequence[Sequence[Sample]] | None = None,
    batch_size: int = 16,
    on_progress: Callable[[Sample], None] = lambda sample: None,
) -> list[Evaluation]:
    """Score a task's whole test split against several draws of its normal training images.

    Each test image is encoded once and compared with all banks.  Pixel metrics are taken at the network's input size;
    maps are counted and forgotten, so that memory does not depend on the number of test images.

    A mask that cannot be read or does not fit its image never ends the run: its row counts for the image metrics and is
    listed in `Evaluation.unusable_masks`.  If no mask can be used there are no pixel metrics.  Figures that need both
    classes of patients or pixels and an interval that needs more of them are left out too; `Evaluation.undefined` says
    why.

    Args:
        detector: The trained model, or any other `Judge`; it must not have seen the task if the result is to be called
            few-shot.
        manifest: Rows of the task: split "train" (normal) to draw supports from, split "test" with both labels.
        task: The task.
        shots: Values of K; a draw with fewer shots is the beginning of the draw with more.  A method without support
            is judged once, whatever shots and draws are.
        draws: Support draws per K.
        seed: Of the draws.
        supports: Support images of every draw, instead of `draws` random ones; K shots take the first K of each.
        batch_size: Images per forward pass; changes no score.
        on_progress: Called with every test row that is done.

    Returns:
        One evaluation per K.

    Raises:
        ConfigError: Too few normal training images or given supports, no test rows, no shots, or supports that leak
            into the test split.
        ManifestError: The readable test rows lack a label or a class.
        ReadError: A support image cannot be read.
    """
    if not shots:
        raise ConfigError("evaluate: shots is empty, expected at least one number of support images.")
    tests = samples_to_test(manifest, task)
    _require_labels(tests, task)
    banks: list[AnyBank] = []
    drawn: list[tuple[Sample, ...]] = []
    if not detector.method.needs_support:
        shots, drawn = (0,), [()]
        banks = [detector.empty_bank(task)]
    for k in shots if detector.method.needs_support else ():
        given = None if supports is None else _first(k, supports)
        for chosen in given or draw_supports(manifest, task=task, shots=k, draws=draws, seed=seed):
            forbid_leak(chosen, tests)
            drawn.append(chosen)
            banks.append(detector.make_bank(chosen, task=task))
    collected = _score(detector, tests, banks, batch_size, on_progress)
    _require_labels(collected.samples, task, "readable ")
    each = len(banks) // len(shots)
    return [_evaluation(task, k, collected, drawn, range(i * each, (i + 1) * each)) for i, k in enumerate(shots)]


def _first(shots: int, supports: Sequence[Sequence[Sample]]) -> list[tuple[Sample, ...]]:
    shortest = min(map(len, supports), default=0)
    if not 1 <= shots <= shortest:
        raise ConfigError(
            f"evaluate: {shots} shots asked, the shortest of {len(supports)} given supports has {shortest} images,"
            " expected from 1 shot to that many. Change shots or give more support images."
        )
    return [tuple(draw[:shots]) for draw in supports]


def _require_labels(tests: Sequence[Sample], task: str, which: str = "") -> None:
    normal, anomalous = (sum(row.label == label for row in tests) for label in (0, 1))
    if not normal or not anomalous or normal + anomalous < len(tests):
        raise ManifestError(
            f"evaluate: task {task!r} has {normal} normal, {anomalous} anomalous and {len(tests) - normal - anomalous} "
            f"unlabelled {which}test images, expected both classes and no unlabelled ones. "
            "Complete the data; `anatomaly data check` lists what is wrong with it."
        )


def _score(
    detector: Judge[AnyBank],
    tests: Sequence[Sample],
    banks: Sequence[AnyBank],
    batch_size: int,
    on_progress: Callable[[Sample], None],
) -> _Scores:
    """One pass per distinct preprocessing (one, unless a percentile rule depends on the supports)."""
    members: dict[Preprocessing, list[int]] = defaultdict(list)
    for index, bank in enumerate(banks):
        members[bank.preprocessing].append(index)
    masked = any(row.mask is not None for row in tests)  # otherwise there is nothing to measure maps with
    lesions_of = lru_cache(maxsize=_BLOCK + batch_size)(_lesions)
    unreadable: dict[int, str] = {}
    unusable: dict[int, str] = {}
    scores, pixels = np.full((len(banks), len(tests)), np.nan), [PixelCounts() for _ in banks]
    for preprocessing, first, batch in _batches(tests, list(members), batch_size, on_progress):
        unreadable |= {row: item.error or "" for row, item in enumerate(batch, first) if item.prepared is None}
        readable = {row: item.prepared for row, item in enumerate(batch, first) if item.prepared is not None}
        if not readable:
            continue
        geometry = replace(preprocessing, intensity=Intensity())  # all that a mask depends on
        masks = [lesions_of(tests[row], item.image.size, geometry) for row, item in readable.items() if masked]
        unusable |= {row: mask.problem for row, mask in zip(readable, masks, strict=masked) if mask.problem is not None}
        encoded = detector.encode([item.input for item in readable.values()])
        for index in members[preprocessing]:
            scored = detector.compare(encoded, banks[index])
            scores[index, list(readable)] = scored.scores.double().cpu().numpy()
            for anomaly_map, (mask, shares, _) in zip(scored.maps.cpu().numpy() if masked else (), masks, strict=True):
                if mask is not None:
                    pixels[index].add(anomaly_map, mask, shares=shares)
    kept = [row for row in range(len(tests)) if row not in unreadable]
    return _Scores(
        samples=tuple(tests[row] for row in kept),
        unreadable=tuple((tests[row], reason) for row, reason in sorted(unreadable.items())),
        unusable_masks=tuple((tests[row], unusable[row]) for row in kept if row in unusable),
        scores=scores[:, kept],
        pixels=pixels,
    )


def _batches(
    tests: Sequence[Sample],
    preprocessings: Sequence[Preprocessing],
    batch_size: int,
    on_progress: Callable[[Sample], None],
) -> Iterator[tuple[Preprocessing, int, list[Loaded]]]:
    """Every row prepared in every way, and the number of each batch's first row; a block of rows at a time."""
    block = max(1, _BLOCK // batch_size) * batch_size
    for start in range(0, len(tests), block):
        for preprocessing in preprocessings:
            first = start
            for batch in load_batches(tests[start : start + block], preprocessing, batch_size=batch_size):
                yield preprocessing, first, batch
                first += len(batch)
                for item in batch if preprocessing == preprocessings[-1] else ():
                    on_progress(item.sample)


def _lesions(sample: Sample, size: tuple[int, int], preprocessing: Preprocessing) -> _Lesions:
    """The mask of a row whose image is of some size; all False for a normal row."""
    if sample.label == 0:
        return _Lesions(np.zeros(preprocessing.size, bool))
    try:
        mask = read_mask_of(sample)
    except AnatomalyError as err:
        return _Lesions(None, problem=str(err))
    if mask is None:
        return _Lesions(None)
    if mask.shape != size:
        problem = f"{sample.mask}: the mask has {mask.shape} pixels, its image {size}; expected the same."
        return _Lesions(None, problem=f"{problem} Export it again, or remove it from the table.")
    fitted = mask_to_input(mask, preprocessing)
    return _Lesions(fitted, region_shares(fitted))


def _evaluation(
    task: str, shots: int, collected: _Scores, supports: Sequence[tuple[Sample, ...]], draws: range
) -> Evaluation:
    labels = np.array([sample.label for sample in collected.samples])
    patients = [sample.patient_id for sample in collected.samples]
    groups = [patient for patient in patients if patient is not None]
    by_patient = len(groups) == len(patients)
    owners = groups if by_patient else None
    scores = collected.scores[draws.start : draws.stop]
    undefined = _undefined(collected, labels, owners, collected.pixels[draws.start])
    metrics: list[dict[str, float]] = []
    bounds: list[dict[str, float]] = []
    for draw, row in zip(draws, scores, strict=True):
        figures = image_metrics(row, labels)
        if by_patient and len(set(groups)) < len(groups) and "patient_auroc" not in undefined:
            figures["patient_auroc"] = auroc(*pool_by_patient(row, labels, groups))
        pixels = collected.pixels[draw]
        if pixels.lesion_pixels and pixels.normal_pixels:
            figures |= pixels.metrics()
            bounds.append(pixels.bounds())
        metrics.append(figures)
    return Evaluation(
        task=task,
        shots=shots,
        samples=collected.samples,
        unreadable=collected.unreadable,
        supports=tuple(supports[draw] for draw in draws),
        scores=scores,
        metrics=tuple(metrics),
        interval=bootstrap(auroc, scores, labels, groups=owners),
        unusable_masks=collected.unusable_masks,
        pixel_bounds=tuple(bounds),
        undefined=undefined,
    )


def _undefined(
    collected: _Scores, labels: NDArray[np.int64], groups: Sequence[str] | None, pixels: PixelCounts
) -> dict[str, str]:
    """Why figures cannot be had, by name, as `Evaluation.undefined`; the same in every draw."""
    found = {}
    if reason := no_interval(labels, groups):
        found["interval"] = reason
    if groups is not None and set(groups) == {group for group, label in zip(groups, labels, strict=True) if label}:
        patients = f"all {len(set(groups))} patients are" if len(set(groups)) > 1 else "the only patient is"
        found["patient_auroc"] = f"it needs both classes, {patients} anomalous"
    rows = (*collected.samples, *(row for row, _ in collected.unreadable))
    if any(row.mask is not None for row in rows) and not (pixels.lesion_pixels and pixels.normal_pixels):
        reason = "normal pixel" if pixels.lesion_pixels else "lesion pixel in a mask that can be used"
        found |= dict.fromkeys(PIXEL_METRICS, f"it needs both classes, there is no {reason}")
    return found
