"""anatomaly fit: make a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.commands.console import tell_left_out

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def fit_arguments(parser: ArgumentParser) -> None:
    """Options of `fit`."""
    from anatomaly.commands.settings import settings_arguments

    parser.add_argument("--data", type=str, required=True, help="Folder or manifest with normal training images.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the model; an unfinished run in it resumes.")
    parser.add_argument("--tasks", type=list[str] | None, default=None, help="Train on these tasks only.")
    settings_arguments(parser)


def run_fit(options: Namespace) -> int:
    """Run `fit`."""
    from anatomaly.commands.settings import fit_config
    from anatomaly.data.manifest import load_manifest
    from anatomaly.methods import METHODS

    config = fit_config(options)
    manifest = load_manifest(Path(options.data))
    tell_left_out(manifest)
    manifest = manifest if options.tasks is None else manifest.select(task=options.tasks)
    record, epochs = METHODS[config.method.name], config.training.epochs
    how = f"{epochs} epoch{'s' * (epochs != 1)}" if record.trained and epochs else "nothing is trained"
    teachers = [each.name for each in (config.teacher, config.global_teacher)[: record.teachers] if each.name != "none"]
    about = f"{record.summary[0].upper()}{record.summary[1:]}."
    print(f"{record.name} on {' and '.join(teachers)}, {how}. {about}", flush=True)

    from anatomaly.training.fit import fit  # takes seconds to load, so it comes after what may be wrong

    fit(manifest, options.out, config)
    print(f"model: {options.out}")
    return 0
