"""Options that several commands share, and their rules, written once."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.commands.console import say, tell_left_out, tell_wait
from anatomaly.commands.intensity import intensity_argument
from anatomaly.errors import ConfigError, NotReadyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jsonargparse import ArgumentParser, Namespace

    from anatomaly.data.manifest import Manifest
    from anatomaly.types import Sample


def model_arguments(parser: ArgumentParser) -> None:
    """Options of every command that takes a model."""
    parser.add_argument("--model", type=str | None, help="Folder made by fit or import. Without: the built-in model.")
    loading_arguments(parser)


def loading_arguments(parser: ArgumentParser) -> None:
    """How a model is loaded and run, whatever names its folder."""
    from typing import Literal

    parser.add_argument("--teacher.weights", type=str | None, help="Take the teacher's weights from this file.")
    parser.add_argument("--global_teacher.weights", type=str | None, help="Likewise the second teacher's.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    parser.add_argument(
        "--precision",
        type=Literal["auto", "fp32", "bf16"],
        default="auto",
        help="auto: that of --bank, else fp32, on any machine; bf16 is faster where the processor has it, else slower.",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="Images per forward pass; changes no score.")


def load_detector(options: Namespace, folder: str | Path | None = None) -> Any:
    """The model in a folder, else in `--model`, else the built-in one, loaded as `loading_arguments` say."""
    if options.batch_size < 1:
        raise ConfigError(f"batch_size: got {options.batch_size}, expected at least 1.")
    named = options.model if folder is None else folder
    tell_wait(f"Loading {named or 'the built-in model'}; this takes some seconds.")
    from anatomaly.detector.bundle import BUILT_IN
    from anatomaly.detector.detector import Detector

    detector = Detector.load(
        named or BUILT_IN,
        device=options.device,
        precision=_precision(options),
        teacher_weights=options.teacher.weights,
        global_teacher_weights=options.global_teacher.weights,
    )
    if named is None:
        teachers = " and ".join(each.name for each in detector.facts.teachers)
        say(f"Built-in model: {detector.facts.name} on {teachers}, which learned from no medical image.")
    return detector


def _precision(options: Namespace) -> Any:
    """What `--precision` comes to, the same on every machine: scores and calibrations depend on it."""
    if options.precision != "auto":
        return options.precision
    from anatomaly.detector.bank_file import load_bank

    if options.get("bank") is not None:
        with suppress(NotReadyError):  # told where the bank is used, if the model takes one
            return load_bank(Path(options.bank)).precision or "fp32"
    return "fp32"


def support_arguments(parser: ArgumentParser) -> None:
    """What images are compared with, and how they are read."""
    parser.add_argument(
        "--support", type=str, nargs="+", help="K normal images of the same kind: files, folders, or a table; not PDD."
    )
    parser.add_argument("--shots", type=int | None, default=None, help="Take only so many of the support images.")
    parser.add_argument("--bank", type=str, help="Saved support bank, instead of --support.")
    parser.add_argument("--save_bank", type=str, help="Save the support bank to this file.")
    parser.add_argument("--task", type=str, default="task", help="Name of the kind of image.")
    intensity_argument(parser, "Rule where it differs from fit's")


def check_support_options(options: Namespace, verb: str) -> None:
    """Refuse options of `support_arguments` that contradict each other, before anything is loaded.

    Raises:
        ConfigError: Both a support and a bank are given, or options that a bank has of its own.
    """
    from anatomaly.config import check_intensity

    if options.support is not None and options.bank is not None:
        raise ConfigError(f"{verb}: give either --support (normal images) or --bank (a saved bank), not both.")
    if options.bank is not None and (options.shots is not None or options.intensity is not None):
        raise ConfigError(f"{verb}: --bank has its own shots and intensity rule. Leave out --shots and --intensity.")
    if options.intensity is not None:
        check_intensity(options.intensity, "intensity")


def check_takes_support(options: Namespace, verb: str, detector: Any) -> None:
    """Refuse options of a support where the model compares with none.

    Raises:
        ConfigError: There are such options.
    """
    given = (options.support, options.bank, options.shots, options.save_bank)
    if not detector.method.needs_support and any(option is not None for option in given):
        raise ConfigError(
            f"{verb}: {detector.facts.name} learned what is normal in training and compares with no support images. "
            "Leave out --support, --bank, --shots and --save_bank."
        )


def manifest_of(sources: Sequence[str], task: str | None) -> Manifest:
    """The rows of image files and folders, or of one table; what folders hold besides images is told.

    Args:
        sources: Paths, at least one; an image that several of them name counts once.
        task: Name of the task where the source does not name it.

    Raises:
        ConfigError: A table is given together with other paths.
        ManifestError: A path is not there, or holds no images.
    """
    from anatomaly.data.layouts import samples_of
    from anatomaly.data.manifest import Manifest, is_table, load_manifest

    rows: dict[tuple[str, int | None], Sample] = {}
    for source in map(Path, sources):
        if os.path.isfile(source) and not is_table(source):  # noqa: PTH113 False where pathlib raises
            found: Sequence[Sample] = samples_of(source, task=task or "task")
        else:
            if len(sources) > 1 and is_table(source):
                raise ConfigError(f"{source}: got a table and other paths, expected it alone. Give one or the other.")
            manifest = load_manifest(source, task=task)
            tell_left_out(manifest)
            found = manifest.samples
        if len(sources) == 1:
            return Manifest(tuple(found), source)
        for row in found:
            rows.setdefault((os.path.realpath(row.path), row.frame), row)
    return Manifest(tuple(rows.values()), Path(os.path.commonpath(map(os.path.abspath, sources))))


def support_rows(sources: Sequence[str], task: str, shots: int | None) -> Any:
    """Normal rows of files, folders or a table: of split train where it has any, never one labelled anomalous."""
    manifest = manifest_of(sources, task)
    rows = [row for row in manifest if row.label != 1]
    rows = [row for row in rows if row.split == "train"] or rows
    if shots is not None and not 1 <= shots <= len(rows):
        where = sources[0] if len(sources) == 1 else "what is given"
        raise ConfigError(f"support: {where} has {len(rows)} normal images, {shots} shots asked. Change --shots.")
    return rows[:shots]
