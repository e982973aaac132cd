"""Files that are whole or absent: one way to write, to append rows, to read JSON, and to name content by its digest."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anatomaly.errors import OutputError


def write_whole(path: Path, content: bytes | str, *, kept: str = "") -> None:
    """Write a file completely or leave what was there.

    Args:
        path: The file; replaced if it exists.
        content: All of its bytes, or its text; what cannot be written as UTF-8 stays visible as escapes.
        kept: A sentence on what is safe, for the message of a failure.

    Raises:
        OutputError: The file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        part.replace(path)
    except BaseException as err:  # Ctrl-C too
        with contextlib.suppress(OSError):  # the first failure is the one to report
            part.unlink(missing_ok=True)
        if isinstance(err, OSError):
            raise output_error(path, err, kept=kept) from err
        raise


class Appender:
    """Files that grow together: what `append` was given is on disk when it returns, or nothing of it.

    Attributes:
        paths: The files.
    """

    def __init__(self, paths: Sequence[Path], *, keep: Sequence[int] | None = None) -> None:
        """Make the files, and their folders where missing, or go on with those that are there.

        Args:
            paths: At least one; should the machine die within an `append`, the first ones are the fuller record.
            keep: Bytes of each file to go on after; what follows them is cut off.  None where none may be there.

        Raises:
            OutputError: One of them exists already or cannot be made.
        """
        self.paths = tuple(paths)
        self._files = [self._new(path) for path in paths] if keep is None else []
        for path, size in zip(paths, keep or (), strict=keep is not None):
            self._files.append(self._there(path, size))

    @staticmethod
    def _new(path: Path) -> io.FileIO:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return io.FileIO(path, "xb")  # unbuffered: one write call per `append`
        except OSError as err:
            if path.exists():
                raise OutputError(f"{path}: already exists. Choose another output folder, or remove this one.") from err
            raise output_error(path, err) from err

    @staticmethod
    def _there(path: Path, size: int) -> io.FileIO:
        try:
            file = io.FileIO(path, "ab")
            file.truncate(size)
            file.seek(0, os.SEEK_END)
        except OSError as err:
            raise output_error(path, err) from err
        return file

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def append(self, *contents: bytes, kept: str = "") -> None:
        """Append to every file, or to none of them.

        Args:
            contents: One per file.
            kept: A sentence on what is safe, for the message of a failure.

        Raises:
            OutputError: A file cannot be written.
        """
        ends, path = [file.tell() for file in self._files], self.paths[0]
        try:
            for file, path, content in zip(self._files, self.paths, contents, strict=True):  # noqa: B007
                if file.write(content) < len(content):  # a full disk takes the part that still fits
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException as err:  # Ctrl-C too
            for file, end in zip(self._files, ends, strict=True):
                file.seek(end)
                file.truncate()
            if isinstance(err, OSError):
                raise output_error(path, err, kept=kept) from err
            raise


def require_file(path: Path) -> int:
    """Size in bytes of a regular file, or of what a link leads to.

    Pipes, sockets and devices are never opened: a pipe waits for ever and a device need not end.

    Raises:
        OSError: There is no such file (FileNotFoundError), or it is no regular one.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a pipe, a socket or a device"
        raise OSError(errno.EINVAL, f"is {kind}, expected a file", str(path))
    return facts.st_size


#: Of JSON that is read: the largest file in bytes, the deepest nesting and the largest whole number.
_LARGEST, _DEEPEST, _HIGHEST = 2**28, 64, 2**63


def read_json(path: Path, *, finite: bool = True) -> Any:
    """What a JSON file holds.

    Args:
        path: A regular file of at most 256 MiB, UTF-8, with or without a byte order mark.
        finite: Refuse NaN and infinity, which Python writes and JSON does not know.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is too large, or as `parse_json`.
    """
    if (size := require_file(path)) > _LARGEST:
        raise ValueError(f"{size} bytes are too many")
    return parse_json(path.read_bytes().decode("utf-8-sig"), finite=finite)


def parse_json(text: str, *, finite: bool = True) -> Any:
    """What a JSON text says, whatever somebody wrote into it.

    Args:
        text: The JSON.
        finite: As in `read_json`.

    Raises:
        ValueError: It is not JSON, nested more than 64 deep, or holds a number no setting or count can be.

    Example:
        >>> parse_json('{"size": [64, 96]}')
        {'size': [64, 96]}
    """

    def whole(digits: str) -> int:
        if abs(number := int(digits)) >= _HIGHEST:
            raise ValueError("a whole number of more than 63 bits")
        return number

    def decimal(digits: str) -> float:
        number = float(digits)
        if finite and not math.isfinite(number):
            raise ValueError(f"{digits[:20]} is no finite number")
        return number

    try:
        found = json.loads(text, parse_int=whole, parse_float=decimal, parse_constant=decimal)
    except RecursionError as err:
        raise ValueError("nested too deep") from err
    level = [found]
    for _ in range(_DEEPEST):
        level = [child for each in level if isinstance(each, (dict, list)) for child in _children(each)]
        if not level:
            return found
    raise ValueError("nested too deep")


def _children(node: dict[str, Any] | list[Any]) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hex; no more than 1 MiB of it is in memory at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def output_error(path: Path, err: OSError, *, kept: str = "") -> OutputError:
    """One line for a failed write: which file, why, what to do.

    Args:
        path: The file or folder.
        err: What the operating system said.
        kept: A sentence on what is safe.
    """
    full = err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "Free some space or choose another output folder." if full else "Choose an output folder you can write to."
    reason = (err.strerror or type(err).__name__).lower()
    return OutputError(" ".join(part for part in (f"{path}: cannot be written: {reason}.", kept, advice) if part))
