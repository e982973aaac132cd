"""How far long work has come: a bar on a terminal, a line every half minute elsewhere, nothing of short work."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

_EVERY = 30.0  # seconds between lines


class Progress:
    """Work of which so many parts are done.  Call it after every part, or say with `at` how far it is.

    Attributes:
        name: Of the command, such as "predict".
        unit: Of the parts, in the plural.
        total: Number of parts; 0 where it is not known yet.
        done: Parts that are done.
        doing: What is being worked on.
    """

    def __init__(self, name: str, show: Callable[[Progress], None], clock: Callable[[], float]) -> None:
        self.name, self._show, self._clock = name, show, clock
        self.unit, self.total, self.done, self.doing = "images", 0, 0, ""
        self._before, self._started = 0, clock()

    def begin(self, total: int, unit: str = "images", *, done: int = 0) -> None:
        """Start on other work, of which some may have been done before; the rate and the time left count from here."""
        self.total, self.unit, self.done, self._before, self._started = total, unit, done, done, self._clock()
        self._show(self)

    def at(self, done: int, total: int, unit: str = "images", doing: str = "") -> None:
        """Say how far it is; another total or unit is other work."""
        self.doing = doing
        if (total, unit) != (self.total, self.unit):
            self.begin(total, unit, done=done)
        else:
            self.done = done
            self._show(self)

    def __call__(self, *_: object) -> None:
        """Count one part more."""
        self.done += 1
        self._show(self)

    def __str__(self) -> str:
        """Such as "240 of 2,000 images, 14.1 images/s, 2 min left"."""
        if not self.total:
            return self.doing
        told = [f"{self.done:,} of {self.total:,} {self.unit}"]
        seconds, done = self._clock() - self._started, self.done - self._before
        if done > 0 and seconds > 0:
            told += [_rate(done / seconds, self.unit), f"{_duration((self.total - self.done) * seconds / done)} left"]
        return ", ".join([*told, self.doing] if self.doing else told)


@contextmanager
def progress(
    name: str,
    total: int = 0,
    unit: str = "images",
    *,
    clock: Callable[[], float] = time.monotonic,
    console: Console | None = None,
) -> Iterator[Progress]:
    """Show on standard error how far a command has come.

    Args:
        name: Of the command.
        total: Number of parts; 0 where `at` will say it.
        unit: Of the parts, in the plural.
        clock: Seconds, for tests.
        console: Where to show it; standard error by default.
    """
    from rich.console import Console

    screen = console or Console(stderr=True)
    with (_bar if screen.is_terminal else _lines)(name, screen, clock) as found:
        found.begin(total, unit)
        yield found


@contextmanager
def _lines(name: str, screen: Console, clock: Callable[[], float]) -> Iterator[Progress]:
    said = clock()

    def show(progress: Progress) -> None:
        nonlocal said
        if clock() - said >= _EVERY:
            said = clock()
            with contextlib.suppress(OSError):  # who reads it may have gone
                print(f"{name}: {progress}", file=screen.file, flush=True)

    yield Progress(name, show, clock)


@contextmanager
def _bar(name: str, screen: Console, clock: Callable[[], float]) -> Iterator[Progress]:
    from rich import progress as rich

    columns = (rich.TextColumn(name), rich.BarColumn(bar_width=20), rich.TextColumn("{task.fields[told]}"))
    piped = sys.stdout is None or not sys.stdout.isatty()  # then it gets its lines itself
    with rich.Progress(*columns, console=screen, transient=True, redirect_stdout=not piped) as bar, _logging():
        task = bar.add_task(name, total=None, told="")
        yield Progress(name, lambda p: bar.update(task, completed=p.done, total=p.total or None, told=str(p)), clock)


@contextmanager
def _logging() -> Iterator[None]:
    """Let what is logged go through the bar's own standard error, which puts lines above the bar."""
    handlers = [each for each in logging.getLogger().handlers if type(each) is logging.StreamHandler]
    before = [each.setStream(sys.stderr) for each in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:  # as it was already
                handler.setStream(stream)


def _rate(per_second: float, unit: str) -> str:
    """In the shortest time in which at least one part gets done."""
    seconds, word = 3600, "h"
    if per_second * 60 >= 1:
        seconds, word = (60, "min") if per_second < 1 else (1, "s")
    return f"{per_second * seconds:,.1f} {unit}/{word}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
