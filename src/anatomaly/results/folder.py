"""Judge a whole set of images into a folder: tables, maps, volumes and one report, row by row."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from anatomaly.data.layouts import rows_of
from anatomaly.data.transforms import load
from anatomaly.data.windows import spell_intensity
from anatomaly.detector.conformal import Call, needed_calls, needed_normals, rejected_up_to, threshold, unit_of
from anatomaly.errors import AnatomalyError, ConfigError
from anatomaly.results.dicom_objects import Maker
from anatomaly.results.dicom_out import check_dicom, write_dicom
from anatomaly.results.layers import shrink
from anatomaly.results.marking import Marking
from anatomaly.results.mask_volumes import write_mask_volumes
from anatomaly.results.page import write_report
from anatomaly.results.pooled import write_pooled
from anatomaly.results.rows import Stored, stored_rows
from anatomaly.results.run_record import alone, begin, facts_of, finish
from anatomaly.results.writer import ResultWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from numpy.typing import NDArray

    from anatomaly.detector.detector import Detector
    from anatomaly.tables import Table
    from anatomaly.types import Calibration, Prediction, Sample

_CASES = 200  # shown in the report; their pictures are kept in memory, shrunk


@dataclass(frozen=True)
class Summary:
    """What a run left behind.

    Attributes:
        predictions: One per image, in order, without pictures except for the highest scores.
        report: The HTML file.
        failed: Number of images without a score.
        calls: What was called anomalous at the rates asked for.
        remarks: Lines to tell about p-values, and about images the model has seen.
    """

    predictions: tuple[Prediction, ...]
    report: Path
    failed: int
    calls: tuple[Call, ...] = ()
    remarks: tuple[str, ...] = ()


def predict_to_folder(
    detector: Detector,
    samples: Iterable[str | Path | Sample],
    out: Path,
    *,
    batch_size: int = 16,
    task: str = "task",
    title: str = "Anomaly report",
    bank_images: Sequence[NDArray[np.float32]] = (),
    tables: Sequence[Table] = (),
    maps: bool = True,
    overlays: bool = True,
    dicom: bool = False,
    alpha: float | None = None,
    fdr: float | None = None,
    dependent: bool = False,
    on_progress: Callable[[Prediction], None] = lambda prediction: None,
    on_continue: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Judge images against the detector's support and write scores.csv, scores.jsonl, maps, overlays and report.html.

    A run that was cut short, however that happened, goes on where it stopped when called again with the same model,
    support, images and options, and leaves what it would have left undisturbed (on the same device, with the same
    batch size; else scores of before and after may differ by 1e-5).  Images that could not be read are not tried again.

    The maps of a NIfTI volume are also written as one volume on the source's grid, `maps/NAME_map.nii.gz`, whatever the
    order of its rows; slices that were not judged are NaN there.  An image whose picture or map cannot be made keeps
    its row, with a note.

    Args:
        detector: With its support set.
        samples: Files or manifest rows.
        out: Folder; one that holds a finished run, or an unfinished one of something else, is refused.
        batch_size: Images per forward pass; changes no score.
        task: Task name of items given as files.
        title: Heading of the report.
        bank_images: The support images, each (C, H, W) in [0, 1], for the report.
        tables: More tables for the report.
        maps: Write maps as arrays (and volumes).
        overlays: Write overlays as pictures.
        dicom: Write DICOM objects of DICOM images to OUT/dicom/, see docs/clinic.md.
        alpha: Call images anomalous at this false-positive rate; needs a calibration that fits.
        fdr: Call images of this run so that at most this share of the calls is false on average; likewise.
        dependent: Make `fdr` hold under any dependence between the images (Benjamini-Yekutieli).
        on_progress: Called with every prediction that is made now.
        on_continue: Called once with (images done before, images in all) where an unfinished run goes on.

    Raises:
        NotReadyError: The detector has no support, and its method needs one.
        ConfigError: A rate that the calibration is too small for, or a rate without a calibration that fits.
        OutputError: `out` is refused, or something cannot be written; the rows so far are complete.
    """
    if dicom:
        check_dicom(maps=maps, overlays=overlays)
    out, rows = Path(out), list(rows_of(samples, task=task))
    bank = detector.ready()
    calibration, line = detector.find_calibration()
    for option, rate in (("alpha", alpha), ("fdr", fdr)):
        _check_rate(option, rate, calibration, line)
    facts = facts_of(detector, rows, calibration=calibration, maps=maps, overlays=overlays)
    with alone(out):
        stored = stored_rows(out, rows, batch_size=batch_size) if begin(out, facts) else []
        if stored:
            on_continue(len(stored), len(rows))
        kept = [each.prediction for each in stored]
        highest: list[tuple[float, int]] = []  # heap of (score, -number): what the report shows with pictures
        for number, prediction in enumerate(kept):
            _drop_lowest(highest, number, prediction)
        with ResultWriter(
            out, scale=bank.map_range, support_names=bank.names, maps=maps, overlays=overlays, stored=stored
        ) as writer:
            for prediction in detector.predict(rows[len(stored) :], batch_size=batch_size, task=task):
                prediction = writer.write(with_finite_score(prediction))
                kept.append(replace(prediction, image=None, anomaly_map=None))
                dropped = _drop_lowest(highest, len(kept) - 1, prediction)
                if dropped is not None:
                    kept[dropped] = replace(kept[dropped], image=None, anomaly_map=None)
                if dropped != len(kept) - 1:
                    kept[-1] = shrink(prediction)
                on_progress(prediction)
            told, across = writer.finish(), writer.across
        for number in sorted(-each for _, each in highest if -each < len(stored)):
            kept[number] = shrink(_seen_again(detector, out, stored[number]))
        calls = () if calibration is None else tuple(_calls(kept, calibration, alpha, fdr, dependent))
        report = write_report(
            out / "report.html",
            kept,
            title=title,
            bank_names=bank.names,
            bank_images=bank_images,
            scale=bank.map_range,
            normal_scores=bank.normal_scores,
            about=about_run(detector, bank.task),
            tables=tables,
            calibration=calibration,
            calls=calls,
            max_cases=_CASES,
        )
        marking = None
        if calibration is not None and alpha is not None:
            marking = Marking(alpha, threshold(calibration.scores, alpha), detector.scoring)
            told += write_mask_volumes(out, marking)
        write_pooled(out, kept, calibration)
        if dicom:
            told += write_dicom(out, Maker(detector.facts.name, detector.model_hash, bank.digest), marking, across)
        finish(out, facts)
    remarks = (*([line] if line else []), *told, *_remarks(kept, calibration, fdr, dependent))
    return Summary(tuple(kept), report, sum(p.error is not None for p in kept), calls, remarks)


