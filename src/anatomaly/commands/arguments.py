"""Options that several commands share, and their rules, written once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.commands.console import say, tell_left_out
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jsonargparse import ArgumentParser, Namespace

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
        help="auto: that of --bank, else fp32, on every machine; bf16 is faster where the processor can, else far slower.",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="Images per forward pass; changes no score.")


def load_detector(options: Namespace, folder: str | Path | None = None) -> Any:
    """The model in a folder, else in `--model`, else the built-in one, loaded as `loading_arguments` say."""
    from anatomaly.detector.bundle import BUILT_IN
    from anatomaly.detector.detector import Detector

    if options.batch_size < 1:
        raise ConfigError(f"batch_size: got {options.batch_size}, expected at least 1.")
    named = options.model if folder is None else folder
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
    """What `--precision` comes to; it depends on no machine, for scores, and what is calibrated on them, depend on it."""
    if options.precision != "auto":
        return options.precision
    from anatomaly.detector.bundle import load_bank

    bank = options.get("bank")
    return "fp32" if bank is None else load_bank(Path(bank)).precision or "fp32"


def support_arguments(parser: ArgumentParser) -> None:
    """What images are compared with, and how they are read."""
    from anatomaly.types import Intensity

    parser.add_argument("--support", type=str, help="Folder or manifest of K normal images of the same kind; not PDD.")
    parser.add_argument("--shots", type=int | None, default=None, help="Take only so many of the support images.")
    parser.add_argument("--bank", type=str, help="Saved support bank, instead of --support.")
    parser.add_argument("--save_bank", type=str, help="Save the support bank to this file.")
    parser.add_argument("--task", type=str, default="task", help="Name of the kind of image.")
    parser.add_argument("--intensity", type=Intensity | None, default=None, help="Rule where it differs from fit's.")


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


def support_rows(source: Path, task: str, shots: int | None) -> Any:
    """Normal rows of a folder or table: those of split train where it has any, never one that is labelled anomalous."""
    from anatomaly.data.manifest import load_manifest

    manifest = load_manifest(source, task=task)
    tell_left_out(manifest)
    rows = [row for row in manifest if row.label != 1]
    rows = [row for row in rows if row.split == "train"] or rows
    if shots is not None and not 1 <= shots <= len(rows):
        raise ConfigError(f"support: {source} has {len(rows)} normal images, {shots} shots asked. Change --shots.")
    return rows[:shots]


def image_rows(source: Path, task: str | None) -> Sequence[Sample]:
    """Rows of one image file, a folder or a table; what a folder holds besides images is told."""
    from anatomaly.data.layouts import samples_of
    from anatomaly.data.manifest import is_table, load_manifest

    if os.path.isfile(source) and not is_table(source):  # noqa: PTH113 False where pathlib raises
        return samples_of(source, task=task or "task")
    manifest = load_manifest(source, task=task)
    tell_left_out(manifest)
    return manifest.samples
