"""anatomaly predict: what a model says of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.commands.archive import archive_arguments, check_engine, run_archive
from anatomaly.commands.arguments import check_support_options, manifest_of, model_arguments, support_arguments
from anatomaly.commands.console import ended_by_signal, fail, say
from anatomaly.commands.progress import progress
from anatomaly.commands.ready import ready_detector
from anatomaly.commands.volumes import check_volume_options, slices_of, volume_arguments
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def predict_arguments(parser: ArgumentParser) -> None:
    """Options of `predict`."""
    model_arguments(parser)
    parser.add_argument(
        "--images", type=str, nargs="+", required=True, help="Images to judge: files, folders, or a table."
    )
    support_arguments(parser)
    volume_arguments(parser)
    parser.add_argument("--out", type=str, required=True, help="Folder for tables, maps, overlays and report.")
    flag, archive = bool | None, "Default yes, with --engine ray no."
    parser.add_argument("--maps", type=flag, default=None, help=f"Write maps as float32 arrays and volumes. {archive}")
    parser.add_argument("--overlays", type=flag, default=None, help=f"Write overlays as PNG. {archive}")
    parser.add_argument("--dicom", type=bool, default=False, help="Write DICOM objects of DICOM images, to OUT/dicom.")
    parser.add_argument("--alpha", type=float | None, default=None, help="Call images at this false-positive rate.")
    parser.add_argument("--fdr", type=float | None, default=None, help="Call with at most this share of false calls.")
    parser.add_argument("--dependent", type=bool, default=False, help="Let fdr hold under any dependence; calls fewer.")
    archive_arguments(parser)


def run_predict(options: Namespace) -> int:
    """Run `predict`."""
    from anatomaly.results.run_record import refuse_finished

    check_support_options(options, "predict")
    check_volume_options(options, "predict")
    check_engine(options)
    _refuse_inputs(options)
    refuse_finished(Path(options.out))
    if options.engine == "ray":
        return run_archive(options)
    samples = slices_of(manifest_of(options.images, options.task), options)

    from anatomaly.results.cases import count
    from anatomaly.results.folder import predict_to_folder  # takes seconds to load

    detector, pictures = ready_detector(options, "predict")
    with progress("predict", len(samples)) as advance:

        def go_on(done: int, total: int) -> None:
            say(f"{options.out}: continues an unfinished run: {done:,} of {total:,} images are done.")
            advance.begin(total, done=done)

        try:
            with ended_by_signal():
                summary = predict_to_folder(
                    detector,
                    samples,
                    Path(options.out),
                    batch_size=options.batch_size,
                    task=options.task,
                    bank_images=pictures,
                    maps=options.maps is not False,
                    overlays=options.overlays is not False,
                    dicom=options.dicom,
                    alpha=options.alpha,
                    fdr=options.fdr,
                    dependent=options.dependent,
                    on_progress=advance,
                    on_continue=go_on,
                )
        except KeyboardInterrupt:
            told = f"{options.out}: interrupted; what is there is complete. Run the same command again to go on."
            return fail(told, code=130)
    for remark in summary.remarks:
        print(remark)
    known = [p.p_value for p in summary.predictions if p.p_value is not None]
    for call in summary.calls:
        cut = f" (p <= {call.p:.3g})" if call.p > 0 else ""
        print(f"{sum(p <= call.p for p in known)} of {len(known)} images called at {call.name}{cut}.")
    scored = len(summary.predictions) - summary.failed
    print(f"{count(scored, 'image')} scored, {summary.failed} could not be read. Report: {summary.report}")
    normal = detector.ready().normal_scores
    if scored and normal:
        above = sum(each.score > max(normal) for each in summary.predictions if each.error is None)
        print(
            f"Among themselves the {len(normal)} support images score {min(normal):.4g} to {max(normal):.4g}; "
            f"{above} of {scored} images score higher. A rough yardstick"
            f"{': anatomaly calibrate gives p-values.' if options.axis is None else '.'}"
        )
    if not scored:
        return fail("no image could be scored; scores.csv says why for each.")
    return 0


def _refuse_inputs(options: Namespace) -> None:
    """Refuse to write among the images: a later run would take overlays for images.

    Raises:
        ConfigError: The output folder is one of those that are read.
    """
    out = Path(options.out)
    for flag, paths in (("images", options.images), ("support", options.support or ())):
        if out.exists() and any(Path(each).is_dir() and out.samefile(each) for each in paths):
            raise ConfigError(f"predict: {out} is both --out and --{flag}. Choose another --out.")
