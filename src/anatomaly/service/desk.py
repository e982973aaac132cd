"""One job at a time in a thread of its own, so that the event loop stays free; whoever finds the queue full is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from anatomaly.service.limits import RefusedError

Result = TypeVar("Result")


class Desk:
    """Where requests wait for the detector; used from the event loop alone.

    Args:
        places: Requests that may be received, wait or be judged at the same time.
    """

    def __init__(self, places: int) -> None:
        self.places, self.taken = places, 0
        self._thread = ThreadPoolExecutor(1, "judge")
        self._turn = asyncio.Lock()
        self._usual = 1.0  # seconds of a job, a running average

    @property
    def full(self) -> bool:
        """Whether the next request would be sent away."""
        return self.taken >= self.places

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue, from before the request's body is read.

        Raises:
            RefusedError: There is none.
        """
        if self.full:
            wait = max(1, round(self._usual * self.taken))
            raise RefusedError(429, f"queue: {self.taken} requests wait already. Try again later.", retry_after=wait)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def run(self, job: Callable[[], Result], gone: Callable[[], Awaitable[bool]]) -> Result:
        """Run a job when it is its turn, and return what it returns.

        Args:
            job: Called in the desk's thread.
            gone: Whether nobody waits for the answer any more; then the job is not begun.

        Raises:
            RefusedError: Nobody waits.
        """
        async with self._turn:
            if await gone():
                raise RefusedError(499, "the client went away.")
            started = time.monotonic()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, job)
            finally:
                self._usual = 0.8 * self._usual + 0.2 * (time.monotonic() - started)

    def close(self) -> None:
        """Wait for the job that runs; begin no more."""
        self._thread.shutdown(cancel_futures=True)
