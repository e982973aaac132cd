"""Read and prepare images ahead of the model: workers decode, threads wait for them and resize."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

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
    queue = _Queue(read, size)
    try:
        for item in items:
            queue.put(item)
            if len(queue.slots) > rows:
                yield queue.take()
        while queue.slots:
            yield queue.take()
    finally:
        queue.end()


class _Slot(Generic[Item, Result]):
    """One item on its way; it has a future from when there is room to read it."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.future: Future[Result] | None = None


class _Queue(Generic[Item, Result]):
    """Items in order, of which as many are read as there is room for; no thread ever waits for room."""

    def __init__(self, read: Callable[[Item], Result], size: Callable[[Result], int]) -> None:
        self.read, self.size = read, size
        self.slots: deque[_Slot[Item, Result]] = deque()
        self.threads = ThreadPoolExecutor(WORKERS + 1)
        self.lock = threading.RLock()
        self.waiting = 0  # bytes of results nobody has taken
        self.running = 0  # reads
        self.largest = 0  # bytes of a result so far: what a running read is expected to take

    def put(self, item: Item) -> None:
        with self.lock:
            self.slots.append(_Slot(item))
            self._start()

    def take(self) -> Result:
        """Wait for the first result."""
        future = self.slots[0].future
        assert future is not None  # the first one always has room
        result = future.result()
        with self.lock:
            self.slots.popleft()
            self.waiting -= self.size(result)
            self._start()
        return result

    def end(self) -> None:
        """Wait for the reads that run; start no more."""
        with self.lock:
            self.slots.clear()
        self.threads.shutdown(cancel_futures=True)

    def _start(self) -> None:
        """Begin to read whatever there is room for."""
        for slot in self.slots:
            fits = self.waiting + (self.running + 1) * self.largest <= MAX_BYTES and self.running <= WORKERS
            if slot.future is None and (fits or slot is self.slots[0]):
                self.running += 1
                slot.future = self.threads.submit(self._run, slot.item)
            elif slot.future is None:
                return

    def _run(self, item: Item) -> Result:
        done = 0
        try:
            result = self.read(item)
            done = self.size(result)
            return result
        finally:
            with self.lock:
                self.running -= 1
                self.waiting += done
                self.largest = max(self.largest, done)
                with contextlib.suppress(RuntimeError):  # the interpreter ends
                    self._start()
