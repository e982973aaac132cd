"""The settings of a run as frozen records; jsonargparse fills them from YAML files and flags in the top rows only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from anatomaly.types import Intensity, Preprocessing, Scoring


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen backbone.

    Attributes:
        name: efficientnet_lite0 (offline), wide_resnet50_2 (D24FAD's), or timm/<model> for any other timm model.
        weights: auto (file, package, cache or download), random (untrained), or a .pth/.safetensors file.
        normalise: Scale the input by the teacher's own mean and std; D24FAD's release does not.
    """

    name: str = "efficientnet_lite0"
    weights: str = "auto"
    normalise: bool = True


@dataclass(frozen=True)
class MethodConfig:
    """The method and the choices its paper and release make differently.

    Attributes:
        name: d24fad, or nearest (patch nearest neighbours of the teacher; nothing is trained).
        distance: Of the losses: flattened (release) or positionwise (paper).
        softmax_scale: Of learn-to-weight: channels (release) or elements.
        tsd_weight: Weight of the teacher-student loss; the paper's lambda.
    """

    name: Literal["d24fad", "nearest"] = "d24fad"
    distance: Literal["flattened", "positionwise"] = "flattened"
    softmax_scale: Literal["channels", "elements"] = "channels"
    tsd_weight: float = 0.1


@dataclass(frozen=True)
class TrainingConfig:
    """How the student is trained.

    Attributes:
        shots: K, supports per episode.
        epochs: Passes over the training images; 0 leaves the student untrained.
        batch_size: Episodes per step.
        learning_rate: Of Adam.
        resample: Draw new supports every epoch; False draws them once (release).
        validation: Share of each task's normals held out to choose the checkpoint, where there is no val split.
        validate_every: Epochs between validations.
        gradient_clip: Largest gradient norm; 0 switches clipping off.
        precision: fp32 or bf16.
        device: auto, cpu or cuda.
        cache_gib: Memory for the teacher's features, computed once per image; 0 computes them at every step.
        seed: Of everything random.
    """

    shots: int = 4
    epochs: int = 70
    batch_size: int = 16
    learning_rate: float = 1e-4
    resample: bool = True
    validation: float = 0.1
    validate_every: int = 5
    gradient_clip: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache_gib: float = 4.0
    seed: int = 111


@dataclass(frozen=True)
class FitConfig:
    """Everything `fit` depends on besides the images; stored with the run and compared when it resumes.

    Attributes:
        teacher: The frozen backbone.
        method: The method.
        preprocessing: From file to network input.
        task_intensity: Intensity rules of tasks that need another one than `preprocessing.intensity`.
        scoring: From maps to scores.
        training: How the student is trained.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    task_intensity: dict[str, Intensity] = field(default_factory=dict)
    scoring: Scoring = field(default_factory=Scoring)
    training: TrainingConfig = field(default_factory=TrainingConfig)
