"""What every request passes before anything reads it: its host, its origin, its token, its size and its time.

A page of another site that a user happens to have open can send requests to a service on the same machine, and can give
its own name that machine's address (DNS rebinding).  So without a token only a local `Host` is served, and a request
that a browser says comes from elsewhere (`Origin`) never is.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from anatomaly.service.limits import Limits, RefusedError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from anatomaly.service.metrics import Metrics

logger = logging.getLogger(__name__)

#: What can be had without a token: nothing in it belongs to anybody.
OPEN = frozenset({"/", "/page.css", "/page.js", "/health", "/ready", "/openapi.json"})
_ASKED_OFTEN = frozenset({"/health", "/ready", "/metrics"})
_SMALL_BODY = 2**16  # of a request without files
_DRAIN_SECONDS = 5
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
)


class Guard:
    """The outermost layer of the service.

    Args:
        app: What answers the requests that pass.
        limits: Of a body.
        metrics: Where every answer is counted.
        token: What requests must name, or None for a service that only listens to its own machine.
        hosts: Names under which such a service is served.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, *, token: str | None, hosts: frozenset[str]
    ) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.token, self.hosts = token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens in it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        body = _Body(receive, self._largest_body(scope), self.limits)

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400:
                    await body.drain()
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, body.receive, send_guarded)
        except RefusedError as err:
            await answer_refusal(err, send_guarded)
        except Exception as err:  # answered already, in `app`; its words may hold names
            origin = err.__traceback__
            while origin is not None and origin.tb_next is not None:
                origin = origin.tb_next
            where = f"{origin.tb_frame.f_code.co_filename}:{origin.tb_lineno}" if origin is not None else "?"
            logger.error("service: %s in %s", type(err).__name__, where)
            if not status:
                await answer_refusal(
                    RefusedError(500, "service: something broke here. Please report it."), send_guarded
                )
        route = getattr(scope.get("route"), "path", "other")
        seconds = time.monotonic() - started
        self.metrics.answered(scope["method"], route, status, seconds)
        level = logging.DEBUG if route in _ASKED_OFTEN else logging.INFO
        logger.log(level, "%s %s %d %.2f s", scope["method"][:10], route, status, seconds)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.token is None and _host_name(host) not in self.hosts:
            raise RefusedError(421, "host: this service answers only under a local name, such as localhost.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise RefusedError(403, "origin: a page of another site asks. Open this service's own page instead.")
        if self.token is not None and scope["path"] not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                raise RefusedError(401, "token: missing or wrong. Send the header Authorization: Bearer TOKEN.")

    def _largest_body(self, scope: Scope) -> int:
        files = Headers(scope=scope).get("content-type", "").lower().startswith("multipart/form-data")
        return int(self.limits.upload_mib * 2**20) if files else _SMALL_BODY


class _Body:
    """A request's body as it arrives, up to a size and a time."""

    def __init__(self, receive: Receive, largest: int, limits: Limits) -> None:
        self._receive, self._largest, self._limits = receive, largest, limits
        self._read, self._done = 0, False
        self._late = time.monotonic() + limits.seconds

    async def receive(self) -> Message:
        """The next part.

        Raises:
            RefusedError: There is more than may be, or it takes too long.
        """
        if self._done:  # from here it only tells that the client went away
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.01, self._late - time.monotonic()))
        except asyncio.TimeoutError as err:
            raise RefusedError(
                408, f"request: not sent within {self._limits.seconds} s. Send fewer at a time."
            ) from err
        self._read += len(message.get("body", b""))
        self._done = not message.get("more_body", False)
        if self._read > self._largest:
            raise RefusedError(
                413,
                f"request: larger than {self._largest / 2**20:.4g} MiB. Send fewer at a time, or raise "
                "--max_upload_mib.",
            )
        return message

    async def drain(self) -> None:
        """Read on for a moment: a client that is still sending would not see the answer."""

        async def rest() -> None:
            read = 0
            while not self._done and read <= self._limits.upload_mib * 2**20:
                message = await self._receive()
                read += len(message.get("body", b""))
                self._done = not message.get("more_body", False)

        try:
            await asyncio.wait_for(rest(), _DRAIN_SECONDS)
        except asyncio.TimeoutError:
            return


async def answer_refusal(refusal: RefusedError, send: Send) -> None:
    """Send a refusal as JSON."""
    content = json.dumps({"error": refusal.line}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if refusal.retry_after is not None:
        headers.append((b"retry-after", str(refusal.retry_after).encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
