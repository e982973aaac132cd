"""Run a model for an audit: every support draw, every kept checkpoint, each test image encoded once per checkpoint."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anatomaly.audit.collect import Collector, draws_to_keep, shuffled_draws
from anatomaly.audit.measure import Runs, require_labels
from anatomaly.audit.published import RELEASED, file_order
from anatomaly.backbones.weights import load_strict, state_digest
from anatomaly.data.loading import load_batches
from anatomaly.detector.bundle import read_tensors
from anatomaly.errors import ManifestError, NotReadyError
from anatomaly.evaluation.protocols import draw_supports, forbid_leak, samples_to_test
from anatomaly.scoring import compare_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from anatomaly.audit.published import RunScores
    from anatomaly.data.manifest import Manifest
    from anatomaly.detector.detector import Detector
    from anatomaly.types import Preprocessing, Sample, SupportBank


def kept_checkpoints(bundle: Path) -> dict[int, Path]:
    """The weights that `fit --training.keep_checkpoints true` kept, by epoch; none for other models."""
    found = {}
    for file in sorted((bundle / "training").glob("epoch_*.safetensors")):
        if match := re.fullmatch(r"epoch_(\d+)\.safetensors", file.name):
            found[int(match[1])] = file
    return dict(sorted(found.items()))


def run_model(
    detector: Detector,
    bundle: Path,
    manifest: Manifest,
    *,
    task: str,
    shots: int = 4,
    draws: int = 20,
    seed: int = 0,
    batch_size: int = 16,
    on_image: Callable[[object], None] = lambda image: None,
) -> Runs:
    """Score a task's test split for an audit.

    Draws are those of `evaluate` with the same numbers.  At most 1 GiB of maps lie on disk while it runs.

    Args:
        detector: The model.
        bundle: Its folder, where kept checkpoints are looked for.
        manifest: Rows of the task: split "train" (normal) to draw supports from, split "test" with both labels.
        task: The task.
        shots: K.
        draws: Support draws; a method without support is run once.
        seed: Of the draws and of the shuffled loader.
        batch_size: Images per forward pass; changes no score.
        on_image: Called with every image that is done, once per checkpoint.

    Raises:
        ConfigError: Too few normal training images, no test rows, or supports that leak into the test split.
        ManifestError: A test row lacks its label, a class is missing, or no image could be read.
        NotReadyError: The kept checkpoints are not of this model.
        WeightsError: A kept checkpoint is damaged.
    """
    tests = samples_to_test(manifest, task)
    labels = [row.label for row in tests]
    require_labels(labels, task)
    tests = tuple(tests[i] for i in file_order(tests, [int(label == 1) for label in labels]))
    supports: list[tuple[Sample, ...]] = [()]
    if detector.method.needs_support:
        supports = draw_supports(manifest, task=task, shots=shots, draws=draws, seed=seed)
        for drawn in supports:
            forbid_leak(drawn, tests)
    own = {name: tensor.clone() for name, tensor in detector.method.state_dict().items()}
    kept = kept_checkpoints(bundle)
    chosen = _chosen(detector, bundle, kept)
    with tempfile.TemporaryDirectory(prefix="anatomaly-") as folder:
        run = _Run(detector, tests, task, supports, batch_size, on_image)
        done, samples, unreadable, collectors = run.score(Path(folder))
        scored = np.array([row.label for row in samples], np.int64)
        require_labels(scored.tolist(), task)
        shuffled = shuffled_draws(collectors, scored, seed=seed)
    epochs = {}
    try:
        for epoch, file in kept.items():
            if epoch == chosen:
                epochs[epoch] = done
                continue
            load_strict(detector.method, read_tensors(file), where=str(file))
            epochs[epoch] = run.score(None)[0]
    finally:
        load_strict(detector.method, own, where=str(bundle))
    return Runs(
        source=str(bundle),
        method=detector.facts.name,
        task=task,
        shots=len(supports[0]),
        samples=samples,
        labels=scored,
        unreadable=unreadable,
        draws=done,
        shuffled=shuffled,
        epochs=epochs,
        chosen=chosen,
        notes=_notes(detector, kept),
    )


def passes(bundle: Path) -> int:
    """How often `run_model` walks over the test images."""
    return max(1, len(kept_checkpoints(bundle)))


def _chosen(detector: Detector, bundle: Path, kept: dict[int, Path]) -> int | None:
    """The epoch that pasted lesions chose, whose weights are the model's."""
    if not kept:
        return None
    epoch = int(detector.facts.training.get("best_epoch", -1))
    file = kept.get(epoch)
    if file is None or state_digest(read_tensors(file)) != state_digest(detector.method.state_dict()):
        raise NotReadyError(
            f"{bundle}: training/epoch_{epoch}.safetensors does not hold the model's weights, expected those of its "
            "best epoch. The folder mixes two runs: train again with --training.keep_checkpoints true."
        )
    return epoch


