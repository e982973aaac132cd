"""anatomaly audit: the same maps under the sound and the published evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.commands.arguments import load_detector, loading_arguments
from anatomaly.commands.console import say
from anatomaly.commands.progress import progress
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def audit_arguments(parser: ArgumentParser) -> None:
    """Options of `audit`."""
    from typing import Literal

    parser.add_argument(
        "source", type=str, help="Model folder, or a table of scores (CSV) or folder with table and maps."
    )
    parser.add_argument("data", type=str, help="Folder or manifest: normals in train, a test split with labels.")
    parser.add_argument("--task", type=str, help="Task to test; may be left out where the data have one.")
    parser.add_argument("--out", type=str, required=True, help="Folder for audit.md, .json, .csv and .png.")
    parser.add_argument("--shots", type=int | None, default=None, help="K, default 4; not PDD.")
    parser.add_argument("--draws", type=int, default=20, help="Support draws of a model.")
    parser.add_argument("--seed", type=int, default=0, help="Of draws and orders.")
    parser.add_argument("--blur", type=float | None, default=None, help="Maps: sigma they need; 0 if blurred already.")
    parser.add_argument("--pooling", type=Literal["max", "mean"] | None, default=None, help="Maps: from map to score.")
    parser.add_argument("--size", type=tuple[int, int] | None, default=None, help="Maps: resample to this size.")
    loading_arguments(parser)


def run_audit(options: Namespace) -> int:
    """Run `audit`."""
    from anatomaly.data.manifest import load_manifest

    if options.batch_size < 1 or options.seed < 0:
        raise ConfigError(f"audit: batch_size {options.batch_size}, seed {options.seed}; expected at least 1 and 0.")
    if options.size is not None and not 1 <= min(options.size) <= max(options.size) <= 8192:
        raise ConfigError(f"audit: size is {options.size}, expected height and width from 1 to 8192.")
    source = Path(options.source)
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder, expected a model, or a table of scores with its maps.")
    manifest = load_manifest(Path(options.data))
    if options.task is None and len(manifest.tasks) > 1:
        raise ConfigError(f"audit: the data have tasks {', '.join(manifest.tasks)}. Choose one with --task.")
    task = manifest.tasks[0] if options.task is None else options.task

    from anatomaly.audit.files import is_table
    from anatomaly.audit.measure import measure
    from anatomaly.audit.words import write_audit

    runs = _of_files(options, manifest, task) if is_table(source) else _of_model(options, manifest, task)
    audit = measure(runs, seed=options.seed)
    write_audit(audit, Path(options.out))
    _print(audit)
    print(f"Explanation: {Path(options.out) / 'audit.md'}")
    return 0


def _of_files(options: Namespace, manifest: Any, task: str) -> Any:
    from anatomaly.audit.files import run_files

    with progress("audit", len(manifest.select(task=task, split="test"))) as advance:
        return run_files(
            Path(options.source),
            manifest,
            task=task,
            shots=options.shots,
            blur=options.blur,
            pooling=options.pooling or "max",
            size=options.size,
            seed=options.seed,
            on_image=advance,
        )


def _of_model(options: Namespace, manifest: Any, task: str) -> Any:
    from anatomaly.audit.model import passes, run_model

    if (options.blur, options.pooling, options.size) != (None, None, None):
        raise ConfigError("audit: a model has its own blur, pooling and size. Leave out --blur, --pooling and --size.")
    bundle = Path(options.source)
    detector = load_detector(options, bundle)
    with progress("audit", passes(bundle) * len(manifest.select(task=task, split="test"))) as advance:
        return run_model(
            detector,
            bundle,
            manifest,
            task=task,
            shots=4 if options.shots is None else options.shots,
            draws=options.draws,
            seed=options.seed,
            batch_size=options.batch_size,
            on_image=advance,
        )


def _print(audit: Any) -> None:
    from rich.console import Console

    from anatomaly.audit.words import paragraphs, table_of, tell_unreadable

    table_of(audit).print()
    if told := tell_unreadable(audit):
        say(told)
    console = Console() if Console().is_terminal else Console(width=200)
    for paragraph in paragraphs(audit):
        console.print(f"- {paragraph.replace('**', '').replace('`', '')}", markup=False, highlight=False)
