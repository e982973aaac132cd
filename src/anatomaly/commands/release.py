"""anatomaly import NAME: checkpoints of official releases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anatomaly.methods import METHODS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def released() -> list[str]:
    """The methods whose official checkpoints can be read."""
    return [name for name in METHODS.built_in if METHODS[name].release]


def release_arguments(parser: ArgumentParser, name: str) -> None:
    """Options of `import NAME`."""
    parser.add_argument("file", type=str, help="Checkpoint as the release saves it.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the model.")
    parser.add_argument(
        "--teacher.weights", type=str, default="auto", help="Of the release's teacher: auto, or a file."
    )
    if METHODS[name].teachers > 1:
        parser.add_argument("--global_teacher.weights", type=str, default="auto", help="Of its second one: likewise.")


def run_release(options: Namespace, name: str) -> int:
    """Read an official checkpoint."""
    from anatomaly.detector.official import import_checkpoint

    second = options.get("global_teacher.weights", "auto")
    detector = import_checkpoint(
        options.file, name, teacher_weights=options.teacher.weights, global_teacher_weights=second
    )
    detector.save(options.out)
    print(f"model: {options.out}")
    return 0
