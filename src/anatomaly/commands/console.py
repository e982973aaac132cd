"""What commands say on a terminal."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def progress(total: int) -> Any:
    """A progress bar on a terminal, silence elsewhere; yields the function to call after every image."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def bar() -> Any:
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task("images", total=total)
            yield lambda _: progress.advance(task)

    return bar()
