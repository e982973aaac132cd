"""Files that are whole or absent: one way to write, to append rows, and to name content by its digest."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

from anatomaly.errors import OutputError


def write_whole(path: Path, content: bytes, *, kept: str = "") -> None:
    """Write a file completely or leave what was there.

    Args:
        path: The file; replaced if it exists.
        content: All of its bytes.
        kept: A sentence on what is safe, for the message of a failure.

    Raises:
        OutputError: The file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as err:
        with contextlib.suppress(OSError):  # the first failure is the one to report
            part.unlink(missing_ok=True)
        raise output_error(path, err, kept=kept) from err


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
