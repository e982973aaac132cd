"""anatomaly export: a whole model, or a frozen teacher alone, for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.commands.arguments import (
    check_support_options,
    check_takes_support,
    manifest_of,
    support_arguments,
    support_rows,
)
from anatomaly.commands.console import say, tell_wait
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def export_arguments(parser: ArgumentParser) -> None:
    """Options of `export`."""
    from typing import Literal

    parser.add_argument("--model", type=str | None, help="Folder made by fit or import. Without: the built-in model.")
    support_arguments(parser)
    parser.add_argument("--support_input", type=bool, default=False, help="Make the support images an input.")
    parser.add_argument("--images", type=str, nargs="+", help="Compare on these images. Without: mirrored supports.")
    parser.add_argument("--teacher.name", type=str | None, default=None, help="Export this teacher alone; see fit.")
    parser.add_argument("--teacher.weights", type=str | None, default=None, help="auto, random, or a file.")
    parser.add_argument("--global_teacher.weights", type=str | None, default=None, help="Of the model's second one.")
    parser.add_argument("--teacher.blocks", type=tuple[int, ...] | None, default=None, help="See fit --help_all.")
    parser.add_argument("--size", type=int, nargs=2, default=None, help="Of a teacher alone: height and width, 256.")
    parser.add_argument("--format", type=Literal["onnx", "monai"], default="onnx", help="A file, or a MONAI bundle.")
    parser.add_argument("--out", type=str, required=True, help="File to write, such as model.onnx; monai: a folder.")


def run_export(options: Namespace) -> int:
    """Run `export`."""
    given = [name for name in _OF_MODELS if options.get(name)]
    if options.teacher.name is None:
        if options.size is not None or options.teacher.blocks is not None:
            raise ConfigError("export: a model has its own size and blocks. Leave out --size and --teacher.blocks.")
        return _export_model(options)
    if given:
        raise ConfigError(f"export: --teacher.name exports a teacher alone. Leave out --{given[0]}.")
    if options.format == "monai":
        raise ConfigError("export: a MONAI bundle is of a whole model. Leave out --teacher.name or --format.")
    from anatomaly.backbones import build_backbone
    from anatomaly.backbones.export import export_teacher

    weights, (height, width) = options.teacher.weights or "auto", options.size or (256, 256)
    teacher = build_backbone(options.teacher.name, weights=weights, blocks=options.teacher.blocks)
    done = export_teacher(teacher, Path(options.out), size=(height, width))
    facts = f"images of {done.size[0]}x{done.size[1]}, opset {done.opset}"
    print(f"{done.file}: {facts}, onnxruntime within {done.parity:.1e} of the teacher")
    return 0


#: Options that say nothing of a teacher alone.
_OF_MODELS = (
    *("model", "support", "shots", "bank", "save_bank", "intensity", "support_input", "images"),
    "global_teacher.weights",
)


def _export_model(options: Namespace) -> int:
    check_support_options(options, "export")
    if options.support_input and options.support is None:
        raise ConfigError("export: --support_input needs the images themselves. Give --support.")
    if options.support_input and options.format == "monai":
        raise ConfigError("export: a MONAI bundle has its support inside. Leave out --support_input.")
    if options.images is None and options.support is None:
        raise ConfigError("export: got no images to compare on. Give --images, some files like those to be judged.")
    tell_wait(f"Loading {options.model or 'the built-in model'}; this takes some seconds.")
    from anatomaly.backbones.export import check_packages
    from anatomaly.data.transforms import load
    from anatomaly.detector.bundle import BUILT_IN
    from anatomaly.detector.detector import Detector
    from anatomaly.detector.export import export_model
    from anatomaly.detector.monai_bundle import export_monai

    check_packages()
    weights = {
        "teacher_weights": options.teacher.weights,
        "global_teacher_weights": options.global_teacher.weights,
    }
    detector = Detector.load(options.model or BUILT_IN, device="cpu", **weights)
    check_takes_support(options, "export", detector)
    rows: Any = []
    if options.bank is not None:
        detector.load_support(options.bank)
    elif options.support is None:
        detector.set_task(options.task, intensity=options.intensity)
    else:
        rows = support_rows(options.support, options.task, options.shots)
        detector.set_support(rows, task=options.task, intensity=options.intensity)
    if options.save_bank is not None:
        detector.save_support(options.save_bank)
    preprocessing = detector.ready().preprocessing
    supports = [load(row, preprocessing).input for row in rows]
    if options.images is None:  # a support beside itself differs by nothing but rounding
        images = [each[..., ::-1].copy() for each in supports]
    else:
        images = [load(row, preprocessing).input for row in manifest_of(options.images, options.task).samples]
    if options.format == "monai":
        done = export_monai(detector, Path(options.out), images)
    else:
        done = export_model(detector, Path(options.out), images, support=supports if options.support_input else None)
    openvino = done.openvino_difference
    beside = "" if openvino is None else f" OpenVINO is within {openvino:.1e} of a score."
    if openvino != openvino:  # NaN
        beside = " OpenVINO cannot run it."
    say(
        f"{done.file}: on {done.images} images onnxruntime is within {done.score_difference:.1e} of a score and "
        f"{done.map_difference:.1e} of the highest map value.{beside} How images are prepared: {done.file}.json"
    )
    return 0
