"""anatomaly predict, evaluate, demo: what a model says, and how good that is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.commands.console import fail, print_table, progress, tell_left_out
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jsonargparse import ArgumentParser, Namespace

    from anatomaly.types import Sample


def model_arguments(parser: ArgumentParser) -> None:
    """Options of every command that takes a model."""
    parser.add_argument("--model", type=str, required=True, help="Folder made by fit or import.")
    loading_arguments(parser)


def loading_arguments(parser: ArgumentParser) -> None:
    """How a model is loaded and run, whatever names its folder."""
    from typing import Literal

    parser.add_argument("--teacher.weights", type=str | None, help="Take the teacher's weights from this file.")
    parser.add_argument("--global_teacher.weights", type=str | None, help="Likewise PDD's second teacher's.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    parser.add_argument("--precision", type=Literal["fp32", "bf16"], default="fp32", help="bf16 is faster.")
    parser.add_argument("--batch_size", type=int, default=16, help="Images per forward pass; changes no score.")


def load_detector(options: Namespace, folder: str | Path | None = None) -> Any:
    """The model in `--model`, or in another folder, loaded as `loading_arguments` say."""
    from anatomaly.inference import Detector

    if options.batch_size < 1:
        raise ConfigError(f"batch_size: got {options.batch_size}, expected at least 1.")
    return Detector.load(
        options.model if folder is None else folder,
        device=options.device,
        precision=options.precision,
        teacher_weights=options.teacher.weights,
        global_teacher_weights=options.global_teacher.weights,
    )


def support_arguments(parser: ArgumentParser) -> None:
    """What images are compared with, and how they are read."""
    from anatomaly.types import Intensity

    parser.add_argument("--support", type=str, help="Folder or manifest of K normal images of the same kind; not PDD.")
    parser.add_argument("--shots", type=int | None, default=None, help="Take only so many of the support images.")
    parser.add_argument("--bank", type=str, help="Saved support bank, instead of --support.")
    parser.add_argument("--save_bank", type=str, help="Save the support bank to this file.")
    parser.add_argument("--task", type=str, default="task", help="Name of the kind of image.")
    parser.add_argument("--intensity", type=Intensity | None, default=None, help="Rule where it differs from fit's.")


def predict_arguments(parser: ArgumentParser) -> None:
    """Options of `predict`."""
    model_arguments(parser)
    parser.add_argument("--images", type=str, required=True, help="File, folder or manifest of images to judge.")
    support_arguments(parser)
    parser.add_argument("--out", type=str, required=True, help="Folder for tables, maps, overlays and report.")
    parser.add_argument("--maps", type=bool, default=True, help="Write maps as float32 arrays and volumes.")
    parser.add_argument("--overlays", type=bool, default=True, help="Write overlays as PNG.")
    parser.add_argument("--alpha", type=float | None, default=None, help="Call images at this false-positive rate.")
    parser.add_argument("--fdr", type=float | None, default=None, help="Call with at most this share of false calls.")
    parser.add_argument("--dependent", type=bool, default=False, help="Let fdr hold under any dependence; calls fewer.")


def run_predict(options: Namespace) -> int:
    """Run `predict`."""
    from anatomaly.config import check_intensity
    from anatomaly.data.transforms import load
    from anatomaly.output import predict_to_folder

    if options.support is not None and options.bank is not None:
        raise ConfigError("predict: give either --support (normal images) or --bank (a saved bank), not both.")
    if options.bank is not None and (options.shots is not None or options.intensity is not None):
        raise ConfigError("predict: --bank has its own shots and intensity rule. Leave out --shots and --intensity.")
    if options.intensity is not None:
        check_intensity(options.intensity, "intensity")
    samples = image_rows(Path(options.images), options.task)
    detector = load_detector(options)
    of_support = (options.support, options.bank, options.shots, options.save_bank)
    if not detector.method.needs_support and any(option is not None for option in of_support):
        raise ConfigError(
            f"predict: {detector.facts['method']['name']} learned what is normal in training and compares with no "
            "support images. Leave out --support, --bank, --shots and --save_bank."
        )
    pictures = []
    if options.bank is not None:
        detector.load_support(options.bank)
    elif options.support is None:
        detector.set_task(options.task, intensity=options.intensity)
    else:
        supports = support_rows(Path(options.support), options.task, options.shots)
        detector.set_support(supports, task=options.task, intensity=options.intensity)
        pictures = [load(row, detector.ready().preprocessing).display for row in supports]
    if options.save_bank is not None:
        detector.save_support(options.save_bank)
    with progress(len(samples)) as advance:
        summary = predict_to_folder(
            detector,
            samples,
            Path(options.out),
            batch_size=options.batch_size,
            task=options.task,
            bank_images=pictures,
            maps=options.maps,
            overlays=options.overlays,
            alpha=options.alpha,
            fdr=options.fdr,
            dependent=options.dependent,
            on_progress=advance,
        )
    for remark in summary.remarks:
        print(remark)
    known = [p.p_value for p in summary.predictions if p.p_value is not None]
    for call in summary.calls:
        cut = f" (p <= {call.p:.3g})" if call.p > 0 else ""
        print(f"{sum(p <= call.p for p in known)} of {len(known)} images called at {call.name}{cut}.")
    scored = len(summary.predictions) - summary.failed
    print(f"{scored} images scored, {summary.failed} could not be read. Report: {summary.report}")
    if not scored:
        return fail("no image could be scored; scores.csv says why for each.")
    return 0


def image_rows(source: Path, task: str | None) -> Sequence[Sample]:
    """Rows of one image file, a folder or a table; what a folder holds besides images is told."""
    from anatomaly.data.layouts import samples_of
    from anatomaly.data.manifest import is_table, load_manifest

    if os.path.isfile(source) and not is_table(source):  # noqa: PTH113 False where pathlib raises
        return samples_of(source, task=task or "task")
    manifest = load_manifest(source, task=task)
    tell_left_out(manifest)
    return manifest.samples


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


def evaluate_arguments(parser: ArgumentParser) -> None:
    """Options of `evaluate`."""
    model_arguments(parser)
    parser.add_argument("--data", type=str, required=True, help="Folder or manifest: normals in train, a test split.")
    parser.add_argument("--tasks", type=list[str] | None, default=None, help="Tasks to test; default all in the data.")
    parser.add_argument("--shots", type=list[int] | int, default=[2, 4, 8], help="Values of K; not PDD.")
    parser.add_argument("--draws", type=int, default=5, help="Support draws per K.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draws.")
    parser.add_argument("--out", type=str, help="Folder for evaluation.json, draws.csv and scores.csv.")


def run_evaluate(options: Namespace) -> int:
    """Run `evaluate`."""
    from anatomaly.data.manifest import load_manifest
    from anatomaly.evaluation import evaluate, pooled, write_evaluations

    manifest = load_manifest(Path(options.data))
    tell_left_out(manifest)
    detector = load_detector(options)
    results = []
    for task in options.tasks or manifest.tasks:
        results += evaluate(
            detector,
            manifest,
            task=task,
            shots=[options.shots] if isinstance(options.shots, int) else options.shots,
            draws=options.draws,
            seed=options.seed,
            batch_size=options.batch_size,
        )
    title = f"{options.model}: {options.draws} support draws"
    if not detector.method.needs_support:
        title = options.model
        results += [pooled(results)] if len(results) > 1 else []
    if options.out is not None:
        write_evaluations(results, Path(options.out))
    print_table(title, [("", result) for result in results])
    return 0


def demo_arguments(parser: ArgumentParser) -> None:
    """Options of `demo`."""
    parser.add_argument("--out", type=str, default="demo", help="Folder for data, model and report.")
    parser.add_argument("--seed", type=int, default=0, help="Of the images, the training and the draws.")


def run_demo(options: Namespace) -> int:
    """Run `demo`."""
    from anatomaly.demo import demo

    report, results = demo(Path(options.out), seed=options.seed)
    print_table("A task nobody trained on", results)
    print(f"Report: {report}")
    return 0
