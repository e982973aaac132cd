"""anatomaly calibrate: p-values for a model's scores, from images known to be normal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.commands.arguments import (
    check_support_options,
    check_takes_support,
    load_detector,
    manifest_of,
    model_arguments,
    support_arguments,
    support_rows,
)
from anatomaly.commands.progress import progress
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jsonargparse import ArgumentParser, Namespace

    from anatomaly.types import Calibration

_RATES = (0.2, 0.1, 0.05, 0.02, 0.01)
_LISTED = 10  # unreadable images named on the terminal


def calibrate_arguments(parser: ArgumentParser) -> None:
    """Options of `calibrate`."""
    model_arguments(parser)
    parser.add_argument(
        "--normals", type=str, nargs="+", help="Other normal images: files, folders, or a table; without, the support."
    )
    support_arguments(parser)
    parser.add_argument("--out", type=str, help="Write the calibrated model to this new folder, not into --model.")
    parser.add_argument("--replace", action="store_true", help="Also in place of a better calibration.")
    parser.add_argument("--check", type=str, nargs="+", help="Calibrate nothing: ask whether these normals still fit.")


def run_calibrate(options: Namespace) -> int:
    """Run `calibrate`."""
    from anatomaly.detector.calibrate import calibrate, calibrate_on_support, check
    from anatomaly.detector.conformal import describe

    _check_options(options)
    detector = load_detector(options)
    few_shot = detector.method.needs_support
    _check_support(options, detector)
    source = options.normals or options.check
    rows = None if source is None else normal_rows(detector, source, options.task)
    supports: Any = []
    left_out: tuple[Any, ...] = ()
    if options.support is not None:
        supports = support_rows(options.support, options.task, options.shots)
    if options.bank is not None:
        detector.load_support(options.bank)
    elif not few_shot:
        detector.set_task(options.task, intensity=options.intensity)
    elif rows is not None:
        detector.set_support(supports, task=options.task, intensity=options.intensity)
    if rows is None:
        calibration, _ = calibrate_on_support(
            detector, supports, task=options.task, intensity=options.intensity, replace_all=options.replace
        )
    else:
        with progress("calibrate", len(rows)) as advance:
            if options.check is not None:
                tests, n = check(detector, rows, batch_size=options.batch_size, on_progress=advance)
            else:
                calibration, left_out = calibrate(
                    detector,
                    rows,
                    supports=supports,
                    batch_size=options.batch_size,
                    replace_all=options.replace,
                    on_progress=advance,
                )
    if options.check is not None:
        print(
            f"{n} new normals: {tests.higher:.0%} of the pairs higher than those calibrated on (50% where nothing "
            f"moved); p = {tests.rank:.3g} (Mann-Whitney), {tests.shape:.3g} (Kolmogorov-Smirnov)."
        )
        print(
            "They do not score like those calibrated on: calibrate again on images like these."
            if min(tests.rank, tests.shape) < 0.025  # two tests at 5 % together
            else "No difference found; with few images only a large one would be."
        )
        return 0
    folder = options.model if options.out is None else options.out
    if options.out is None:
        detector.save_calibrations(folder)
    else:
        detector.save(folder)
    if options.save_bank is not None:
        detector.save_support(options.save_bank)
    for prediction in left_out[:_LISTED]:
        print(f"left out: {prediction.error}")
    if len(left_out) > _LISTED:
        print(f"left out: {len(left_out) - _LISTED} more")
    _print(calibration)
    print(f"Stored in {Path(folder) / 'calibration.json'}.")
    used = detector.find_calibration()[0]
    if used is calibration:
        print(f"In use: this calibration; predict --model {folder} uses it with the same support and options.")
    else:
        print(f"In use: still the better one of before, {describe(used)} With --replace this one takes its place.")
    return 0


def _check_options(options: Namespace) -> None:
    check_support_options(options, "calibrate")
    if options.model is None and options.out is None and options.check is None:
        raise ConfigError("calibrate: the built-in model takes no calibration in its place. Give --out, a new folder.")
    if options.out is not None and Path(options.out).exists():
        raise ConfigError(f"calibrate: {options.out} exists already, expected a new folder. Choose another --out.")
    if options.check is not None and options.normals is not None:
        raise ConfigError("calibrate: give either --normals (to calibrate on) or --check (to compare), not both.")
    if options.bank is not None and options.normals is None and options.check is None:
        raise ConfigError(
            "calibrate: a bank holds no images to judge by one another. Give --normals, or --support with its images."
        )


def _check_support(options: Namespace, detector: Any) -> None:
    name, few_shot = detector.facts.name, detector.method.needs_support
    if few_shot and options.support is None and options.bank is None:
        raise ConfigError(f"calibrate: {name} needs normal images to compare with. Give --support or --bank.")
    check_takes_support(options, "calibrate", detector)
    if not few_shot and options.normals is None and options.check is None:
        raise ConfigError(f"calibrate: {name} has no support to calibrate on. Give --normals, held out from training.")


def normal_rows(detector: Any, sources: Sequence[str], task: str) -> list[Any]:
    """Rows to calibrate on: of split val where there are any, else those that are not of split train.

    Images that trained the model score lower than new ones and would make all p-values too small.

    Raises:
        ConfigError: Only training images of a task that the model learned are left.
    """
    manifest = manifest_of(sources, task)
    rows = (manifest if len(manifest.tasks) == 1 else manifest.select(task=task)).samples
    chosen = [row for row in rows if row.split == "val"] or [row for row in rows if row.split != "train"]
    if chosen:
        return chosen
    learned = detector.facts.training.get("tasks", ())
    if not detector.method.needs_support or rows[0].task in learned or task in learned:
        raise ConfigError(
            f"normals: {manifest.source} has rows of split train only, and the model learned this task; expected "
            "images it has not seen, for it scores those lower. Give normal rows of split val."
        )
    return list(rows)


def _print(calibration: Calibration) -> None:
    from anatomaly.detector.calibrate import sizes
    from anatomaly.detector.conformal import describe, false_positive_range, needed_normals, threshold

    n = calibration.n
    size = sizes(calibration)
    print(f"Calibrated on {describe(calibration)}{f' Each has {size}.' if size else ''}")
    if calibration.unit == "image":
        print("No patient is named: each image counts as a patient of its own. If several are of one, name them.")
    for rate in _RATES:
        needed = needed_normals(rate)
        if n < needed:
            print(f"  {rate:>4.0%} false positives: cannot be asserted with {n}; needs {needed}.")
            continue
        low, high = false_positive_range(n, rate)
        own = f"; this calibration's own rate: {low:.1%} to {high:.1%}" if calibration.guarantee == "exact" else ""
        print(f"  {rate:>4.0%} false positives: score above {threshold(calibration.scores, rate):.4g}{own}")
    if calibration.guarantee == "exact":
        print("  (the stated rate is the mean over calibrations; 90 % of those of this size lie in the range)")
    if calibration.guarantee == "approximate":
        print("Leave-one-out with this method is approximate: measured, not proven. Other normals make it exact.")
    elif calibration.guarantee == "conservative":
        print("Leave-one-out with this method holds, and errs on the side of calling fewer.")
