"""Checkpoints of the two official releases, turned into detectors with the releases' settings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from anatomaly.backbones import build_backbone
from anatomaly.backbones.weights import read_state
from anatomaly.config import MethodConfig, PDDConfig
from anatomaly.detector.detector import Detector
from anatomaly.errors import WeightsError
from anatomaly.methods import D24FAD, PDD
from anatomaly.methods.d24fad import import_d24fad
from anatomaly.methods.pdd import import_pdd
from anatomaly.types import Preprocessing, Scoring


def import_checkpoint(
    file: str | Path,
    *,
    method: Literal["d24fad", "pdd"] = "d24fad",
    teacher_weights: str = "auto",
    global_teacher_weights: str = "auto",
    device: str = "auto",
) -> Detector:
    """Turn an official checkpoint into a detector with the release's settings.

    Args:
        file: As the release saves it: ``{"decoder": ..., "weight": ...}`` (D24FAD), or the decoder's state dict (PDD).
        method: "d24fad" or "pdd".
        teacher_weights: Of WideResNet-50-2: "auto", "random" or a file.
        global_teacher_weights: Of PDD's VMamba-Tiny: likewise.
        device: Where to compute.

    Raises:
        WeightsError: The file or a teacher's weights cannot be used.
    """
    file = Path(file)
    if not file.is_file():
        raise WeightsError(f"{file}: no such file. Pass a checkpoint of the {method} release.")
    checkpoint = read_state(file)  # before the teachers, which may have to be downloaded
    if method == "d24fad":
        student = D24FAD(build_backbone("wide_resnet50_2", weights=teacher_weights, normalise=False))
        import_d24fad(checkpoint, student, where=str(file))
        facts = {"method": asdict(MethodConfig()), "teacher": student.teacher.facts()}
        return Detector(student, preprocessing=Preprocessing(), scoring=Scoring(), facts=facts, device=device)
    local = build_backbone("timm/wide_resnet50_2.racm_in1k", weights=teacher_weights)
    far = build_backbone("vmamba_tiny_merged", weights=global_teacher_weights)
    settings = MethodConfig("pdd", pdd=PDDConfig(shared_students=True, cosine_sign="release"))
    pdd = PDD(local, far, **asdict(settings.pdd))
    import_pdd(checkpoint, pdd, where=str(file))
    facts = {"method": asdict(settings), "teacher": local.facts(), "global_teacher": far.facts()}
    preprocessing = Preprocessing(size=(256, 256), interpolation="bilinear")
    return Detector(pdd, preprocessing=preprocessing, scoring=Scoring(), facts=facts, device=device)