def _drop_lowest(highest: list[tuple[float, int]], number: int, prediction: Prediction) -> int | None:
    """Put a prediction among those the report shows; returns the number of the one that is shown no more."""
    if prediction.error is not None:
        return None
    heapq.heappush(highest, (prediction.score, -number))  # the report, too, shows ties in order
    return -heapq.heappop(highest)[1] if len(highest) > _CASES else None


def _seen_again(detector: Detector, out: Path, stored: Stored) -> Prediction:
    """A prediction of before with its picture and map, as far as they can be had."""
    prediction, bank = stored.prediction, detector.ready()
    try:
        if stored.row["map"] is not None:
            image = load(prediction.sample, bank.preprocessing).display
            anomaly_map = np.load(out / stored.row["map"], allow_pickle=False)
            return replace(prediction, image=image, anomaly_map=anomaly_map)
        again = next(detector.predict([prediction.sample]))
    except (AnatomalyError, OSError, ValueError):
        return prediction
    return replace(prediction, image=again.image, anomaly_map=again.anomaly_map)


def with_finite_score(prediction: Prediction) -> Prediction:
    """The prediction; one whose score is no number is an error, for it can be neither ranked nor called."""
    if prediction.error is not None or math.isfinite(prediction.score):
        return prediction
    error = f"{prediction.sample.path}: the score is not a finite number. Look at the image."
    return replace(prediction, score=math.nan, error=error, p_value=None, anomaly_map=None, image=None)


