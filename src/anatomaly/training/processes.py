"""Training in several processes: who they are, what they are told, and that they end together.

They are plain interpreters and no `multiprocessing`: the user's script is not run again, and it works from a notebook.
This process only watches.  Each of the others (`rank`) gets its task as one line of JSON on its standard input, which
stays open: it ends when that closes, however this process ends.  What it tells comes back as lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import selectors
import sys
import threading
import time
from dataclasses import asdict
from io import FileIO
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from anatomaly import errors
from anatomaly.data.decoding import decoded_limit
from anatomaly.errors import AnatomalyError, ConfigError, NotReadyError, check
from anatomaly.methods import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from anatomaly.config import FitConfig
    from anatomaly.data.manifest import Manifest
    from anatomaly.training.loaders import Preparation

#: Ctrl-C reaches all processes of a terminal, from their first moment; this one ends the others.
_BOOT = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv[1]); "
    "from anatomaly.training import rank; rank.serve()"
)
#: All processes are on this machine, so nothing listens to another one.
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
#: Seconds in which the first cause of a failure may still be told, after another process has noticed it.
_GRACE = 3.0


def processes_of(config: FitConfig, device: str, own_teachers: bool) -> int:
    """How many processes train; 0 where it is this one.

    Args:
        config: All settings.
        device: "cpu" or "cuda".
        own_teachers: The teachers are objects of the caller, which no other process can build.

    Raises:
        ConfigError: There are fewer GPUs, the batch is not cut into equal parts, or the method cannot train like that.
    """
    settings, method = config.training, config.method.name
    gpus = _gpus() if device == "cuda" else 0
    devices = max(1, gpus) if settings.devices == "auto" else settings.devices
    expected = f"at most {gpus}, the GPUs that torch can use"
    check("training.devices", devices, device == "cpu" or devices <= gpus, expected)
    settings.check_parts(devices)
    if METHODS[method].learns_from == "lesions" and devices * settings.accumulate > 1:
        raise ConfigError(
            f"training: {method} compares the images of a batch with each other, so a batch stays whole. Leave out "
            "--training.devices and --training.accumulate."
        )
    if devices == 1 and settings.strategy == "auto":
        return 0
    if own_teachers:
        raise ConfigError(
            "training.devices: teachers given as objects exist in this process only. Train in one process, or name "
            "them in the settings."
        )
    return devices


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def train_in_processes(
    size: int,
    train: Manifest,
    held_out: Manifest,
    prepare: Preparation,
    folder: Path,
    config: FitConfig,
    on_progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Let `size` processes run `student.train_student` together; the best weights are in `folder` then.

    Returns:
        The best epoch and its figure.

    Raises:
        AnatomalyError: What the first process to fail raised; the others are ended.
        NotReadyError: A process was killed, or cannot be started.
        RuntimeError: A defect, with the process's own traceback.
    """
    import torch.distributed as dist

    # Where they meet, on a free port; it lives as long as this function runs.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    task = {
        "size": size,
        "port": store.port,
        "config": config.as_dict(),
        "train": [asdict(row) for row in train],
        "held_out": [asdict(row) for row in held_out],
        "source": train.source,
        "rules": {name: asdict(rule) for name, rule in prepare.rules.items()},
        "device": prepare.device,
        "folder": folder.absolute(),
        "decoded": decoded_limit(),
    }
    with _started(size) as processes:
        for rank, process in enumerate(processes):
            line = json.dumps({**task, "rank": rank}, default=str) + "\n"
            with contextlib.suppress(BrokenPipeError):  # it has died: that is told below
                _write(cast("FileIO", process.stdin), line.encode())
        return _Watch(processes, on_progress).best()


@contextlib.contextmanager
def _started(size: int) -> Iterator[list[Popen[bytes]]]:
    """The processes; none is left when this ends, whatever the reason."""
    options = ["-I", "-W", "ignore", "-X", f"utf8={sys.flags.utf8_mode}", *["-B"] * sys.dont_write_bytecode]
    command = [sys.executable, *options, "-c", _BOOT, json.dumps([str(folder) for folder in sys.path])]
    environment = {"GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _LOOPBACK, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    processes: list[Popen[bytes]] = []
    try:
        while len(processes) < size:
            piped, env = PIPE, {**environment, **os.environ}
            processes.append(Popen(command, bufsize=0, stdin=piped, stdout=piped, env=env))
        yield processes
    except OSError as err:
        if len(processes) == size:
            raise
        raise NotReadyError(f"training: process {len(processes) + 1} does not start ({err.strerror}).") from err
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                cast("FileIO", pipe).close()


def end_with_parent() -> None:
    """In one of the processes: end when standard input closes, for then the parent has gone, even killed."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write(pipe: FileIO, content: bytes) -> None:
    while content:
        content = content[pipe.write(content) :]


class _Failure(NamedTuple):
    """Why a process ended; the lower `order`, the nearer to the cause."""

    order: int
    error: Exception


class _Watch:
    """Passes on what the processes tell until all have ended, or one has failed."""

    def __init__(self, processes: list[Popen[bytes]], on_progress: Callable[[int, int, str], None]) -> None:
        self.processes = processes
        self.on_progress = on_progress
        self.found: dict[str, Any] = {}
        self.failures: dict[int, _Failure] = {}

    def best(self) -> dict[str, Any]:
        """What the first process tells in the end; raises the first cause where one fails."""
        given_up = math.inf
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                selector.register(cast("FileIO", process.stdout), selectors.EVENT_READ, (rank, bytearray()))
            while selector.get_map() and time.monotonic() < given_up:
                for key, _ in selector.select(timeout=_GRACE / 10):
                    rank, line = key.data
                    content = os.read(key.fd, 2**16)
                    if not content:
                        selector.unregister(key.fileobj)
                        self._ended(rank, self.processes[rank].wait())
                    *whole, rest = (bytes(line) + content).split(b"\n")
                    for each in whole:
                        self._told(rank, *json.loads(each))
                    line[:] = rest
                if self.failures:  # the others notice at once that one is gone, and fail too
                    wait = 0.0 if self._cause().order == 0 else _GRACE
                    given_up = min(given_up, time.monotonic() + wait)
        if self.failures:
            raise self._cause().error
        return self.found

    def _cause(self) -> _Failure:
        return min(self.failures.values(), key=lambda failure: failure.order)

    def _told(self, rank: int, kind: str, what: Any) -> None:
        if kind == "progress":
            self.on_progress(*what)
        elif kind == "log":
            logging.getLogger(what[0]).log(what[1], "%s", what[2])
        elif kind == "best":
            self.found = what
        elif issubclass(known := getattr(errors, kind, Exception), AnatomalyError):
            self.failures[rank] = _Failure(0, known(what))
        else:
            self.failures[rank] = _Failure(2, RuntimeError(f"training: process {rank + 1} failed.\n{what}"))

    def _ended(self, rank: int, code: int) -> None:
        if code == 0 or rank in self.failures:
            return
        name = f"process {rank + 1} of {len(self.processes)}"
        how = f"was killed (signal {-code}), probably for want of memory" if code < 0 else f"ended with code {code}"
        advice = "Run the same command again: it goes on after its last epoch, also with fewer --training.devices."
        self.failures[rank] = _Failure(1, NotReadyError(f"training: {name} {how}. {advice}"))
