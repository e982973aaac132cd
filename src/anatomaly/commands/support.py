"""anatomaly support check: do these images belong together?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from anatomaly.commands.arguments import load_detector, model_arguments, support_rows
from anatomaly.commands.console import fail, say
from anatomaly.commands.intensity import intensity_argument
from anatomaly.errors import ConfigError
from anatomaly.tables import Table

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from anatomaly.detector.screening import Screened
    from anatomaly.types import SupportBank


def check_arguments(parser: ArgumentParser) -> None:
    """Options of `support check`."""
    parser.add_argument("support", type=str, nargs="+", help="K normal images of one kind: files, folders, or a table.")
    model_arguments(parser)
    parser.add_argument("--shots", type=int | None, default=None, help="Take only so many of the images.")
    parser.add_argument("--task", type=str, default="task", help="Name of the kind of image.")
    intensity_argument(parser, "Rule where it differs from fit's")


def run_check(options: Namespace) -> int:
    """Run `support check`: 0 where all belong, 1 where one stands out."""
    from anatomaly.detector.screening import FEWEST, screen

    rows = support_rows(options.support, options.task, options.shots)
    if len(rows) < FEWEST:
        raise ConfigError(f"support: got {len(rows)} normal images, expected at least {FEWEST} to compare. Add some.")
    detector = load_detector(options)
    bank = detector.set_support(rows, task=options.task, intensity=options.intensity).ready()
    screened = screen(bank.normal_scores, bank.patients)
    order = sorted(range(len(rows)), key=lambda k: -screened[k].ratio)
    shares = [f"{share:.0%}" for share in bank.attention_shares] or [""] * len(rows)
    cells = [
        (bank.names[k], f"{one.score:.4g}", f"{one.ratio:.2f}", f"{one.p_value:.2g}", shares[k], remark_on(one))
        for k, one in ((k, screened[k]) for k in order)
    ]
    columns = ("support", "score", "times the others'", "p", "share of attention", "")
    patients = len(set(bank.patients))
    of = f" of {patients} patients" if patients < len(rows) else ""
    by = "those of other patients" if of else "the others"
    Table(f"{len(rows)} images{of}, each judged by {by}", columns, cells).print()
    if not screened[order[0]].odd:
        say("None stands out. A set that is wrong as a whole cannot be told from this.")
        return 0
    name = bank.names[order[0]]
    return fail(f"{name} stands out. Look at it; if it does not belong, take it away and check again.", code=1)


def warn_of_odd(bank: SupportBank) -> None:
    """Say on standard error which support stands out among the others, if one does."""
    from anatomaly.detector.screening import screen

    if bank.shots == 1:
        print("One support image: there is nothing to compare its score with. Give more.", file=sys.stderr)
    screened = screen(bank.normal_scores, bank.patients)
    odd = [(one.ratio, name) for name, one in zip(bank.names, screened, strict=False) if one.odd]
    if odd:
        ratio, name = max(odd)
        print(
            f"{name} stands out among the support images: its score is {ratio:.1f} times the others'. Look at it; "
            "anatomaly support check compares them all.",
            file=sys.stderr,
        )


def remark_on(one: Screened) -> str:
    """What a person should do about a support, or nothing."""
    return "look at it" if one.odd else "nearly the same as another" if one.twin else ""