def _notes(detector: Detector, kept: dict[int, Path]) -> tuple[str, ...]:
    if kept or not detector.facts.record.trained:
        return ()
    return (
        "What choosing the epoch by test labels adds cannot be told: this model kept only its chosen checkpoint. "
        "Train with `--training.keep_checkpoints true` to find out.",
    )


class _Run:
    """The test images of one audit, scored once per checkpoint."""

    def __init__(
        self,
        detector: Detector,
        tests: Sequence[Sample],
        task: str,
        supports: Sequence[tuple[Sample, ...]],
        batch_size: int,
        on_image: Callable[[object], None],
    ) -> None:
        self.detector, self.tests, self.task, self.supports = detector, tests, task, supports
        self.batch_size, self.on_image = batch_size, on_image

    def score(
        self, folder: Path | None
    ) -> tuple[tuple[RunScores, ...], tuple[Sample, ...], tuple[tuple[Sample, str], ...], list[Collector]]:
        """Scores by draw, the rows they are of, the unreadable ones, and the collectors that kept maps in `folder`."""
        detector = self.detector
        needs = detector.method.needs_support
        banks = [
            detector.make_bank(drawn, task=self.task) if needs else detector.empty_bank(self.task)
            for drawn in self.supports
        ]
        kept = 0 if folder is None else draws_to_keep(len(banks), len(self.tests), detector.preprocessing.size)
        files = [None if folder is None or i >= kept else folder / f"draw_{i}" for i in range(len(banks))]
        collectors = [Collector(sound=detector.scoring, released=RELEASED, file=file) for file in files]
        groups: dict[Preprocessing, list[int]] = defaultdict(list)  # one, unless a percentile rule depends on supports
        for index, bank in enumerate(banks):
            groups[bank.preprocessing].append(index)
        samples: list[Sample] = []
        unreadable: list[tuple[Sample, str]] = []
        for number, (preprocessing, members) in enumerate(groups.items()):
            for batch in load_batches(self.tests, preprocessing, batch_size=self.batch_size):
                readable = [item.prepared.input for item in batch if item.prepared is not None]
                if number == 0:
                    samples += [item.sample for item in batch if item.prepared is not None]
                    unreadable += [(item.sample, item.error or "") for item in batch if item.prepared is None]
                    for item in batch:
                        self.on_image(item.sample)
                if readable:
                    encoded = detector.encode(readable)
                    for index in members:
                        collectors[index].add(*self._judged(encoded, banks[index]))
        if not samples:
            raise ManifestError(
                f"audit: none of the {len(self.tests)} test images of task {self.task!r} can be read, the first: "
                f"{unreadable[0][1]} `anatomaly data check` lists what is wrong."
            )
        return tuple(each.finish() for each in collectors), tuple(samples), tuple(unreadable), collectors[:kept]

    def _judged(
        self, encoded: Sequence[Tensor], bank: SupportBank
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Unblurred maps, (b, H, W), and the scores, (b,), of a model that does not pool its maps."""
        scoring = replace(self.detector.scoring, blur=0.0)
        size = self.detector.preprocessing.size
        scored = compare_tensor(self.detector.method, encoded, bank.tensors, size=size, scoring=scoring)
        maps: NDArray[np.float32] = scored.maps.cpu().numpy()
        return maps, None if scoring.levels == "sum" else scored.scores.cpu().numpy()
