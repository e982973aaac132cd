"""Read and prepare images ahead of the model: workers decode, threads wait for them and resize."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from anatomaly.data.transforms import Prepared, load
from anatomaly.data.workers import WORKERS
from anatomaly.errors import AnatomalyError
from anatomaly.types import Preprocessing, Sample

#: Bytes of read images that wait for the consumer, and bytes from which a batch is full whatever its length.
MAX_BYTES = 2**28

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        batch_size: Rows per batch; fewer where they take more than `MAX_BYTES`, and in the last one.

    Yields:
        Lists of at most `batch_size` results; an unreadable file is one of them and ends nothing.  The pixels as read
        are not kept: in `prepared.image` they are NaN.
    """

    def read(sample: Sample) -> Loaded:
        try:
            prepared = load(sample, preprocessing)
        except AnatomalyError as err:
            return Loaded(sample, None, str(err))
        nothing = np.broadcast_to(np.float32("nan"), prepared.image.pixels.shape)
        return Loaded(sample, prepared._replace(image=replace(prepared.image, pixels=nothing)))

    def size(loaded: Loaded) -> int:
        return 0 if loaded.prepared is None else loaded.prepared.input.nbytes + loaded.prepared.display.nbytes

    batch: list[Loaded] = []
    for loaded in read_ahead(samples, read, rows=batch_size, size=size):
        batch.append(loaded)
        if len(batch) == batch_size or sum(map(size, batch)) >= MAX_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Result], *, rows: int, size: Callable[[Result], int]
) -> Iterator[Result]:
    """Yield `read(item)` in the order of the items, computed ahead in threads while the consumer works.

    Args:
        items: Consumed lazily.
        read: Called in several threads at once; what it raises is raised in its place.
        rows: Results that may wait for the consumer.
        size: Bytes of a result; those that wait take at most `MAX_BYTES`, unless a single one takes more.
    """
    room = _Room()

    def read_when_there_is_room(number: int, item: Item) -> Result:
        room.enter(number)
        done = 0
        try:
            result = read(item)
            done = size(result)
        finally:
            room.leave(done)
        return result

    ahead: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(WORKERS + 1)
    try:
        for number, item in enumerate(items):
            ahead.append(threads.submit(read_when_there_is_room, number, item))
            if len(ahead) > rows:
                result = ahead.popleft().result()
                room.take(size(result))
                yield result
        while ahead:
            result = ahead.popleft().result()
            room.take(size(result))
            yield result
    finally:
        room.open()
        threads.shutdown(cancel_futures=True)


class _Room:
    """How many bytes of results wait for the consumer, and who may read on."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.taken = 0  # results the consumer has had
        self.waiting = 0  # bytes
        self.running = 0  # reads
        self.largest = 0  # bytes of a result so far: what a running read is expected to take
        self.is_open = False

    def enter(self, number: int) -> None:
        """Wait until there is room for one more; the result that the consumer waits for always has some."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_open or number == self.taken or self._fits())
            self.running += 1

    def leave(self, size: int) -> None:
        with self.changed:
            self.running -= 1
            self.waiting += size
            self.largest = max(self.largest, size)
            self.changed.notify_all()

    def take(self, size: int) -> None:
        with self.changed:
            self.taken += 1
            self.waiting -= size
            self.changed.notify_all()

    def open(self) -> None:
        """Let everybody go on: nobody takes results any more."""
        with self.changed:
            self.is_open = True
            self.changed.notify_all()

    def _fits(self) -> bool:
        return self.waiting + (self.running + 1) * self.largest <= MAX_BYTES
