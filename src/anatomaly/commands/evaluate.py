"""anatomaly evaluate: how good a model is on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.commands.arguments import load_detector, model_arguments
from anatomaly.commands.console import say, tell_left_out
from anatomaly.commands.intensity import intensity_argument
from anatomaly.commands.progress import progress

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def evaluate_arguments(parser: ArgumentParser) -> None:
    """Options of `evaluate`."""
    model_arguments(parser)
    parser.add_argument("--data", type=str, required=True, help="Folder or manifest: normals in train, a test split.")
    parser.add_argument("--tasks", type=list[str] | None, default=None, help="Tasks to test; default all in the data.")
    parser.add_argument("--shots", type=list[int] | int, default=[2, 4, 8], help="Values of K; not PDD.")
    parser.add_argument("--draws", type=int, default=5, help="Support draws per K.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draws.")
    intensity_argument(parser, "Rule where it differs from fit's")
    parser.add_argument("--out", type=str, help="Folder for evaluation.json, draws.csv and test_scores.csv.")


def run_evaluate(options: Namespace) -> int:
    """Run `evaluate`."""
    from anatomaly.config import check_intensity
    from anatomaly.data.manifest import load_manifest
    from anatomaly.evaluation.cells import write_evaluations
    from anatomaly.evaluation.evaluate import evaluate
    from anatomaly.evaluation.evaluation import pooled, table_of, tell_unreadable

    if options.intensity is not None:
        check_intensity(options.intensity, "intensity")
    manifest = load_manifest(Path(options.data))
    tell_left_out(manifest)
    detector = load_detector(options)
    results, tasks = [], list(options.tasks or manifest.tasks)
    if options.intensity is not None:
        detector.task_intensity = dict.fromkeys(tasks, options.intensity)
    with progress("evaluate", sum(row.task in tasks and row.split == "test" for row in manifest)) as advance:
        for task in tasks:
            results += evaluate(
                detector,
                manifest,
                task=task,
                shots=[options.shots] if isinstance(options.shots, int) else options.shots,
                draws=options.draws,
                seed=options.seed,
                batch_size=options.batch_size,
                on_progress=advance,
            )
    model = options.model or "built-in model"
    title = f"{model}: {options.draws} support draw{'s' * (options.draws > 1)}"
    if not detector.method.needs_support:
        title = model
        results += [pooled(results)] if len(results) > 1 else []
    if options.out is not None:
        write_evaluations(results, Path(options.out))
    table_of([("", result) for result in results], title=title).print()
    if told := tell_unreadable(results):
        say(told)
    return 0
