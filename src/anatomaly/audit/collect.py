"""One pass over a draw's maps: scores under every protocol, and the maps on disk for the shuffled loader."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anatomaly.audit.published import ACROSS_BATCH, MapScores, RunScores, shuffled_loader
from anatomaly.files import output_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from anatomaly.types import Scoring

_DISK = 2**30  # bytes of maps kept for the shuffled loader, in temporary files
_ORDERS = 20  # random orders of the loader, spread over the kept draws


def draws_to_keep(draws: int, images: int, size: tuple[int, int]) -> int:
    """How many draws' maps fit on the disk budget; at least one."""
    return min(draws, max(1, _DISK // (images * size[0] * size[1] * 4)))


class Collector:
    """Takes a draw's maps in file order.

    Args:
        sound: How the model scores an image.
        released: The releases' blur in the plane and pooling.
        file: Where to keep the blurred maps for `shuffled`; None keeps none.
    """

    def __init__(self, *, sound: Scoring, released: Scoring, file: Path | None = None) -> None:
        self._scores = MapScores(sound=sound, released=released)
        self._released = released
        self._file = file
        self._size: tuple[int, ...] = ()

    def add(self, maps: NDArray[np.float32], scores: NDArray[np.float32] | None = None) -> None:
        """Score the next maps, (b, H, W) float32; the model's own scores, (b,), where it does not pool its maps.

        Raises:
            OutputError: They cannot be kept.
        """
        blurred = self._scores.add(maps, scores)
        self._size = blurred.shape[1:]
        if self._file is not None:
            try:
                with self._file.open("ab") as stream:
                    stream.write(blurred.astype(np.float32).tobytes())
            except OSError as err:
                raise output_error(self._file, err) from err

    def finish(self) -> RunScores:
        """The scores of all maps that were added."""
        return self._scores.finish()

    def shuffled(self, labels: NDArray[np.int64], *, orders: int, seed: int) -> list[float]:
        """AUROC with a shuffled loader, one per order; none where no maps were kept or there is no whole batch."""
        if self._file is None or len(labels) < ACROSS_BATCH:
            return []
        maps = np.memmap(self._file, np.float32, "r", shape=(len(labels), *self._size))
        return list(map(float, shuffled_loader(maps, labels, orders=orders, seed=seed, released=self._released)))


def shuffled_draws(collectors: Sequence[Collector], labels: NDArray[np.int64], *, seed: int) -> tuple[float, ...]:
    """AUROC with a shuffled loader: about 20 random orders, spread evenly over the kept draws, NaN left out.

    Args:
        collectors: Of the kept draws, all maps added.
        labels: (N,) in the maps' order.
        seed: Of the orders.
    """
    each = -(-_ORDERS // len(collectors)) if collectors else 0
    values = [
        value
        for number, collector in enumerate(collectors)
        for value in collector.shuffled(labels, orders=each, seed=seed + number)
    ]
    return tuple(value for value in values if np.isfinite(value))
