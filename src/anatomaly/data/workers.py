"""Native decoders run in processes of their own, so that one that dies costs the file in hand and nothing else.

`ask` sends a request to a worker and returns its answer.  Workers are started when they are needed, kept for later
calls, replaced when they die, and end with this process, however it ends: they read requests from a pipe that closes.
They are plain interpreters and no `multiprocessing`: the user's script is not imported again, nothing is pickled, and
daemonic processes may have workers too.  A message is its length and JSON; pixels follow as they lie in memory.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from anatomaly import errors
from anatomaly.errors import NotReadyError, ReadError

#: Seconds after which a file is given up, unless `limit_time` says otherwise; the largest volumes take about ten.
TIME_LIMIT = 120
#: Workers at most; they are started one by one, as files wait for them.
WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

_ATTEMPTS = 2
_CORRUPT = "It is corrupt: export it again"
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from anatomaly.data import readers, workers; workers.serve(readers.answer)"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Request = Mapping[str, Any]
Answer = tuple[dict[str, Any], "NDArray[np.float32] | None"]


def ask(request: Request) -> Answer:
    """Let a worker answer a request about one file.

    Args:
        request: For `readers.answer`; "path" names the file, "memory" the bytes that reading it may take.  Requests
            about one file go to one worker after the other: it may have kept a volume unpacked.

    Returns:
        The answer, and the pixels that belong to it.

    Raises:
        AnatomalyError: What the worker raised, or a ReadError if it died of the file twice or took too long.
        NotReadyError: No worker can be started.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        with _pool.worker_for(request["path"]) as worker:
            try:
                answer, pixels = worker.ask({**request, "seconds": TIME_LIMIT})
            except _DiedError as err:
                if attempt == _ATTEMPTS or err.final:
                    raise ReadError(f"cannot be decoded ({err}). {err.advice}, or leave it out.") from err
                continue
        raise_error_of(answer)
        return answer, pixels
    raise AssertionError


def limit_time(seconds: int) -> None:
    """Set after how many seconds, at least 1, a file is given up from now on."""
    global TIME_LIMIT
    TIME_LIMIT = max(1, seconds)


def raise_error_of(answer: Mapping[str, Any]) -> None:
    """Raise the `AnatomalyError` that an answer names, if it names one."""
    if "error" in answer:
        raise cast("type[errors.AnatomalyError]", getattr(errors, answer["error"]))(answer["message"])


def serve(answer: Callable[[Request], Answer]) -> None:
    """Be a worker: answer requests until their pipe closes."""
    with FileIO(os.dup(0)) as requests, FileIO(os.dup(1), "w") as answers:
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # decoders print
            os.dup2(quiet, stream)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _limit("RLIMIT_CORE", 0)
        taken = _address_space()
        _send(answers, {"ready": True})
        while (request := _receive(requests)) is not None:
            if taken:
                _limit("RLIMIT_AS", taken + request["memory"])
            _alarm(request["seconds"])
            found, pixels = answer(request)
            _alarm(0)
            if pixels is None:
                _send(answers, found)
            else:
                _send(answers, {**found, "shape": pixels.shape})
                _send_all(answers, pixels.data.cast("B"))


class _DiedError(Exception):
    """A worker ended before it answered; `final` if it makes no sense to ask again, `advice` to the user."""

    def __init__(self, code: int) -> None:
        self.final = code == -getattr(signal, "SIGALRM", 0)
        killed = code == -getattr(signal, "SIGKILL", 0)
        self.advice = "It is corrupt or needs more memory than there is: export it again" if killed else _CORRUPT
        reason = f"died, signal {-code}" if code < 0 else f"ended, exit code {code}"
        super().__init__(f"it took more than {TIME_LIMIT} s" if self.final else f"the decoder {reason}")


