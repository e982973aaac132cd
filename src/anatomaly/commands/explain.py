"""anatomaly explain ...: where two teachers look, and which support images mattered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.commands.arguments import load_detector, manifest_of, model_arguments, support_rows
from anatomaly.commands.console import fail
from anatomaly.commands.intensity import intensity_argument
from anatomaly.commands.progress import progress
from anatomaly.errors import ConfigError
from anatomaly.tables import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jsonargparse import ArgumentParser, Namespace

    from anatomaly.explain.classifiers import Classifier


def _image_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", type=str, nargs="+", required=True, help="Files, folders, or a table.")
    parser.add_argument("--limit", type=int | None, default=None, help="So many of them, evenly spread over the rows.")
    intensity_argument(parser, "How stored values become [0, 1]")
    parser.add_argument("--out", type=str, required=True, help="Folder for the table and the figures.")


def _samples(options: Namespace, *, task: str | None = None) -> list[Any]:
    rows = list(manifest_of(options.images, task))
    limit = options.limit
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: got {limit}, expected at least 1.")
    if limit is None or limit >= len(rows):
        return rows
    return [rows[number * len(rows) // limit] for number in range(limit)]


def teachers_arguments(parser: ArgumentParser) -> None:
    """Options of `explain teachers`."""
    from typing import Literal

    for role, which in (("teacher", "One frozen backbone"), ("global_teacher", "The other one")):
        parser.add_argument(f"--{role}.name", type=str, required=True, help=f"{which}; see fit --help for the names.")
        parser.add_argument(f"--{role}.weights", type=str, default="auto", help="auto, random, or a file.")
        parser.add_argument(f"--{role}.blocks", type=tuple[int, ...] | None, default=None, help="See fit --help_all.")
        parser.add_argument(f"--{role}.normalise", type=bool, default=True, help="Scale by the model's mean and std.")
    _image_arguments(parser)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256], help="Height and width the teachers see.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images per forward pass; changes no number.")


def run_teachers(options: Namespace) -> int:
    """Run `explain teachers`."""
    from anatomaly.config import check_preprocessing
    from anatomaly.types import Intensity, Preprocessing

    intensity = options.intensity or Intensity()
    if intensity.rule == "percentile":
        raise ConfigError("intensity: percentile is fixed on supports, here are none. Give --intensity range:0..255.")
    size = (options.size[0], options.size[1])
    preprocessing = Preprocessing(size=size, interpolation="bilinear", intensity=intensity)
    check_preprocessing(preprocessing)
    samples = _samples(options)

    from anatomaly.explain.teachers import check_size, explain_teachers, summarise_teachers  # takes seconds to load

    pair = (_classifier(options.teacher, options.device), _classifier(options.global_teacher, options.device))
    check_size(pair, size)
    for each in pair:
        if each.why:
            print(f"{each.teacher.name}: Eigen-CAM instead of Grad-CAM, {each.why}.")
    with progress("explain", len(samples)) as advance:
        rows = explain_teachers(
            pair,
            samples,
            Path(options.out),
            preprocessing=preprocessing,
            batch_size=options.batch_size,
            on_progress=advance,
        )
    means = summarise_teachers(rows)
    columns = ("teacher", "map", "images", "n", "entropy", "area", "top 5 % share", "agreement", "lift", "pixel AUROC")
    Table("", columns, [(name, kind, word, n, *figures.values()) for name, kind, word, n, figures in means]).print()
    print("entropy: 0 one pixel, 1 uniform; area: of an even patch with that entropy; lift: 1 is chance;")
    print("agreement: Spearman correlation of the two maps, over the pixels.")
    return _ending(rows, len(samples), Path(options.out) / "explain.csv")


def _classifier(teacher: Namespace, device: str) -> Classifier:
    from anatomaly.backbones import BACKBONES, build_backbone
    from anatomaly.backbones.timm_features import TimmSpec
    from anatomaly.detector.device import choose_device
    from anatomaly.explain.classifiers import classifier_of

    built = build_backbone(teacher.name, weights=teacher.weights, normalise=teacher.normalise, blocks=teacher.blocks)
    spec = BACKBONES.get(teacher.name) or TimmSpec(teacher.name.removeprefix("timm/"))
    return classifier_of(built.to(choose_device(device)), spec)


def supports_arguments(parser: ArgumentParser) -> None:
    """Options of `explain supports`."""
    model_arguments(parser)
    _image_arguments(parser)
    parser.add_argument(
        "--support", type=str, nargs="+", required=True, help="K normal images: files, folders, or a table."
    )
    parser.add_argument("--shots", type=int | None, default=None, help="Take only so many of the support images.")
    parser.add_argument("--task", type=str, default="task", help="Name of the kind of image.")


def run_supports(options: Namespace) -> int:
    """Run `explain supports`."""
    from anatomaly.config import check_intensity
    from anatomaly.data.transforms import load

    if options.intensity is not None:
        check_intensity(options.intensity, "intensity")
    samples = _samples(options, task=options.task)

    from anatomaly.explain.supports import check_supports, explain_supports, summarise_supports  # takes seconds to load

    detector = load_detector(options)
    check_supports(detector)
    supports = support_rows(options.support, options.task, options.shots)
    detector.set_support(supports, task=options.task, intensity=options.intensity)
    pictures = [load(row, detector.ready().preprocessing).display for row in supports]
    with progress("explain", len(samples)) as advance:
        rows = explain_supports(
            detector,
            samples,
            Path(options.out),
            pictures=pictures,
            batch_size=options.batch_size,
            on_progress=advance,
        )
    columns = ("support", "queries", "mean weight", "counted most in", "mean change of the score without it")
    Table("", columns, summarise_supports(rows)).print()
    return _ending(rows, len(samples), Path(options.out) / "supports.csv")


def _ending(rows: Sequence[Any], images: int, table: Path) -> int:
    failed = len({(row["path"], row["frame"]) for row in rows if row["status"] == "error"})
    print(f"{images - failed} images explained, {failed} could not be read. Table: {table}")
    if failed == images:
        return fail(f"no image could be explained; {table.name} says why for each.")
    return 0
