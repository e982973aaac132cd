"""Read and prepare images ahead of the model, in threads: decoding and resizing release Python's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from anatomaly.data.transforms import Prepared, load
from anatomaly.errors import AnatomalyError
from anatomaly.types import Preprocessing, Sample


class Loaded(NamedTuple):
    """One row and what became of it: the prepared image, or one line saying why there is none."""

    sample: Sample
    prepared: Prepared | None
    error: str | None = None


def load_batches(samples: Iterable[Sample], preprocessing: Preprocessing, *, batch_size: int) -> Iterator[list[Loaded]]:
    """Prepare rows in order, one batch ahead of the consumer.

    Args:
        samples: Rows; consumed lazily, so the memory taken is that of two batches.
        preprocessing: The same for all rows.
        batch_size: Rows per batch; the last one may be shorter.

    Yields:
        Lists of `batch_size` results; an unreadable file is one of them and ends nothing.
    """

    def read(sample: Sample) -> Loaded:
        try:
            return Loaded(sample, load(sample, preprocessing))
        except AnatomalyError as err:
            return Loaded(sample, None, str(err))

    with ThreadPoolExecutor() as pool:
        ahead: deque[Future[Loaded]] = deque()
        for sample in samples:
            ahead.append(pool.submit(read, sample))
            if len(ahead) >= 2 * batch_size:
                yield [ahead.popleft().result() for _ in range(batch_size)]
        while ahead:
            yield [ahead.popleft().result() for _ in range(min(batch_size, len(ahead)))]
