"""Start the service and stay until it is told to stop."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import signal
import socket
from typing import TYPE_CHECKING

import uvicorn

from anatomaly.errors import ConfigError, check

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp

_CONNECTIONS = 256
_SHORTEST_TOKEN = 16


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_for(host: str, given: str | None) -> str | None:
    """The token that requests must name: the one given, a new one where other machines can ask, else None.

    Raises:
        ConfigError: The one given is too short, or cannot stand in a header.
    """
    if given is not None:
        sound = len(given) >= _SHORTEST_TOKEN and given.isascii() and given.isprintable() and " " not in given
        check("token", "another", sound, f"at least {_SHORTEST_TOKEN} letters, digits and signs, no spaces")
        return given
    return None if is_loopback(host) else secrets.token_urlsafe(24)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: There is no such address here, or another program has it.
    """
    check("port", port, 0 <= port < 2**16, "a number from 0 to 65535; 0 takes any that is free")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_CONNECTIONS)
    except (OSError, UnicodeError) as err:
        why = getattr(err, "strerror", None) or "no such address"
        raise ConfigError(
            f"serve: cannot listen at {host} port {port} ({why}). Choose another --host or --port."
        ) from err


def serve(app: ASGIApp, listening: socket.socket, seconds: int, told: Callable[[], None]) -> None:
    """Answer requests until SIGINT or SIGTERM; those that are under way are finished first.

    Args:
        app: From `app.make_app`.
        listening: From `listen`.
        seconds: After which requests under way are given up.
        told: Called before the first request is answered.
    """
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=seconds,
            ws="none",
            http="h11",
            loop="asyncio",
        )
    )
    for each in (signal.SIGINT, signal.SIGTERM):  # uvicorn sends itself the signal again when it is done
        signal.signal(each, lambda *_: None)
    told()
    server.run(sockets=[listening])
