"""Training batches with pasted lesions: every image with and without one, each with its own supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler

from anatomaly.synthetic.lesions import paste_lesion
from anatomaly.synthetic.phantom import TASKS, draw
from anatomaly.training.episodes import Batch, members_of

if TYPE_CHECKING:
    from torch import Tensor

    from anatomaly.types import Features

#: Batches of an epoch.  The tasks take turns, so a pass over all images would mean nothing.
STEPS = 100
#: First patient of the synthetic tasks: beyond those of the phantom benchmarks with seeds below 1000.
_FIRST_PATIENT = 10**9


class StepSampler(Sampler[tuple[int, int]]):
    """Yield (epoch, step) for the `STEPS` steps of an epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, step) for step in range(STEPS))


class LesionEpisodes(Dataset[Batch]):
    """The batch of an (epoch, step): the tasks take turns, whatever their size, and K is drawn from 2 to `shots`.

    All randomness depends on the seed, the epoch and the step only, so a resumed run draws what the uninterrupted one
    would have drawn.

    Args:
        tasks: Task of every training image.
        load: Images (n, 3, H, W) in [0, 1] with the given indices, all of one task.
        fetch: Their frozen features, as `episodes.Episodes` takes them.
        extract: Frozen features of any images.
        shots: The most supports of a batch.
        batch_size: Queries per batch; fewer where a task has too few images.
        seed: Of everything drawn.

    Raises:
        ConfigError: A task has fewer than `shots` + 1 images.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        load: Callable[[Sequence[int]], Tensor],
        fetch: Callable[[Tensor, slice], Features],
        extract: Callable[[Tensor], Features],
        *,
        shots: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        self.members = list(members_of(tasks, shots).values())
        self.load = load
        self.fetch = fetch
        self.extract = extract
        self.shots = shots
        self.batch_size = batch_size
        self.seed = seed

    def __getitem__(self, when: tuple[int, int]) -> Batch:
        epoch, step = when
        rng = np.random.default_rng((self.seed, epoch, step))
        members = self.members[(epoch * STEPS + step) % len(self.members)]
        shots = int(rng.integers(min(2, self.shots), self.shots + 1))
        queries = rng.permutation(members)[: self.batch_size]
        supports = [rng.choice(members[members != query], size=shots, replace=False) for query in queries]
        normal = self.load(queries.tolist())
        lesions = [paste_lesion(image.cpu().numpy(), rng=rng) for image in normal]
        pasted, mask = (torch.from_numpy(np.stack(parts)).to(normal.device) for parts in zip(*lesions, strict=True))
        with torch.no_grad():  # both anew: a cache may round, and rounding would tell them apart
            levels = [level.chunk(2) for level in self.extract(torch.cat([normal, pasted]))["teacher"]]
        query = {"teacher": [level[0] for level in levels], "pasted": [level[1] for level in levels], "mask": [mask]}
        return Batch(query, self.fetch(torch.from_numpy(np.stack(supports)), slice(None)))


def synthetic_images(count: int, size: tuple[int, int]) -> tuple[list[str], Tensor]:
    """Normal images of the five built-in tasks, as training images of five tasks more.

    Args:
        count: Images per task.
        size: (height, width).

    Returns:
        Their tasks and the images (5 * count, 3, H, W) in [0, 1].  No patient of a `phantom.write_benchmark` with a
        seed below 1000 is one of them.
    """
    if count == 0:
        return [], torch.empty(0, 3, *size)
    side = max(size)
    drawn = [(task, draw(task, seed=_FIRST_PATIENT + i, size=side).pixels) for task in TASKS for i in range(count)]
    images = torch.from_numpy(np.stack([np.broadcast_to(pixels, (3, side, side)) for _, pixels in drawn]))
    if size != (side, side):
        images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0.0, 1.0)
    return [f"synthetic {task}" for task, _ in drawn], images
