"""Calibrate a model on images known to be normal, so that `predict` can give p-values; see docs/calibration.md."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from anatomaly.data.layouts import rows_of
from anatomaly.data.transforms import load
from anatomaly.detector.conformal import Exchangeability, exchangeability, unit_of
from anatomaly.errors import ConfigError, NotReadyError
from anatomaly.types import Calibration, Prediction

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence
    from pathlib import Path

    from anatomaly.detector.detector import Detector
    from anatomaly.types import Intensity, Sample, SupportBank

_BATCH = 16


class Calibrated(NamedTuple):
    """What `calibrate` returns.

    Attributes:
        calibration: In use by the detector from here, unless it holds a better one of the same setting (see
            `conformal.best_fit`); `Detector.save_calibrations` stores both in the bundle.
        left_out: Images that could not be used, each with its `error`.
    """

    calibration: Calibration
    left_out: tuple[Prediction, ...]


class _Scored(NamedTuple):
    sample: Sample
    sha256: str
    score: float


def calibrate(
    detector: Detector,
    normals: Iterable[str | Path | Sample],
    *,
    supports: Iterable[Sample] = (),
    batch_size: int = _BATCH,
    replace_all: bool = False,
    on_progress: Callable[[Prediction], None] = lambda prediction: None,
) -> Calibrated:
    """Score held-out normal images against the current support and keep the scores for p-values.

    Patients are the units where every row names one, else files; files of one image each count as images.

    Args:
        detector: With its support set (or its task, for a method without support).
        normals: Files or manifest rows, all normal, of images that neither trained the model nor are its supports.
        supports: Rows of the support, where they are at hand, to make sure that no patient is in both.
        batch_size: Images per forward pass; changes no score.
        replace_all: Forget every earlier calibration of this setting, also a better one.
        on_progress: Called with every prediction.

    Returns:
        The calibration, and the images that were left out: unreadable ones and copies of one that is counted already.

    Raises:
        NotReadyError: The detector has no support, and its method needs one.
        ConfigError: No image can be used, one is labelled anomalous or is a support, a patient is in both, some rows
            name a patient and others do not, or the rows are of several tasks.
    """
    bank = detector.ready()
    samples = _normal_rows(normals, bank.task, "normals")
    known = {row.patient_id for row in supports} - {None}
    if shared := sum(row.patient_id in known for row in samples):
        raise ConfigError(
            f"normals: {shared} images are of patients who are in the support too; expected other patients, for images "
            "of one patient resemble each other. Leave them out."
        )
    scored, left_out = _score(detector, bank, samples, batch_size, on_progress)
    unit, units = _units(scored)
    calibration = _filled(detector.setting(bank), units, unit=unit, kind="held-out", guarantee="exact")
    detector.calibrate_with(calibration, replace_all=replace_all)
    return Calibrated(calibration, tuple(left_out))


def calibrate_on_support(
    detector: Detector,
    supports: Iterable[str | Path | Sample],
    *,
    task: str = "task",
    intensity: Intensity | None = None,
    replace_all: bool = False,
) -> Calibrated:
    """Set K normal images as support and calibrate on them alone: each is scored against the others.

    For methods whose record says `conservative_leave_one_out` the p-values hold (an image scored against fewer supports
    can only score higher); for others they are approximate.  All images of a patient, or of a file, are left out
    together.

    Args:
        detector: Of a method with support; its support is replaced.
        supports: As in `Detector.set_support`.
        task: Name of the task.
        intensity: As in `Detector.set_support`.
        replace_all: As in `calibrate`.

    Raises:
        ReadError: A support image cannot be read.
        ConfigError: As `Detector.set_support`, or all images are of one patient or file, so nothing is left to compare.
    """
    rows = _normal_rows(supports, task, "support")
    detector.set_support(rows, task=task, intensity=intensity)
    bank = detector.ready()
    scored = [_Scored(row, sha256, math.nan) for row, sha256 in zip(rows, bank.sha256, strict=True)]
    unit, units = _units(scored)
    if len(units) < 2:
        raise ConfigError(
            f"support: {len(rows)} images of 1 {unit}, expected at least 2 to score each against the others. Give "
            "more, or calibrate on other normal images with --normals."
        )
    encoded = [level.cpu() for level in detector.encode([load(row, bank.preprocessing).input for row in rows])]
    position = {sha256: k for k, sha256 in enumerate(bank.sha256)}
    for key, members in units.items():
        own = [position[each.sha256] for each in members]
        others = [k for k in range(len(rows)) if k not in own]
        rest = replace(bank, tensors={name: tensor[others] for name, tensor in bank.tensors.items()})
        scores = detector.compare([level[own].to(detector.device) for level in encoded], rest).scores.tolist()
        units[key] = [each._replace(score=score) for each, score in zip(members, scores, strict=True)]
    rule = intensity or detector.task_intensity.get(task, detector.preprocessing.intensity)
    # A percentile rule has looked at the image that is left out.
    sound = detector.facts.record.conservative_leave_one_out and rule.rule != "percentile"
    calibration = _filled(
        detector.setting(bank),
        units,
        unit=unit,
        kind="leave-one-out",
        guarantee="conservative" if sound else "approximate",
    )
    detector.calibrate_with(calibration, replace_all=replace_all)
    return Calibrated(calibration, ())


def check(
    detector: Detector,
    normals: Iterable[str | Path | Sample],
    *,
    batch_size: int = _BATCH,
    on_progress: Callable[[Prediction], None] = lambda prediction: None,
) -> tuple[Exchangeability, int]:
    """Ask whether other normals, such as those of a new scanner, still score like those calibrated on.

    Args:
        detector: With its support set and a calibration that fits it.
        normals: As in `calibrate`; those calibrated on are left out.
        batch_size: Images per forward pass; changes no score.
        on_progress: Called with every prediction.

    Returns:
        The two tests, and the number of units they rest on.

    Raises:
        NotReadyError: There is no calibration that fits.
        ConfigError: As `calibrate`, the calibration is one of leave-one-out, or the images name patients and the
            calibration does not (or the reverse).
    """
    calibration, line = detector.find_calibration()
    if calibration is None:
        raise NotReadyError(line or "check: the model holds no calibration. Run anatomaly calibrate first.")
    if calibration.kind == "leave-one-out":
        raise ConfigError(
            "check: the supports were judged by one another, which gives higher scores than new images get; expected a "
            "calibration on held-out normals. Run anatomaly calibrate with --normals."
        )
    bank = detector.ready()
    samples = _normal_rows(normals, bank.task, "check")
    scored, _ = _score(detector, bank, samples, batch_size, on_progress)
    scored = [each for each in scored if each.sha256 not in calibration.sha256]
    unit, units = _units(scored, "check")
    if unit != calibration.unit:
        raise ConfigError(
            f"check: the units are {unit}s, those of the calibration {calibration.unit}s; expected the same kind. Give "
            "patient_id for both or for neither, and as many images of each."
        )
    return exchangeability(calibration.scores, _highest(units)), len(units)


def _normal_rows(items: Iterable[str | Path | Sample], task: str, where: str) -> list[Sample]:
    rows = list(rows_of(items, task=task))
    if not rows:
        raise ConfigError(f"{where}: got no images, expected at least 1 normal image. Check the folder or table.")
    if anomalous := sum(row.label == 1 for row in rows):
        raise ConfigError(
            f"{where}: {anomalous} of {len(rows)} rows are labelled anomalous, expected normal images only."
        )
    if len(tasks := {row.task for row in rows}) > 1:
        raise ConfigError(f"{where}: rows of {len(tasks)} tasks, expected one at a time. Name it with --task.")
    unnamed = sum(row.patient_id is None for row in rows)
    if 0 < unnamed < len(rows):
        raise ConfigError(
            f"{where}: {unnamed} of {len(rows)} rows name no patient; patients are the unit, so expected a patient_id "
            "in all rows or in none. Fill the column or leave these rows out."
        )
    return rows


def _score(
    detector: Detector,
    bank: SupportBank,
    samples: Sequence[Sample],
    batch_size: int,
    on_progress: Callable[[Prediction], None],
) -> tuple[list[_Scored], list[Prediction]]:
    scored: dict[str, _Scored] = {}
    left_out = []
    for prediction in detector.predict(samples, batch_size=batch_size, task=bank.task):
        on_progress(prediction)
        sha256, name = prediction.sha256, prediction.sample.name
        bare = replace(prediction, image=None, anomaly_map=None, support_weights=None)
        if prediction.error is not None or sha256 is None:
            left_out.append(bare)
        elif sha256 in bank.sha256:
            raise ConfigError(f"normals: {name} is one of the support images, expected other images. Leave it out.")
        elif sha256 in scored:
            copy = f"{name}: the same image as {scored[sha256].sample.name}, which is counted already."
            left_out.append(replace(bare, error=copy))
        elif not math.isfinite(prediction.score):
            left_out.append(replace(bare, error=f"{name}: the score is not a finite number."))
        else:
            scored[sha256] = _Scored(prediction.sample, sha256, prediction.score)
    if not scored:
        first = f" The first: {left_out[0].error}" if left_out else ""
        raise ConfigError(f"normals: none of {len(samples)} images can be used, expected at least 1.{first}")
    return list(scored.values()), left_out


def _units(
    scored: Sequence[_Scored], where: str = "normals"
) -> tuple[Literal["patient", "scan", "image"], dict[Hashable, list[_Scored]]]:
    """Group images by patient where known, else by file; the kind is "image" where no file gave two."""
    if not scored:
        raise ConfigError(f"{where}: no image is left that was not calibrated on. Give other images.")
    unit: Literal["patient", "scan", "image"] = "patient" if scored[0].sample.patient_id is not None else "scan"
    if unit == "scan" and max(Counter(unit_of(s.sample, s.sha256, "scan") for s in scored).values()) == 1:
        unit = "image"
    units: dict[Hashable, list[_Scored]] = {}
    for each in scored:
        units.setdefault(unit_of(each.sample, each.sha256, unit), []).append(each)
    return unit, units


def _highest(units: dict[Hashable, list[_Scored]]) -> list[float]:
    return [max(each.score for each in members) for members in units.values()]


def _filled(
    setting: Calibration,
    units: dict[Hashable, list[_Scored]],
    *,
    unit: Literal["patient", "scan", "image"],
    kind: Literal["held-out", "leave-one-out"],
    guarantee: Literal["exact", "conservative", "approximate"],
) -> Calibration:
    pairs = sorted(zip(_highest(units), map(len, units.values()), strict=True))
    return replace(
        setting,
        kind=kind,
        guarantee=guarantee,
        unit=unit,
        scores=tuple(score for score, _ in pairs),
        images=tuple(count for _, count in pairs),
        sha256=tuple(sorted(each.sha256 for members in units.values() for each in members)),
    )


def sizes(calibration: Calibration) -> str:
    """How many images the units hold, such as "1 to 3 images"; empty where they are images."""
    low, high = int(np.min(calibration.images)), int(np.max(calibration.images))
    return "" if high == 1 else f"{low} to {high} images" if low < high else f"{high} images"
