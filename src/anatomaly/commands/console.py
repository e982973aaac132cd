"""What commands say on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jsonargparse import ArgumentParser, Namespace


def fail(message: str, *, code: int = 2) -> int:
    """Print one line on standard error and return the exit code."""
    print(f"anatomaly: {' '.join(message.split())}", file=sys.stderr)
    return code


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


def print_table(title: str, results: Sequence[tuple[str, Any]]) -> None:
    """Print evaluations as `evaluation.evaluate.table_of` lays them out."""
    from rich.console import Console
    from rich.table import Table

    from anatomaly.evaluation.cells import table_of

    columns, rows, note = table_of(results)
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)
