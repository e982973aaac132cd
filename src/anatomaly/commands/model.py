"""anatomaly fit, import, export: make models and pass them on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.commands.console import tell_left_out

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def fit_arguments(parser: ArgumentParser) -> None:
    """Options of `fit`."""
    from anatomaly.config import FitConfig
    from anatomaly.presets import DEFAULT_PRESET, preset_names

    parser.add_argument("--data", type=str, required=True, help="Folder or manifest with normal training images.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the model; an unfinished run in it resumes.")
    parser.add_argument(
        "--preset",
        type=str,
        help=f"{', '.join(preset_names())}; {DEFAULT_PRESET} where neither this, a file nor a method is given.",
    )
    parser.add_argument("--tasks", type=list[str] | None, default=None, help="Train on these tasks only.")
    parser.add_class_arguments(FitConfig)


def run_fit(options: Namespace) -> int:
    """Run `fit`."""
    from dataclasses import fields

    from anatomaly.config import FitConfig
    from anatomaly.data.manifest import load_manifest

    config = FitConfig(**{field.name: options[field.name] for field in fields(FitConfig)})
    manifest = load_manifest(Path(options.data))
    tell_left_out(manifest)

    from anatomaly.training import fit  # takes seconds to load, so it comes after what may be wrong

    fit(manifest if options.tasks is None else manifest.select(task=options.tasks), options.out, config)
    print(f"model: {options.out}")
    return 0


def d24fad_arguments(parser: ArgumentParser) -> None:
    """Options of `import d24fad`."""
    parser.add_argument("file", type=str, help="Checkpoint with the keys decoder and weight.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the model.")
    parser.add_argument("--teacher.weights", type=str, default="auto", help="WideResNet-50-2: auto, or a file.")


def run_d24fad(options: Namespace) -> int:
    """Read an official D24FAD checkpoint."""
    from anatomaly.official import import_checkpoint

    import_checkpoint(options.file, teacher_weights=options.teacher.weights).save(options.out)
    print(f"model: {options.out}")
    return 0


def pdd_arguments(parser: ArgumentParser) -> None:
    """Options of `import pdd`."""
    parser.add_argument("file", type=str, help="Checkpoint of the students, adapters and priors.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the model.")
    parser.add_argument("--teacher.weights", type=str, default="auto", help="WideResNet-50-2 of timm: auto, or a file.")
    parser.add_argument("--global_teacher.weights", type=str, default="auto", help="VMamba-Tiny: auto, or a file.")


def run_pdd(options: Namespace) -> int:
    """Read an official PDD checkpoint."""
    from anatomaly.official import import_checkpoint

    import_checkpoint(
        options.file,
        method="pdd",
        teacher_weights=options.teacher.weights,
        global_teacher_weights=options.global_teacher.weights,
    ).save(options.out)
    print(f"model: {options.out}")
    return 0


def export_arguments(parser: ArgumentParser) -> None:
    """Options of `export`."""
    parser.add_argument("--teacher.name", type=str, required=True, help="Such as wide_resnet50_2; see fit --help.")
    parser.add_argument("--teacher.weights", type=str, default="auto", help="auto, random, or a file.")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256], help="Height and width of its images.")
    parser.add_argument("--out", type=str, required=True, help="File to write, such as teacher.onnx.")


def run_export(options: Namespace) -> int:
    """Run `export`."""
    from anatomaly.backbones import build_backbone
    from anatomaly.export import export_teacher

    teacher = build_backbone(options.teacher.name, weights=options.teacher.weights)
    done = export_teacher(teacher, Path(options.out), size=(options.size[0], options.size[1]))
    facts = f"images of {done.size[0]}x{done.size[1]}, opset {done.opset}"
    print(f"{done.file}: {facts}, onnxruntime within {done.parity:.1e} of the teacher")
    return 0
