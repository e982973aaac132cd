"""Who trains on what: a batch in parts, over the processes of a training and over the steps that accumulate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from torch.utils.data import Sampler

if TYPE_CHECKING:
    from anatomaly.training.episodes import EpisodeSampler

Item = TypeVar("Item")


class Ranks(NamedTuple):
    """Which of how many processes this one is, from 0."""

    rank: int = 0
    size: int = 1

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share, neighbours kept together."""
        return split(items, self.size)[self.rank]


#: The one process where there are no others.
ALONE = Ranks()


class Part(NamedTuple):
    """What one process takes of a batch at a time.

    Attributes:
        episodes: Indices of query and supports.
        share: What the mean over these episodes counts in the mean over the batch; all parts' shares add up to 1.
        alone: Every process has these same episodes, because there are fewer than processes.
    """

    episodes: Sequence[tuple[int, ...]]
    share: float
    alone: bool = False


class Parts(Sampler[Part]):
    """The parts of one process, batch after batch; every process gets as many, or they would wait for each other.

    Args:
        sampler: The episodes of an epoch, the same in every process; Lightning tells it the epoch.
        batch_size: Episodes of a batch, over all processes and steps; the last batch may have fewer.
        accumulate: Steps that a batch is taken in.
        ranks: Which process this is.
    """

    def __init__(self, sampler: EpisodeSampler, *, batch_size: int, accumulate: int = 1, ranks: Ranks = ALONE) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.ranks = ranks

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size)
        return whole * self.accumulate + (self._steps(rest) if rest else 0)

    def __iter__(self) -> Iterator[Part]:
        episodes = iter(self.sampler)
        while batch := list(islice(episodes, self.batch_size)):
            if len(batch) < self.ranks.size:
                yield Part(batch, 1 / self.ranks.size, alone=True)
                continue
            for step in split(batch, self._steps(len(batch))):
                own = self.ranks.own(step)
                yield Part(own, len(own) / len(batch))

    def _steps(self, episodes: int) -> int:
        """In how many steps a batch is taken, so that every process has something to do in each."""
        return min(self.accumulate, max(1, episodes // self.ranks.size))


def split(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    """Cut a sequence into neighbouring parts whose lengths differ by at most one.

    Example:
        >>> split("abcdefg", 3)
        ['abc', 'de', 'fg']
    """
    size, longer = divmod(len(items), parts)
    ends = [size * part + min(part, longer) for part in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(ends)]
