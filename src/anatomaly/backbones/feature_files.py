"""The feature cache's folder on disk: whole files, a budget, and no trust in what somebody else left there.

See `feature_cache` for what an entry is and how a file is called.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    #: One teacher's levels of one image, shallow to deep, each (h, w, C): the order in memory of teachers and students.
    Entry = Sequence[Tensor]
    #: Of the levels of an entry.
    Shapes = Sequence[tuple[int, ...]]

logger = logging.getLogger(__name__)

_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_PART = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.part")
_ENTRY_BYTES = 2**31  # no image has a larger one
_PART_SECONDS = 3600  # no write takes longer: a part older than this is what a killed process left
_RESCANS = 16  # look at the folder again after this share of its budget was written; other processes write too


class _Aged(NamedTuple):
    """A file of the folder: when it was last used, in ns, and its size."""

    used: int
    size: int
    path: Path


class Disk:
    """A bounded folder of entries, shared with other processes; see the module's docstring for the format.

    Only files that are older than this object are ever evicted, the least recently used one first.
    """

    def __init__(self, folder: Path, budget: float) -> None:
        self._folder = folder
        self._budget = budget
        self._started = int(time.time()) * 10**9  # whole seconds: some file systems keep no more
        self._writes = True
        self._used: int | None = None  # unknown before the first scan
        self._since_scan = 0
        self._old: deque[_Aged] = deque()

    def used(self) -> int:
        """Bytes in the folder at the last scan, and what was written since."""
        return self._scan() if self._used is None else self._used

    def read(self, name: str, shapes: Callable[[], Shapes]) -> Entry | None:
        """The entry, or None; a damaged file is removed.

        Args:
            name: Of the entry.
            shapes: Gives those of its levels, or none where they are not known; an entry of others is a damaged one.
        """
        path = self._path(name)
        try:
            facts = path.lstat()
            whole = stat.S_ISREG(facts.st_mode) and facts.st_size <= _ENTRY_BYTES  # a pipe waits, a device need not end
            content = path.read_bytes() if whole else b""  # not mapped: a mapped file that breaks off kills the process
        except OSError:
            return None
        expected = shapes() if content else ()
        try:
            entry = unpacked(content)
            if expected and [tuple(level.shape) for level in entry] != expected:
                raise ValueError("its levels have other shapes")
        except Exception as err:  # whatever the bytes of a damaged file lead to
            reason = (str(err).splitlines() or [type(err).__name__])[0][:120]
            logger.warning("%s: damaged (%s), its features are computed anew.", path, reason)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # a folder that can only be read is of use too
            self._touch(path)
        return entry

    def write(self, name: str, entry: Entry) -> bool:
        """Store an entry; False where it does not fit or the folder cannot be written, which is said once."""
        if not self._writes:
            return False
        path = self._path(name)
        part = path.with_name(f".{name}.{secrets.token_hex(8)}.part")
        try:
            content = packed(entry)
            if not self._make_room(len(content)):
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            self._touch(part)
            part.replace(path)
        except OSError as err:
            self._writes = False
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            reason = (err.strerror or type(err).__name__).lower()
            logger.warning("%s: features are no longer stored on disk: %s. The run goes on.", self._folder, reason)
            return False
        self._used = self.used() + len(content)
        self._since_scan += len(content)
        return True

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.safetensors"

    def _touch(self, path: Path) -> None:
        """Mark a file as used, by this process's clock: a file server's may differ and the system's may be set back."""
        now = max(time.time_ns(), self._started)
        os.utime(path, ns=(now, now))

    def _make_room(self, size: int) -> bool:
        """Evict old entries until `size` more bytes fit; False where they do not."""
        if self._used is None or self._since_scan * _RESCANS > self._budget:
            self._scan()
        if size > self._budget:
            return False
        while self.used() + size > self._budget:
            if not self._old:
                return False
            oldest = self._old.popleft()
            try:
                if oldest.path.stat().st_mtime_ns >= self._started:
                    continue  # used again since the scan
                oldest.path.unlink()
            except FileNotFoundError:  # another process was faster
                pass
            self._used = self.used() - oldest.size
        return True

    def _scan(self) -> int:
        """Add up the folder, sweep what killed processes left, and list what may be evicted."""
        files: list[_Aged] = []
        for file in self._files():
            if _PART.fullmatch(file.path.name) and file.used < self._started - _PART_SECONDS * 10**9:
                with contextlib.suppress(OSError):
                    file.path.unlink()
                    continue
            files.append(file)
        entries = (file for file in files if _ENTRY.fullmatch(file.path.name))
        self._old = deque(sorted(file for file in entries if file.used < self._started))
        self._since_scan = 0
        self._used = sum(file.size for file in files)
        return self._used

    def _files(self) -> Iterator[_Aged]:
        """The store's own files; everything else in the folder is left alone and not counted."""
        try:
            folders = [each.path for each in os.scandir(self._folder) if re.fullmatch("[0-9a-f]{2}", each.name)]
        except OSError:  # not there yet, or not readable: the write that follows says so
            return
        for folder in folders:
            with contextlib.suppress(OSError), os.scandir(folder) as files:
                for file in files:
                    if not (_ENTRY.fullmatch(file.name) or _PART.fullmatch(file.name)):
                        continue
                    with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                        facts = file.stat(follow_symlinks=False)
                        yield _Aged(facts.st_mtime_ns, facts.st_size, Path(file.path))


def packed(entry: Entry) -> bytes:
    """The bytes of a file."""
    levels = [level.cpu() for level in entry]
    tensors = {f"level_{i}": level for i, level in enumerate(levels)}
    return pack({**tensors, "checksum": torch.tensor(_checksum(levels))})


def unpacked(content: bytes) -> Entry:
    """The levels of a file.

    Raises:
        Exception: Of any kind; the content is not what `packed` made.
    """
    tensors = unpack(content)
    checksum = int(tensors.pop("checksum"))
    levels = [tensors[f"level_{i}"] for i in range(len(tensors))]
    if any(level.dtype != torch.float16 or level.ndim != 3 for level in levels) or _checksum(levels) != checksum:
        raise ValueError("its checksum differs")
    if not all(bool(torch.isfinite(level).all()) for level in levels):
        raise ValueError("it holds numbers that are not finite")
    return levels


def _checksum(levels: Iterable[Tensor]) -> int:
    """Sum of all bytes as 64-bit numbers: ten times as fast as CRC-32, and enough for lost blocks and flipped bits."""
    total = 0
    for level in levels:
        values = level.numpy().reshape(-1)
        whole = len(values) - len(values) % 4
        total += int(values[:whole].view(np.uint64).sum()) + int(values[whole:].view(np.uint16).sum())
    return total % (2**61 - 1)  # a prime, so that no flipped bit cancels out
