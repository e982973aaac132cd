"""What the service counts, for Prometheus; numbers only, never a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

if TYPE_CHECKING:
    from anatomaly.service.desk import Desk
    from anatomaly.service.sessions import Sessions

_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD"})


class Metrics:
    """Counters of one service.

    Args:
        desk: For the length of the queue.
        sessions: For their number and memory.
    """

    def __init__(self, desk: Desk, sessions: Sessions) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        labels = ("method", "route", "status")
        self._requests = Counter("anatomaly_requests", "Answered requests.", labels, registry=registry)
        self._seconds = Histogram("anatomaly_request_seconds", "From first byte to answer.", registry=registry)
        self._images = Counter("anatomaly_images", "Images by what became of them.", ("outcome",), registry=registry)
        Gauge("anatomaly_queue", "Requests in the queue.", registry=registry).set_function(lambda: desk.taken)
        Gauge("anatomaly_sessions", "Sessions kept.", registry=registry).set_function(lambda: len(sessions))
        Gauge("anatomaly_session_bytes", "Memory of all sessions.", registry=registry).set_function(
            lambda: sessions.size
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request; `route` is the pattern it matched, so that there are few."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.observe(seconds)

    def judged(self, good: int, failed: int) -> None:
        """Count the images of an answer."""
        self._images.labels("judged").inc(good)
        self._images.labels("failed").inc(failed)

    def text(self) -> bytes:
        """All of it, in the text format of Prometheus."""
        return generate_latest(self.registry)