def _check_rate(option: str, rate: float | None, calibration: Calibration | None, line: str) -> None:
    """Refuse a rate that nothing can be called at, before anything is written."""
    if rate is None:
        return
    if not 0 < rate < 1:
        raise ConfigError(f"{option}: got {rate}, expected a rate between 0 and 1, such as 0.05.")
    if calibration is None:
        raise ConfigError(f"{option}: {line or 'the model is not calibrated. Run anatomaly calibrate first.'}")
    if calibration.n < (needed := needed_normals(rate)):
        n = calibration.n
        raise ConfigError(
            f"{option}: {rate:.4g} needs a calibration on {needed} or more normal {calibration.unit}s, got {n}: "
            f"no p-value below {1 / (n + 1):.3g} is possible. Calibrate on more (--normals) or ask for a higher rate."
        )


def _units(predictions: Sequence[Prediction], unit: Literal["patient", "scan", "image"]) -> dict[Hashable, list[float]]:
    """The p-values of a run by unit."""
    units: defaultdict[Hashable, list[float]] = defaultdict(list)
    for p in predictions:
        if p.p_value is not None and p.sha256 is not None:
            units[unit_of(p.sample, p.sha256, unit)].append(p.p_value)
    return units


def _calls(
    predictions: Sequence[Prediction],
    calibration: Calibration,
    alpha: float | None,
    fdr: float | None,
    dependent: bool,
) -> Iterable[Call]:
    """The rules asked for; units, not their images, are what false discovery control counts."""
    cuts = [] if alpha is None else [(f"{100 * alpha:.4g} % false-positive rate", alpha)]
    if fdr is not None:
        found = [min(values) for values in _units(predictions, calibration.unit).values()]
        cuts.append((f"{100 * fdr:.4g} % false discovery rate", rejected_up_to(found, fdr, dependent=dependent)))
    for name, p in cuts:
        yield Call(name, p, threshold(calibration.scores, p) if p > 0 else math.inf)


def _remarks(
    predictions: Sequence[Prediction], calibration: Calibration | None, fdr: float | None, dependent: bool
) -> Iterable[str]:
    notes = [each for p in predictions if p.note is not None for each in p.note.split("; ")]
    for note in sorted(set(notes)):
        yield f"{notes.count(note)} of {len(predictions)} images: {note}."
    if calibration is None:
        return
    most = max(calibration.images)
    of_files = _units(predictions, "scan" if calibration.unit == "image" else calibration.unit)
    if larger := sum(len(values) > most for values in of_files.values()):
        yield (
            f"{larger} patients or files have more images than the {most} that calibrated ones have at most: read "
            "their p-values image by image, the smallest of them is not one of the patient."
        )
    m = len(_units(predictions, calibration.unit))
    if fdr is not None and m and (needed := needed_calls(calibration.n, m, fdr, dependent=dependent)) > 1:
        unit = calibration.unit
        yield (
            f"fdr {fdr:.4g}: no fewer than {needed} of these {m} {unit}s can be called, for no p-value is below "
            f"1/{calibration.n + 1}"
            f"{', which cannot be' if needed > m else ''}; with more calibration {unit}s fewer would do."
        )


def about_run(detector: Detector, task: str) -> dict[str, str]:
    """The facts of the model that a reader of the report may need."""
    preprocessing, scoring = detector.preprocessing, detector.scoring
    pooled = f"mean of the highest {100 * scoring.top_fraction:g} %" if scoring.pooling == "topk" else scoring.pooling
    training = detector.facts.training
    about = {
        "Method": detector.facts.name,
        "Teacher": ", ".join(f"{t.name} ({t.weights_hash[:12]})" for t in detector.method.teachers.values()),
        "Model": detector.model_hash[:12],
        "Task": task,
        "Input": f"{preprocessing.size[0]} x {preprocessing.size[1]} pixels, {preprocessing.resize}",
        "Intensity": spell_intensity(detector.ready().preprocessing.intensity),
        "Score": f"geometric mean over levels, each the {pooled}"
        if scoring.levels == "geometric"
        else f"{pooled} of the map, Gaussian blur {scoring.blur:g} pixels",
    }
    if {"best_epoch", "images", "tasks"} <= training.keys():
        more = f" and {training['synthetic']} drawn ones of each built-in task" if training.get("synthetic") else ""
        about["Trained on"] = f"{training['images']} normal images of {', '.join(training['tasks'])}{more}"
    return about
