"""A Ray cluster to work on: an existing one by its address, or one on this machine for as long as the work takes."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from anatomaly.errors import AnatomalyError, NotReadyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

#: Ray reports nothing to anybody, and tells a user nothing that is not about the work.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
_SECONDS = 5  # for a machine to answer


def require_ray() -> None:
    """Say how to install what this package needs.

    Raises:
        NotReadyError: Ray is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import pyarrow.parquet  # noqa: F401
        import ray  # noqa: F401
    except ImportError as err:
        raise NotReadyError('engine ray: Ray is not installed. Try: pip install "anatomaly[scale]"') from err


@contextmanager
def connected(
    address: str | None = None, *, processors: int = 1, store: int | None = None
) -> Iterator[dict[str, float]]:
    """Be part of a cluster; yields what it has, such as {"CPU": 8.0, "GPU": 1.0}.

    Args:
        address: "host:port" of an existing one, or "auto"; None starts one on this machine and ends it afterwards.
        processors: Of a new one: how many processes may run at a time.
        store: Of a new one: bytes of memory for what is on its way; None lets Ray choose.

    Raises:
        NotReadyError: Ray is not installed, or there is no cluster at the address.
    """
    require_ray()
    import ray

    options: dict[str, Any] = {"include_dashboard": False, "num_cpus": processors, "object_store_memory": store}
    if address is not None:
        _reach(address)
        options = {"address": address}
    try:
        ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, OSError) as err:
        where = address or "on this machine"
        raise NotReadyError(f"engine ray: no cluster {where} ({_line(err)[:200]}).") from err
    try:
        yield dict(ray.cluster_resources())
    finally:
        ray.shutdown()


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Turn what a process of the cluster raised into an error of this one.

    Raises:
        AnatomalyError: The same that was raised there, or a NotReadyError where the cluster broke down.
    """
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as err:
        cause: BaseException | None = err
        while cause is not None and not isinstance(cause, AnatomalyError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            raise type(cause)(str(cause).splitlines()[-1]) from err
        if isinstance(err, ray.exceptions.RayTaskError):
            raise
        raise NotReadyError(
            f"engine ray: the cluster broke down ({_line(err)[:200]}). Run the same command again to go on."
        ) from err


class Tasks:
    """Calls that run anywhere in the cluster, as `concurrent.futures` has them.

    Args:
        processors: That a call takes.
        graphics: GPUs that a call takes.
    """

    def __init__(self, processors: int, graphics: float = 0) -> None:
        self._options = {"num_cpus": processors, "num_gpus": graphics, "max_retries": 0}

    def submit(self, call: Callable[..., None], *arguments: Any) -> Future[None]:
        """Run `call` as soon as there is room; what the arguments say of folders must hold on every machine."""
        import ray

        found: Future[None] = ray.remote(call).options(**self._options).remote(*arguments).future()
        return found


def _reach(address: str) -> None:
    """Refuse an address at which nobody answers, before Ray waits for it for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise NotReadyError(f"address: got {address}, expected HOST:PORT of a Ray cluster, such as 10.0.0.1:6379.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as err:
        raise NotReadyError(f"address: no Ray cluster answers at {address} ({_line(err)}).") from err


def _line(err: BaseException) -> str:
    return " ".join(str(err).split()).rstrip(".") or type(err).__name__
