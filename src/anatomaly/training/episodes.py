"""Training episodes: one query and K other normal images of the same task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anatomaly.training.parts import Part
    from anatomaly.types import Features


class Batch(NamedTuple):
    """B episodes by name and level, and what they are of a larger batch; see `parts.Part`.

    Attributes:
        query: Tensors (B, ...).
        support: The supports' levels (B, K, ...); K may be 0.
        share: What the mean over these episodes counts in that of the batch.
        alone: Every process has these same episodes.
    """

    query: Features
    support: Features
    share: float = 1.0
    alone: bool = False


class EpisodeSampler(Sampler[tuple[int, ...]]):
    """Draw (query, support 1, ..., support K) indices; every image is the query once per epoch.

    Supports are distinct images of the query's task, never the query itself.  All randomness is here and depends on the
    seed and the epoch only, so a resumed run draws what the uninterrupted one would have drawn.

    Args:
        tasks: Task of every training image.
        shots: K; 0 for methods without support.
        resample: Draw other supports every epoch; False keeps those of epoch 0 (D24FAD's release).
        seed: Of order and supports.

    Raises:
        ConfigError: A task has fewer than K + 1 images.

    Note: differs from the release in that a support cannot repeat within its set.
    """

    def __init__(self, tasks: Sequence[str], *, shots: int, resample: bool = True, seed: int = 0) -> None:
        self.members = members_of(tasks, shots)
        self.tasks = list(tasks)
        self.shots = shots
        self.resample = resample
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = np.random.default_rng((self.seed, self.epoch, 0)).permutation(len(self.tasks))
        draws = np.random.default_rng((self.seed, self.epoch if self.resample else 0, 1))
        supports = {index: self._draw(index, draws) for index in range(len(self.tasks))}
        for query in order.tolist():
            yield (query, *supports[query])

    def _draw(self, query: int, draws: np.random.Generator) -> list[int]:
        others = self.members[self.tasks[query]]
        picked = draws.choice(others[others != query], size=self.shots, replace=False)
        return [int(index) for index in picked]


def members_of(tasks: Sequence[str], shots: int) -> dict[str, NDArray[np.int64]]:
    """The training images of every task, by number.

    Args:
        tasks: Task of every training image.
        shots: K, supports beside the query.

    Raises:
        ConfigError: A task has fewer than K + 1 images.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, task in enumerate(tasks):
        members[task].append(index)
    for task, indices in members.items():
        if len(indices) < shots + 1:
            raise ConfigError(
                f"training: task {task!r} has {len(indices)} normal training images, {shots} shots need at least "
                f"{shots + 1}. Lower --training.shots or add images."
            )
    return {task: np.array(indices) for task, indices in members.items()}


class Episodes(Dataset[Batch]):
    """Turn a part of a batch, drawn indices, into tensors in one go.

    Args:
        support_levels: Levels that the loss wants of the supports; it gets all of the query.
        fetch: Tensors of the images with the given indices: an index tensor of any shape and the levels wanted in,
            tensors that start with that shape out, by name and level.
    """

    def __init__(
        self, fetch: Callable[[torch.Tensor, slice], Features], *, support_levels: slice = slice(None)
    ) -> None:
        self.fetch, self.support_levels = fetch, support_levels

    def __getitems__(self, part: Part) -> Batch:
        index = torch.tensor(part.episodes)  # (B, 1 + K)
        support = self.fetch(index[:, 1:], self.support_levels) if index.shape[1] > 1 else {}
        return Batch(self.fetch(index[:, 0], slice(None)), support, part.share, part.alone)


def as_is(batch: Any) -> Batch:
    """Collate function of `Episodes`, whose items are batches already."""
    collated: Batch = batch
    return collated
