"""How the two releases judge, beside the sound way, as functions of the same unblurred anomaly maps.

`sound`: every image is blurred alone and scored.  `published-d24fad`: a Gaussian over the array (16, H, W) of a batch,
so that neighbours in the file list smooth each other, and the last incomplete batch is dropped.  `published-pdd`: of
every batch of 10 only the first image is scored, and counts as anomalous if any image of the batch is.  Both releases
read the files sorted by class, so neighbours nearly always share the label.  The releases' figures can be explained
with these functions; a method cannot be judged with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from anatomaly.evaluation.metrics import auroc
from anatomaly.scoring import blur, image_score
from anatomaly.types import Scoring

if TYPE_CHECKING:
    from anatomaly.types import Sample

Protocol = Literal["sound", "published-d24fad", "published-pdd"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
SOUND, ACROSS, FIRST = PROTOCOLS  # each image alone; blurred across the batch; the first of each batch

#: Blur in the plane and pooling of both releases.
RELEASED = Scoring(blur=4.0, pooling="max")
ACROSS_BATCH, FIRST_BATCH = 16, 10
_BATCH_SIGMA = 4.0  # of D24FAD's release along the batch, in images

Floats = NDArray[np.float64]


class RunScores(NamedTuple):
    """What every protocol needs to know of N maps in file order.

    Attributes:
        alone: (N,) score of each image alone, as the model or tool scores it.
        released: (N,) score of each image alone with the releases' blur and pooling.
        across: (N,) score after the blur over batches of 16, NaN for the dropped remainder; None without maps.
    """

    alone: Floats
    released: Floats
    across: Floats | None


class Judged(NamedTuple):
    """What one protocol scores.

    Attributes:
        scores: (M,) float64, higher = more anomalous.
        labels: (M,) 0 normal, 1 anomalous, as the protocol takes them.
        positions: (M,) place in the file order of the image each score belongs to.
        total: N, the number of images there were.
    """

    scores: Floats
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    total: int


def file_order(samples: Sequence[Sample], labels: Sequence[int]) -> list[int]:
    """The order in which the releases' unshuffled loaders list the files: normals, then the rest, each by path.

    The releases list class folders by name; that the normal class (`good`, `normal`) comes first is a convention here,
    so that the order does not depend on what a data set calls its diseases.

    Args:
        samples: N rows.
        labels: N labels, 0 or 1.

    Returns:
        N indices.
    """

    def key(index: int) -> tuple[int, str, int]:
        row = samples[index]
        return int(labels[index]), row.path.as_posix(), -1 if row.frame is None else row.frame

    return sorted(range(len(samples)), key=key)


def blur_across(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Smooth a batch of maps along the batch, as D24FAD's release does besides the plane.

    A Gaussian is separable: on maps that are blurred in the plane this completes the three-dimensional one.

    Args:
        maps: (B, H, W), float32; neighbours must be neighbours in the file list.

    Returns:
        (B, H, W), float32.

    Example:
        >>> blur_across(np.eye(16, dtype=np.float32)[:, :, None])[7, 7].round(2)  # what is left of the image itself
        array([0.1], dtype=float32)
    """
    from scipy.ndimage import gaussian_filter1d

    smoothed: NDArray[np.float32] = gaussian_filter1d(maps, _BATCH_SIGMA, axis=0)
    return smoothed


