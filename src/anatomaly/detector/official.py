"""Checkpoints of official releases, turned into detectors with the releases' settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from anatomaly.backbones import build_backbone
from anatomaly.backbones.weights import read_state
from anatomaly.detector.detector import Detector
from anatomaly.detector.facts import ModelFacts
from anatomaly.errors import ConfigError, WeightsError
from anatomaly.methods import METHODS, build_method
from anatomaly.methods.table import imported
from anatomaly.presets import load_preset


def import_checkpoint(
    file: str | Path,
    method: str,
    *,
    teacher_weights: str = "auto",
    global_teacher_weights: str = "auto",
    device: str = "auto",
) -> Detector:
    """Turn an official checkpoint into a detector with the release's settings.

    Args:
        file: As the release saves it: ``{"decoder": ..., "weight": ...}`` (D24FAD), or the decoder's state dict (PDD).
        method: A method whose record names a release.
        teacher_weights: Of its teacher: "auto", "random" or a file.
        global_teacher_weights: Of its second teacher: likewise.
        device: Where to compute.

    Raises:
        ConfigError: There is no release of this method.
        WeightsError: The file or a teacher's weights cannot be used.
    """
    file, record = Path(file), METHODS[method]
    if not record.release:
        raise ConfigError(f"import: {method} has no official release. Train it with `anatomaly fit`.")
    if not file.is_file():
        raise WeightsError(f"{file}: no such file. Pass a checkpoint of the {method} release.")
    checkpoint = read_state(file)  # before the teachers, which may have to be downloaded
    config = load_preset(record.release)
    wanted = [
        replace(config.teacher, weights=teacher_weights),
        replace(config.global_teacher, weights=global_teacher_weights),
    ]
    teachers = [
        build_backbone(each.name, weights=each.weights, normalise=each.normalise, blocks=each.blocks)
        for each in wanted[: record.teachers]
    ]
    built = build_method(method, teachers, config.method.settings)
    imported(record.load_release)(checkpoint, built, where=str(file))
    return Detector(
        built,
        preprocessing=config.preprocessing,
        scoring=config.scoring,
        facts=ModelFacts.of(config.method, built),
        device=device,
    )
