"""Judge a whole set of images into a folder: tables, maps, volumes and one report, row by row."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from anatomaly.data.readers import sniff_format
from anatomaly.data.volumes import write_volume
from anatomaly.report import Table, shrink, write_report
from anatomaly.results import ResultWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from anatomaly.inference import Detector
    from anatomaly.types import Prediction, Sample

_CASES = 200  # shown in the report; their pictures are kept in memory, shrunk


@dataclass(frozen=True)
class Summary:
    """What a run left behind.

    Attributes:
        predictions: One per image, in order, without pictures except for the highest scores.
        report: The HTML file.
        failed: Number of images without a score.
    """

    predictions: tuple[Prediction, ...]
    report: Path
    failed: int


def predict_to_folder(
    detector: Detector,
    samples: Iterable[str | Path | Sample],
    out: Path,
    *,
    batch_size: int = 16,
    task: str = "task",
    title: str = "Anomaly report",
    bank_images: Sequence[NDArray[np.float32]] = (),
    metrics: Mapping[str, str] | None = None,
    tables: Sequence[Table] = (),
    maps: bool = True,
    overlays: bool = True,
    on_progress: Callable[[Prediction], None] = lambda prediction: None,
) -> Summary:
    """Judge images against the detector's support and write scores.csv, scores.jsonl, maps, overlays and report.html.

    The maps of a NIfTI volume are also written as one volume on the source's grid, `maps/NAME_map.nii.gz`.

    Args:
        detector: With its support set.
        samples: Files or manifest rows.
        out: Folder; one that holds results already is refused.
        batch_size: Images per forward pass; changes no score.
        task: Task name of items given as files.
        title: Heading of the report.
        bank_images: The support images, each (C, H, W) in [0, 1], for the report.
        metrics: Measured quality for the report, as label and text.
        tables: More tables for the report.
        maps: Write maps as arrays (and volumes).
        overlays: Write overlays as pictures.
        on_progress: Called with every prediction.

    Raises:
        NotReadyError: The detector has no support, and its method needs one.
        OutputError: Something cannot be written; the rows so far are complete.
    """
    bank = detector.ready()
    kept: list[Prediction] = []
    highest: list[tuple[float, int]] = []  # heap of (score, -index) with pictures; the report, too, shows ties in order
    volumes = _Volumes(out / "maps") if maps else None
    with ResultWriter(out, scale=bank.map_range, support_names=bank.names, maps=maps, overlays=overlays) as writer:
        for prediction in detector.predict(samples, batch_size=batch_size, task=task):
            writer.write(prediction)
            if volumes is not None:
                volumes.add(prediction)
            kept.append(replace(prediction, image=None, anomaly_map=None))
            if prediction.error is None:
                heapq.heappush(highest, (prediction.score, 1 - len(kept)))
                dropped = -heapq.heappop(highest)[1] if len(highest) > _CASES else -1
                if dropped >= 0:
                    kept[dropped] = replace(kept[dropped], image=None, anomaly_map=None)
                if dropped != len(kept) - 1:
                    kept[-1] = shrink(prediction)
            on_progress(prediction)
    if volumes is not None:
        volumes.flush()
    report = write_report(
        out / "report.html",
        kept,
        title=title,
        bank_names=bank.names,
        bank_images=bank_images,
        scale=bank.map_range,
        about=_about(detector, bank.task),
        metrics=metrics,
        tables=tables,
        max_cases=_CASES,
    )
    return Summary(tuple(kept), report, sum(prediction.error is not None for prediction in kept))


def _about(detector: Detector, task: str) -> dict[str, str]:
    """The facts of the model that a reader of the report may need."""
    preprocessing = detector.preprocessing
    training = detector.facts.get("training", {})
    about = {
        "Method": detector.facts["method"]["name"],
        "Teacher": ", ".join(f"{t.name} ({t.weights_hash[:12]})" for t in detector.method.teachers.values()),
        "Model": detector.model_hash[:12],
        "Task": task,
        "Input": f"{preprocessing.size[0]} x {preprocessing.size[1]} pixels, {preprocessing.resize}",
        "Score": f"{detector.scoring.pooling} of the map, Gaussian blur {detector.scoring.blur:g} pixels",
    }
    if "best_epoch" in training:
        about["Trained on"] = f"{training['images']} normal images of {', '.join(training['tasks'])}"
    return about


class _Volumes:
    """Collect the maps of a NIfTI file's slices and write them as one volume when the next file begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source: Path | None = None
        self.maps: dict[int, NDArray[np.float32]] = {}

    def add(self, prediction: Prediction) -> None:
        if prediction.sample.path != self.source:
            self.flush()
            self.source = prediction.sample.path
        if prediction.anomaly_map is not None:
            self.maps[prediction.sample.frame or 0] = prediction.anomaly_map

    def flush(self) -> None:
        if self.source is not None and self.maps and sniff_format(self.source) == "nifti":
            stem = self.source.name.removesuffix(".gz").removesuffix(".nii")
            write_volume(self.maps, self.source, _unused(self.folder, stem))
        self.source, self.maps = None, {}


def _unused(folder: Path, stem: str) -> Path:
    """`stem_map.nii.gz`, numbered where another volume of that name came first."""
    candidate, number = folder / f"{stem}_map.nii.gz", 2
    while candidate.exists():
        candidate, number = folder / f"{stem}_map_{number}.nii.gz", number + 1
    return candidate