class MapScores:
    """Scores maps under all protocols as they come, in file order; holds no more than one batch of 16.

    Args:
        sound: How the model scores an image.
        released: The releases' blur in the plane and pooling; a blur of 0 for maps that are blurred already.
    """

    def __init__(self, *, sound: Scoring = RELEASED, released: Scoring = RELEASED) -> None:
        self._sound, self._released = sound, released
        self._scores: tuple[list[float], list[float], list[float]] = ([], [], [])
        self._waiting: list[NDArray[np.float32]] = []

    def add(self, maps: NDArray[np.float32], scores: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Take the next unblurred maps.

        Args:
            maps: (b, H, W), float32, finite; H and W as before.
            scores: (b,), the model's own, where they are not pooled from its maps (`Scoring.levels`).

        Returns:
            The maps after the releases' blur in the plane, (b, H, W), float32.

        Raises:
            ValueError: The shape is another one.
        """
        alone, released, across = self._scores
        if maps.ndim != 3 or (self._waiting and maps.shape[1:] != self._waiting[0].shape):
            expected = self._waiting[0].shape if self._waiting else "(b, H, W)"
            raise ValueError(f"MapScores.add: got maps of shape {maps.shape}, expected {expected} for each map.")
        raw = torch.from_numpy(np.array(maps, np.float32))
        blurred = blur(raw, self._released.blur)
        if scores is None:
            own = blurred if self._sound.blur == self._released.blur else blur(raw, self._sound.blur)
            scores = image_score(own, self._sound).numpy()
        alone += scores.tolist()
        released += image_score(blurred, self._released).tolist()
        self._waiting += list(blurred.numpy())
        while len(self._waiting) >= ACROSS_BATCH:
            batch, self._waiting = np.stack(self._waiting[:ACROSS_BATCH]), self._waiting[ACROSS_BATCH:]
            across += image_score(torch.from_numpy(blur_across(batch)), self._released).tolist()
        return blurred.numpy()

    def finish(self) -> RunScores:
        """The scores of all maps that were added; the incomplete last batch stays unscored, as released."""
        alone, released, across = (np.array(scores, np.float64) for scores in self._scores)
        dropped = np.full(len(alone) - len(across), np.nan)
        return RunScores(alone, released, np.concatenate([across, dropped]))


def judge(protocol: Protocol, scores: RunScores, labels: NDArray[np.int64]) -> Judged | None:
    """What a protocol makes of N images in file order.

    Args:
        protocol: One of `PROTOCOLS`.
        scores: Of the N images.
        labels: (N,) 0 normal, 1 anomalous.

    Returns:
        The scores that count; None for `ACROSS` without maps.

    Raises:
        ValueError: The lengths differ.
    """
    if len(scores.alone) != len(labels):
        raise ValueError(f"judge: got {len(scores.alone)} scores and {len(labels)} labels, expected one per image.")
    if protocol == FIRST:
        return first_of_batches(scores.released, labels)
    if protocol == ACROSS and scores.across is None:
        return None
    if protocol == SOUND or scores.across is None:
        return Judged(scores.alone, labels, np.arange(len(labels)), len(labels))
    places = np.flatnonzero(~np.isnan(scores.across))
    return Judged(scores.across[places], labels[places], places, len(labels))


def first_of_batches(scores: Floats, labels: NDArray[np.int64]) -> Judged:
    """What PDD's release scores: the first image of every batch of 10, under the largest label of the batch.

    Args:
        scores: (N,) of each image alone.
        labels: (N,) 0 normal, 1 anomalous.
    """
    places = np.arange(0, len(scores), FIRST_BATCH)
    largest = np.maximum.reduceat(labels, places) if len(labels) else labels
    return Judged(scores[places], largest, places, len(labels))


def auroc_of(judged: Judged) -> float:
    """Image AUROC of what a protocol scored; NaN where it scored only one class."""
    return auroc(judged.scores, judged.labels) if len(np.unique(judged.labels)) == 2 else float("nan")


def other_file_names(scores: Floats, labels: NDArray[np.int64], *, orders: int = 200, seed: int = 0) -> Floats:
    """AUROC of `FIRST` had the files other names: class by class as before, within a class in random order.

    Args:
        scores: (N,) of each image alone, in file order.
        labels: (N,) 0 normal, 1 anomalous, normals first.
        orders: How many orders.
        seed: Of the orders.

    Returns:
        (orders,), NaN where an order scores only one class.
    """
    generator = np.random.default_rng(seed)
    values = np.empty(orders)
    for number in range(orders):
        order = np.concatenate([generator.permutation(np.flatnonzero(labels == label)) for label in (0, 1)])
        values[number] = auroc_of(first_of_batches(scores[order], labels[order]))
    return values


def shuffled_loader(
    blurred: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    orders: int = 1,
    seed: int = 0,
    released: Scoring = RELEASED,
) -> Floats:
    """AUROC of `ACROSS` had its loader been shuffled, so that neighbours share no label.

    Args:
        blurred: (N, H, W), float32, blurred in the plane; may lie on disk, 16 maps are read at a time.
        labels: (N,) 0 normal, 1 anomalous.
        orders: How many random orders.
        seed: Of the orders.
        released: Pooling.

    Returns:
        (orders,), NaN where fewer than one batch or only one class is scored.
    """
    generator = np.random.default_rng(seed)
    values = np.empty(orders)
    for number in range(orders):
        order = generator.permutation(len(labels))
        places = order[: len(order) - len(order) % ACROSS_BATCH]
        scores: list[float] = []
        for batch in places.reshape(-1, ACROSS_BATCH):
            smoothed = blur_across(np.stack([blurred[place] for place in batch]))
            scores += image_score(torch.from_numpy(smoothed), released).tolist()
        values[number] = auroc_of(Judged(np.array(scores), labels[places], places, len(labels)))
    return values
