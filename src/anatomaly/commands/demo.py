"""anatomaly demo: the whole chain on built-in images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.commands.progress import progress

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def demo_arguments(parser: ArgumentParser) -> None:
    """Options of `demo`."""
    parser.add_argument("--out", type=str, default="demo", help="Folder for data, model and report.")
    parser.add_argument("--seed", type=int, default=0, help="Of the images, the training and the draws.")


def run_demo(options: Namespace) -> int:
    """Run `demo`."""
    from anatomaly.benchmark.demo import demo
    from anatomaly.evaluation.evaluation import table_of

    with progress("demo") as told:
        report, results = demo(Path(options.out), seed=options.seed, on_progress=told.at)
    table_of(results, title="A task nobody trained on").print()
    print(f"Report: {report}")
    return 0
