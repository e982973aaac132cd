"""anatomaly fit: make a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.commands.console import tell_left_out
from anatomaly.commands.progress import progress

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from anatomaly.data.manifest import Manifest


def fit_arguments(parser: ArgumentParser) -> None:
    """Options of `fit`."""
    from anatomaly.commands.settings import settings_arguments

    parser.add_argument(
        "--data",
        type=str,
        required=True,
        help="Folder of normal images, of folders of them (a task each), or manifest.",
    )
    parser.add_argument(
        "--task", type=str | None, default=None, help="Name of the kind of image; default the folder's."
    )
    parser.add_argument("--out", type=str, required=True, help="Folder of the model; an unfinished run in it resumes.")
    parser.add_argument("--tasks", type=list[str] | None, default=None, help="Train on these tasks only.")
    settings_arguments(parser)


def run_fit(options: Namespace) -> int:
    """Run `fit`."""
    from anatomaly.commands.settings import fit_config
    from anatomaly.data.manifest import load_manifest
    from anatomaly.methods import METHODS

    config = fit_config(options)
    manifest = load_manifest(Path(options.data), task=options.task, normal=True)
    tell_left_out(manifest)
    manifest = manifest if options.tasks is None else manifest.select(task=options.tasks)
    record, epochs = METHODS[config.method.name], config.training.epochs
    normals = Counter(row.task for row in manifest if row.split == "train" and row.label != 1)
    print(
        f"normal images: {', '.join(f'{task} {count}' for task, count in sorted(normals.items())) or 'none'}",
        flush=True,
    )
    if record.learns_from == "episodes" and record.trained and len(normals) == 1:
        manifest = _with_drawn(manifest, Path(options.out))
    how = f"{epochs} epoch{'s' * (epochs != 1)}" if record.trained and epochs else "nothing is trained"
    teachers = [each.name for each in (config.teacher, config.global_teacher)[: record.teachers] if each.name != "none"]
    about = f"{record.summary[0].upper()}{record.summary[1:]}."
    print(f"{record.name} on {' and '.join(teachers)}, {how}. {about}", flush=True)

    from anatomaly.training.fit import fit  # takes seconds to load, so it comes after what may be wrong

    with progress("fit") as told:
        fit(manifest, options.out, config, on_progress=told.at)
    print(f"model: {options.out}")
    return 0


#: Drawn normal images of each built-in task that join a task that is alone.
_DRAWN = 50


def _with_drawn(manifest: Manifest, out: Path) -> Manifest:
    """One task with built-in ones beside it: what a method learns to do on any task cannot be learned on one."""
    from anatomaly.data.manifest import load_manifest
    from anatomaly.synthetic.phantom import TASKS, write_benchmark

    drawn = load_manifest(write_benchmark(out / "drawn", train=_DRAWN, test_normal=0, test_anomalous=0))
    print(f"One kind of image is too few to learn from: {_DRAWN} drawn ones of {len(TASKS)} kinds join it.", flush=True)
    return replace(manifest, samples=(*manifest, *drawn))