class _Worker:
    """One process and the pipes to and from it; used by one thread at a time."""

    def __init__(self) -> None:
        self.path = ""
        self.busy = True
        # The way to the interpreter may be closed to a process that was started by somebody else; itself never is.
        closed = os.path.lexists(sys.executable) and not os.access(sys.executable, os.X_OK)
        options = ["-I", "-X", f"utf8={sys.flags.utf8_mode}", *(["-B"] if sys.dont_write_bytecode else [])]
        try:
            self.process = subprocess.Popen(
                [sys.executable, *options, "-c", _BOOT, json.dumps([str(folder) for folder in sys.path])],
                executable="/proc/self/exe" if closed else None,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
            )
        except OSError as err:
            raise NotReadyError(
                f"cannot be read: the process that decodes does not start ({err.strerror}). End other programs."
            ) from err
        self.requests = cast("FileIO", self.process.stdin)
        self.answers = cast("FileIO", self.process.stdout)
        self.ready = False

    def ask(self, request: Request) -> Answer:
        try:
            if not self.ready:
                self._receive()
                self.ready = True
            _send(self.requests, request)
            answer = self._receive()
            if "shape" not in answer:
                return answer, None
            pixels = np.empty(answer["shape"], np.float32)
            if not _fill(self.answers, pixels.data.cast("B")):
                raise EOFError
        except (OSError, EOFError, ValueError) as err:
            code = self.end()
            if not self.ready and code >= 0:
                raise NotReadyError(
                    f"cannot be read: the process that decodes does not start (exit code {code}). "
                    "Try: python -I -c 'import anatomaly.data.readers'"
                ) from err
            raise _DiedError(code) from err
        except BaseException:
            self.end()
            raise
        return answer, pixels

    def _receive(self) -> dict[str, Any]:
        answer = _receive(self.answers)
        if answer is None:
            raise EOFError
        return answer

    def end(self) -> int:
        """Close the pipes, see to it that the process ends, and return its exit code."""
        self.forget()
        try:
            return self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def forget(self) -> None:
        for pipe in (self.requests, self.answers):
            with contextlib.suppress(OSError):
                pipe.close()


class _Pool:
    """The workers of this process."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def worker_for(self, path: str) -> Iterator[_Worker]:
        with self.changed:
            while (worker := self._free(path)) is None:
                self.changed.wait()
            worker.busy, worker.path = True, path
        try:
            yield worker
        finally:
            with self.changed:
                worker.busy = False
                self.workers.remove(worker)
                if not worker.requests.closed:
                    self.workers.append(worker)  # last, which is taken first: others give back what they kept
                self.changed.notify_all()

    def _free(self, path: str) -> _Worker | None:
        """A worker that may be asked about `path` now: the one that had it last, else an idle one, else a new one."""
        self.workers = [worker for worker in self.workers if worker.busy or worker.process.poll() is None]
        for worker in self.workers:
            if worker.path == path:
                return None if worker.busy else worker
        for worker in reversed(self.workers):
            if not worker.busy:
                return worker
        if len(self.workers) >= WORKERS:
            return None
        self.workers.append(_Worker())
        return self.workers[-1]

    def end(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.end()

    def forget(self) -> None:
        """In a forked process: leave the workers to the parent, which they end with."""
        for worker in self.workers:
            worker.forget()
        self.__init__()  # type: ignore[misc]


def _send(pipe: FileIO, message: Request) -> None:
    content = json.dumps(message).encode()
    _send_all(pipe, memoryview(len(content).to_bytes(4, "little") + content))


def _send_all(pipe: FileIO, content: memoryview) -> None:
    while content:
        content = content[pipe.write(content) :]


def _receive(pipe: FileIO) -> dict[str, Any] | None:
    """The next message, or None where the pipe is closed."""
    length = bytearray(4)
    if not _fill(pipe, memoryview(length)):
        return None
    content = bytearray(int.from_bytes(length, "little"))
    if not _fill(pipe, memoryview(content)):
        return None
    message: dict[str, Any] = json.loads(content)
    return message


def _fill(pipe: FileIO, content: memoryview) -> bool:
    """Fill `content` from the pipe; False where the pipe is closed before."""
    while content:
        read = pipe.readinto(content)
        if not read:
            return False
        content = content[read:]
    return True


def _alarm(seconds: int) -> None:
    """End this process after so many seconds, whatever native code is doing then; 0 calls that off."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def _address_space() -> int:
    """Bytes of address space this process has, 0 where that cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _limit(name: str, value: int) -> None:
    """Set a soft limit of this process, where the system has it and allows it."""
    try:
        import resource

        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    except (ImportError, OSError, ValueError):
        return


_pool = _Pool()
atexit.register(_pool.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.forget)
