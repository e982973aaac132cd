"""What one client may ask of the service, and how it is told that it asked too much."""

from __future__ import annotations

from dataclasses import dataclass, fields

from anatomaly.errors import check


@dataclass(frozen=True)
class Limits:
    """Bounds of a running service; each is a flag, `--max_<name>`.

    Attributes:
        upload_mib: MiB that one request may send.
        files: Files in one request.
        normals: Normal images of one session, slices of volumes counted.
        images: Images judged in one request, slices of volumes counted.
        seconds: For sending a request, for decoding one file, and for judging; images that are left then are told.
        queue: Requests that are received, wait or are judged at the same time; one more is sent away with 429.
        sessions: Sessions kept; the one that was used least recently gives way to a new one.
        memory_gib: GiB that all sessions may take together; older ones give way here too.
    """

    upload_mib: float = 256.0
    files: int = 256
    normals: int = 64
    images: int = 512
    seconds: int = 120
    queue: int = 16
    sessions: int = 32
    memory_gib: float = 2.0

    def __post_init__(self) -> None:
        """A `ConfigError` where a limit is not positive."""
        for each in fields(self):
            value = getattr(self, each.name)
            check(f"max_{each.name}", value, 0 < value < 2**31, "a number above 0")


class RefusedError(Exception):
    """A request that is answered with an error: its status, one line, and when to try again.

    Args:
        status: HTTP status, 4xx or 5xx.
        line: What is wrong, got, expected, and what to do; it may name the client's own files, so it is never logged.
        retry_after: Seconds, for 429 and 503.
    """

    def __init__(self, status: int, line: str, *, retry_after: int | None = None) -> None:
        super().__init__(line)
        self.status, self.line, self.retry_after = status, " ".join(line.split()), retry_after
