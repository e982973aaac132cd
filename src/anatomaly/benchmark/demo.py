"""The demo: train on four built-in tasks, judge a fifth that nobody trained on, write a report."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from anatomaly.data.manifest import load_manifest
from anatomaly.data.transforms import load
from anatomaly.errors import OutputError
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.evaluation import Evaluation, table_of
from anatomaly.evaluation.protocols import samples_to_test
from anatomaly.presets import DEMO_PRESETS, load_preset
from anatomaly.results.folder import predict_to_folder
from anatomaly.synthetic.phantom import write_benchmark
from anatomaly.training.fit import fit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

_TASK = "head_ct"
_SHOTS = (2, 4, 8)


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
    logger.info("Drawing five kinds of synthetic scans ...")
    manifest = load_manifest(write_benchmark(out / "data", train=60, seed=seed))
    logger.info("Training on %s ...", ", ".join(task for task in manifest.tasks if task != _TASK))
    others = manifest.select(task=[task for task in manifest.tasks if task != _TASK])
    configs = {config.method.name: config for config in map(load_preset, DEMO_PRESETS)}
    detectors = {
        name: fit(
            others,
            out / "models" / name,
            replace(config, training=replace(config.training, seed=seed)),
            on_progress=on_progress,
        )
        for name, config in configs.items()
    }
    logger.info("Judging %s, which nobody trained on, at %s shots ...", _TASK, ", ".join(map(str, _SHOTS)))
    results = [
        (name, evaluation)
        for name, detector in detectors.items()
        for evaluation in evaluate(detector, manifest, task=_TASK, shots=_SHOTS, seed=seed)
    ]
    detector = next(iter(detectors.values()))
    supports = results[1][1].supports[0]  # its K = 4, first draw
    detector.set_support(supports, task=_TASK)
    summary = predict_to_folder(
        detector,
        samples_to_test(manifest, _TASK),
        out / "predictions",
        title=f"anatomaly demo: {_TASK}, {len(supports)} reference images",
        bank_images=[load(row, detector.ready().preprocessing).display for row in supports],
        tables=[table_of(results, title="A task nobody trained on")],
    )
    return summary.report.replace(report), results
