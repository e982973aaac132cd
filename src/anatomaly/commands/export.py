"""anatomaly export: a frozen teacher for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def export_arguments(parser: ArgumentParser) -> None:
    """Options of `export`."""
    parser.add_argument("--teacher.name", type=str, required=True, help="Such as wide_resnet50_2; see fit --help.")
    parser.add_argument("--teacher.weights", type=str, default="auto", help="auto, random, or a file.")
    parser.add_argument("--teacher.blocks", type=tuple[int, ...] | None, default=None, help="See fit --help_all.")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256], help="Height and width of its images.")
    parser.add_argument("--out", type=str, required=True, help="File to write, such as teacher.onnx.")


def run_export(options: Namespace) -> int:
    """Run `export`."""
    from anatomaly.backbones import build_backbone
    from anatomaly.backbones.export import export_teacher

    teacher = build_backbone(options.teacher.name, weights=options.teacher.weights, blocks=options.teacher.blocks)
    done = export_teacher(teacher, Path(options.out), size=(options.size[0], options.size[1]))
    facts = f"images of {done.size[0]}x{done.size[1]}, opset {done.opset}"
    print(f"{done.file}: {facts}, onnxruntime within {done.parity:.1e} of the teacher")
    return 0
