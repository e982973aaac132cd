"""anatomaly support check: do these images belong together?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.commands.arguments import load_detector, model_arguments, support_rows
from anatomaly.commands.console import fail, say
from anatomaly.errors import ConfigError
from anatomaly.tables import Table

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from anatomaly.detector.screening import Screened


def check_arguments(parser: ArgumentParser) -> None:
    """Options of `support check`."""
    from anatomaly.types import Intensity

    parser.add_argument("support", type=str, help="Folder or manifest of K normal images of one kind.")
    model_arguments(parser)
    parser.add_argument("--shots", type=int | None, default=None, help="Take only so many of the images.")
    parser.add_argument("--task", type=str, default="task", help="Name of the kind of image.")
    parser.add_argument("--intensity", type=Intensity | None, default=None, help="Rule where it differs from fit's.")


def run_check(options: Namespace) -> int:
    """Run `support check`: 0 where all belong, 1 where one stands out."""
    from anatomaly.detector.screening import screen

    rows = support_rows(Path(options.support), options.task, options.shots)
    if len(rows) < 3:
        raise ConfigError(f"support: {options.support} has {len(rows)} normal images, expected at least 3 to compare.")
    detector = load_detector(options)
    bank = detector.set_support(rows, task=options.task, intensity=options.intensity).ready()
    screened = screen(bank.normal_scores)
    order = sorted(range(len(rows)), key=lambda k: -screened[k].ratio)
    cells = [
        (bank.names[k], f"{one.score:.4g}", f"{one.ratio:.2f}", f"{one.p_value:.2g}", remark_on(one))
        for k, one in ((k, screened[k]) for k in order)
    ]
    columns = ("support", "score", "times the others'", "p", "")
    Table(f"{len(rows)} images, each judged by the others", columns, cells).print()
    odd = [bank.names[k] for k in order if screened[k].odd]
    if not odd:
        say("None stands out. A set that is wrong as a whole cannot be told from this.")
        return 0
    return fail(f"{odd[0]} stands out. Look at it; if it does not belong, take it away and check again.", code=1)


def remark_on(one: Screened) -> str:
    """What a person should do about a support, or nothing."""
    return "look at it" if one.odd else "nearly the same as another" if one.twin else ""
