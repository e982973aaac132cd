"""A Ray cluster to work on: an existing one by its address, or one on this machine for as long as the work takes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from anatomaly.errors import AnatomalyError, ConfigError, NotReadyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    warnings.filterwarnings("ignore", module=r"ray\.")
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
        with _hushed(), _own_signals():
            ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, OSError) as err:
        where = address or "on this machine"
        raise NotReadyError(f"engine ray: no cluster {where} ({_line(err)[:200]}).") from err
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call, unused-ignore]
        yield resources
    finally:
        with _hushed():  # of what Ray says of work that was given up
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
    """Calls that run anywhere in the cluster: what `concurrent.futures` calls an executor, as far as it is needed.

    Args:
        processors: That a call takes.
        gpus: That a call takes.
        at_once: Calls that the cluster has room for.
    """

    def __init__(self, processors: int, gpus: int, at_once: int) -> None:
        self.processors, self.at_once = processors, at_once
        self._options = {"num_cpus": processors, "num_gpus": gpus, "max_retries": 0}

    def submit(self, call: Callable[..., None], *arguments: Any) -> Future[None]:
        """Run `call` as soon as there is room; its future fails with what was raised there."""
        import ray

        told: Future[None] = Future()

        def end(done: Future[None]) -> None:
            if (err := done.exception()) is None:
                told.set_result(None)
            else:
                told.set_exception(getattr(err, "cause", None) or NotReadyError(_line(err)[:200] + "."))

        ray.remote(call).options(**self._options).remote(*arguments).future().add_done_callback(end)
        return told


@contextmanager
def tasks(address: str | None, *, processors: int, each: int, use_gpus: bool) -> Iterator[Tasks]:
    """Be part of a cluster whose machines take calls.

    Args:
        address: As in `connected`.
        processors: Of this machine.
        each: Processors that a call takes.
        use_gpus: Give every call a GPU where there are any.

    Raises:
        NotReadyError: As `connected`.
        ConfigError: The cluster has fewer processors than a call takes.
    """
    with connected(address, processors=processors) as found:
        room, gpus = int(found.get("CPU", 0)) // each, int(found.get("GPU", 0)) * use_gpus
        if not room:
            raise ConfigError(f"cell_cores: got {each}, the cluster has {int(found.get('CPU', 0))} processors.")
        yield Tasks(each, min(gpus, 1), min(room, gpus or room))


@contextmanager
def _hushed() -> Iterator[None]:
    """Let nothing through to standard error: Ray's native part says there that it was told to say nothing."""
    shown = os.dup(2)
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123 no path of the user's
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of a polite kill, in whose place Ray puts one that aborts."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


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
