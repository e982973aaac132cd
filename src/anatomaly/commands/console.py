"""What commands say on a terminal."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jsonargparse import ArgumentParser, Namespace

    from anatomaly.data.manifest import Manifest


def fail(message: str, *, code: int = 2) -> int:
    """Print one line on standard error and return the exit code."""
    print(f"anatomaly: {' '.join(message.split())}", file=sys.stderr)
    return code


def say(message: str) -> None:
    """Print one line on standard output at once; a reader who went away ends nothing."""
    with contextlib.suppress(OSError):
        print(message, flush=True)


def tell_wait(message: str) -> None:
    """Say what is being waited for, to somebody who sits at a terminal; silence elsewhere, as of a progress bar."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(message, file=sys.stderr, flush=True)


def tell_left_out(*manifests: Manifest) -> None:
    """Say in one line for each what was left out of a folder, by reason; nothing where nothing was."""
    from anatomaly.data.listing import describe

    for manifest in manifests:
        if told := describe(manifest.left_out):
            say(f"{manifest.source}: {told}")


def never_fail_to_print() -> None:
    """Let names and signs that the terminal's encoding lacks be printed as escapes: no result is lost for that."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def instantiated(parser: ArgumentParser, options: Namespace) -> Namespace:
    """Parsed options with their groups as records; anomalib holds jsonargparse below 4.49, where this was renamed."""
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    found: Namespace = build(options)
    return found


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Let a polite kill (SIGTERM) end the work as Ctrl-C does: with a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # no other may listen to signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
