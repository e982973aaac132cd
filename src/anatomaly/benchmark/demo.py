"""The demo: judge a built-in kind of scan with eight normal images, then compare methods on it, and report both."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from anatomaly.data.manifest import load_manifest
from anatomaly.data.transforms import load
from anatomaly.detector.detector import Detector
from anatomaly.errors import OutputError
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.evaluation import Evaluation, table_of
from anatomaly.evaluation.protocols import draw_supports, samples_to_test
from anatomaly.presets import DEMO_PRESETS, load_preset
from anatomaly.results.folder import predict_to_folder
from anatomaly.synthetic.phantom import write_benchmark
from anatomaly.training.fit import fit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from anatomaly.data.manifest import Manifest
    from anatomaly.tables import Table
    from anatomaly.types import Sample

logger = logging.getLogger(__name__)

_TASK = "head_ct"
_SHOTS = (2, 4, 8)
_TRAIN, _EPOCHS = 40, 10  # normal images of each kind, passes over them: little, for the demo is to take minutes


def demo(
    out: Path,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
) -> tuple[Path, list[tuple[str, Evaluation]]]:
    """Run the whole chain on built-in images.

    Args:
        out: Folder for data, models, results and report; one that holds a report already is refused.
        seed: Of the images, the training and the draws.
        on_progress: Called by each `fit`.

    Returns:
        The report, and (method, evaluation) pairs of the methods that are compared, at 2, 4 and 8 shots.

    Raises:
        OutputError: `out` cannot be written or holds an earlier demo.
    """
    report = out / "report.html"
    if report.exists():
        raise OutputError(f"{report}: already exists. Delete {out} or choose another --out.")
    table = out / "data" / "manifest.csv"
    if not table.exists():  # else of a demo that was cut short
        logger.info("Drawing five kinds of synthetic scans ...")
        write_benchmark(out / "data", train=_TRAIN, seed=seed)
    manifest = load_manifest(table)
    detector = Detector.default()
    [supports] = draw_supports(manifest, task=_TASK, shots=max(_SHOTS), draws=1, seed=seed)
    logger.info("Judging %s with the built-in model and %d normal images ...", _TASK, len(supports))
    first = _judge(detector, manifest, supports, out / "predictions", ())
    logger.info("First report: %s", first)
    others = manifest.select(task=[task for task in manifest.tasks if task != _TASK])
    logger.info("Training what has to be trained, on %s ...", ", ".join(others.tasks))
    configs = {config.method.name: config for config in map(load_preset, DEMO_PRESETS)}
    detectors = {
        name: fit(
            others,
            out / "models" / name,
            replace(config, training=replace(config.training, seed=seed, epochs=min(config.training.epochs, _EPOCHS))),
            on_progress=on_progress,
        )
        for name, config in configs.items()
    }
    logger.info("Comparing on %s, which nobody trained on, with %s images ...", _TASK, ", ".join(map(str, _SHOTS)))
    results = [
        (name, evaluation)
        for name, each in detectors.items()
        for evaluation in evaluate(each, manifest, task=_TASK, shots=_SHOTS, seed=seed)
    ]
    compared = table_of(results, title="A task nobody trained on")
    return _judge(detector, manifest, supports, out / "compared", [compared]).replace(report), results


def _judge(
    detector: Detector, manifest: Manifest, supports: Sequence[Sample], out: Path, tables: Sequence[Table]
) -> Path:
    """The report of the test images, judged with these supports; one that is there is kept."""
    if (out / "report.html").exists():
        return out / "report.html"
    detector.set_support(supports, task=_TASK)
    summary = predict_to_folder(
        detector,
        samples_to_test(manifest, _TASK),
        out,
        title=f"anatomaly demo: {_TASK}, {len(supports)} reference images",
        bank_images=[load(row, detector.ready().preprocessing).display for row in supports],
        tables=tables,
    )
    return summary.report
