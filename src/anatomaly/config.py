"""The settings of a run as frozen records; jsonargparse fills them from YAML files and flags in the top rows only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from anatomaly.errors import ConfigError, NotReadyError
from anatomaly.types import Intensity, Preprocessing, Scoring

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen backbone.

    Attributes:
        name: efficientnet_lite0 or efficientnet_lite2 (offline), wide_resnet50_2 (both papers'), vmamba_tiny_merged
            (PDD's global one), or timm/<model> for any other timm model.
        weights: auto (file, package, cache or download), random (untrained), or a .pth/.safetensors file.
        normalise: Scale the input by the teacher's own mean and std; D24FAD's release does not.
    """

    name: str = "efficientnet_lite0"
    weights: str = "auto"
    normalise: bool = True

    def __post_init__(self) -> None:
        """Refuse values of another type with a ConfigError: those of a bundle may have been edited."""
        for name, kind in (("name", str), ("weights", str), ("normalise", bool)):
            value = getattr(self, name)
            _check(f"teacher.{name}", repr(value), isinstance(value, kind), f"a {kind.__name__}")


@dataclass(frozen=True)
class PDDConfig:
    """PDD's parts, weights and thresholds; the defaults are the paper's.

    Attributes:
        shared_students: Both students are one network (release); False gives each its own weights (paper).
        cosine_sign: paper pulls the prior-injected student towards the target, release pushes it away.
        detach_targets: Keep the losses' gradients out of the adapters that make the targets.
        mpa: Inject the manifold priors.
        two_students: False leaves one student and no diversity loss.
        reconstruction_weight: Of the mean squared errors between students and targets.
        cosine_weight: Of the cosine between the prior-injected student and the targets.
        diversity_weight: Of the relation between the students.
        relation: diverse (the paper's hinge loss) or alike (its counter-test).
        tau_low: Cosine above which the students' shallow levels are pushed apart.
        tau_high: Cosine below which their other levels are pulled together.
        low_levels: Number of shallow levels.
    """

    shared_students: bool = False
    cosine_sign: Literal["paper", "release"] = "paper"
    detach_targets: bool = False
    mpa: bool = True
    two_students: bool = True
    reconstruction_weight: float = 0.02
    cosine_weight: float = 0.05
    diversity_weight: float = 0.5
    relation: Literal["diverse", "alike"] = "diverse"
    tau_low: float = 0.75
    tau_high: float = 0.30
    low_levels: int = 1

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        _check_words(self, "method.pdd")
        for name in ("shared_students", "detach_targets", "mpa", "two_students"):
            value = getattr(self, name)
            _check(f"method.pdd.{name}", value, isinstance(value, bool), "true or false")
        for name in ("reconstruction_weight", "cosine_weight", "diversity_weight"):
            value = getattr(self, name)
            _check(f"method.pdd.{name}", value, 0 <= value < math.inf, "at least 0")
        for name in ("tau_low", "tau_high"):
            value = getattr(self, name)
            _check(f"method.pdd.{name}", value, -1 <= value <= 1, "a cosine from -1 to 1")
        _check("method.pdd.low_levels", self.low_levels, self.low_levels in (0, 1, 2, 3), "0 to 3")


@dataclass(frozen=True)
class AttentionConfig:
    """Parts of patch attention that can be left out, to see what each is worth (docs/better.md).

    Attributes:
        mirrored: The supports' mirror images (left and right exchanged) are supports too.
        resized: The supports a tenth larger and a tenth smaller are supports too.
        surroundings: Every place is judged against its surroundings; False takes its distance as it is.
        teacher_levels: Number of shallow levels of which the teacher's own nearest patches count as well.
        deepest: What the deepest level counts, times what it learned to count.
    """

    mirrored: bool = True
    resized: bool = True
    surroundings: bool = True
    teacher_levels: int = 3
    deepest: float = 2.0

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        for name in ("mirrored", "resized", "surroundings"):
            value = getattr(self, name)
            _check(f"method.attention.{name}", value, isinstance(value, bool), "true or false")
        levels = self.teacher_levels
        _check("method.attention.teacher_levels", levels, levels in (0, 1, 2, 3, 4), "0 to 4")
        _check("method.attention.deepest", self.deepest, 0 <= self.deepest < math.inf, "at least 0")


@dataclass(frozen=True)
class MethodConfig:
    """The method and the choices its paper and release make differently.

    Attributes:
        name: attention (few-shot; docs/better.md), d24fad (few-shot), pdd (one-class), or nearest (patch nearest
            neighbours; nothing is trained).
        distance: Of the losses: flattened (release) or positionwise (paper).
        softmax_scale: Of learn-to-weight: channels (release) or elements.
        tsd_weight: Weight of the teacher-student loss; the paper's lambda.
        self_distillation: False trains and scores against the teacher alone (an ablation).
        learn_to_weight: False gives all supports the same weight (an ablation).
        pdd: Of PDD.
        attention: Of patch attention; all before `pdd` are D24FAD's.
    """

    name: Literal["attention", "d24fad", "pdd", "nearest"] = "d24fad"
    distance: Literal["flattened", "positionwise"] = "flattened"
    softmax_scale: Literal["channels", "elements"] = "channels"
    tsd_weight: float = 0.1
    self_distillation: bool = True
    learn_to_weight: bool = True
    pdd: PDDConfig = field(default_factory=PDDConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        _check_words(self, "method")
        _check("method.tsd_weight", self.tsd_weight, 0 <= self.tsd_weight < math.inf, "at least 0")
        for name in ("self_distillation", "learn_to_weight"):
            _check(f"method.{name}", getattr(self, name), isinstance(getattr(self, name), bool), "true or false")


@dataclass(frozen=True)
class TrainingConfig:
    """How the student is trained.

    Attributes:
        shots: K, supports per episode; one-class methods have none.
        epochs: Passes over the training images, of attention 100 batches each; 0 leaves the student untrained.
        batch_size: Episodes per step.
        synthetic: Of attention: normal images of each of the five built-in tasks that are trained on as well, unless
            the data are built-in ones themselves.
        learning_rate: Of Adam, at the start.
        schedule: constant, or cosine: down to a tenth in `cosine_epochs` epochs, up again in as many, and so on.
        cosine_epochs: Half a period of the cosine.
        resample: Draw new supports every epoch; False draws them once (release).
        validation: Share of each task's normals held out to choose the checkpoint, where there is no val split.
        validate_every: Epochs between validations.
        gradient_clip: Largest gradient norm; 0 switches clipping off.
        precision: fp32 or bf16.
        device: auto, cpu or cuda.
        cache_gib: Memory for the teachers' features, computed once per image; 0 computes them at every step.
        cache_disk_gib: Disk for those that memory cannot hold, kept for later runs; rounds all features to float16.
        keep_checkpoints: Keep the weights of every validated epoch, for `anatomaly audit`; changes no number.
        seed: Of everything random.
    """

    shots: int = 4
    epochs: int = 70
    batch_size: int = 16
    synthetic: int = 0
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    cosine_epochs: int = 40
    resample: bool = True
    validation: float = 0.1
    validate_every: int = 5
    gradient_clip: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache_gib: float = 4.0
    cache_disk_gib: float = 0.0
    keep_checkpoints: bool = False
    seed: int = 111

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        _check_words(self, "training")
        counts = ("shots", "batch_size", "validate_every", "cosine_epochs")
        for name, lowest in (*((count, 1) for count in counts), ("epochs", 0), ("synthetic", 0), ("seed", 0)):
            value = getattr(self, name)
            _check(f"training.{name}", value, lowest <= value < 2**31, f"{lowest} or more, and less than 2**31")
        _check("training.learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "more than 0")
        _check("training.validation", self.validation, 0 < self.validation < 1, "a share between 0 and 1")
        _check("training.gradient_clip", self.gradient_clip, 0 <= self.gradient_clip < math.inf, "at least 0")
        for name in ("cache_gib", "cache_disk_gib"):
            _check(f"training.{name}", getattr(self, name), getattr(self, name) >= 0, "at least 0")
        kept = self.keep_checkpoints
        _check("training.keep_checkpoints", kept, isinstance(kept, bool), "true or false")


@dataclass(frozen=True)
class FitConfig:
    """Everything `fit` depends on besides the images; stored with the run and compared when it resumes.

    Attributes:
        teacher: The frozen backbone; PDD's local one.
        global_teacher: PDD's second frozen backbone; name none leaves plain reverse distillation.
        method: The method.
        preprocessing: From file to network input.
        task_intensity: Intensity rules of tasks that need another one than `preprocessing.intensity`.
        scoring: From maps to scores.
        training: How the student is trained.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    global_teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig("efficientnet_lite2"))
    method: MethodConfig = field(default_factory=MethodConfig)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    task_intensity: dict[str, Intensity] = field(default_factory=dict)
    scoring: Scoring = field(default_factory=Scoring)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        check_preprocessing(self.preprocessing)
        check_scoring(self.scoring)
        for task, intensity in self.task_intensity.items():
            check_intensity(intensity, f"task_intensity.{task}")


def with_later_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recorded run as this version would have recorded them.

    Args:
        recorded: `asdict` of the `FitConfig` it was made with, possibly older than some settings.

    Returns:
        A copy with the settings it lacks; a setting whose default changed what a run does is never filled in.
    """
    later_settings: Mapping[str, Mapping[str, object]] = {
        "method": {"attention": asdict(AttentionConfig())},  # no run is older than these and of that method
        "training": {"keep_checkpoints": False, "synthetic": 0},
    }
    filled = {
        group: {**later, **recorded[group]}
        for group, later in later_settings.items()
        if isinstance(recorded.get(group), dict)
    }
    return {**recorded, **filled}


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, as `training.epochs 70, now 5`; of digests only that they do.

    Args:
        found: Recorded settings; those it lacks count as None.
        wanted: The settings of now.
        prefix: What the names start with.
    """
    lines: list[str] = []
    for key in wanted:
        old, new = found.get(key), wanted[key]
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            digests = {"data": "other images", "supports": "other supports"}
            lines.append(digests.get(key) or f"{prefix}{key} {old}, now {new}")
    return lines


def check_stored(facts: Mapping[str, Any], where: str) -> None:
    """Hold the settings of a stored model to the same ranges as those of `fit`: somebody may have edited the file.

    Args:
        facts: What `detector.bundle.read_config` returned.
        where: The file, for the message.

    Raises:
        NotReadyError: A value is out of range or of another type.
    """
    try:
        teachers = {
            role: TeacherConfig(**{key: facts[role][key] for key in ("name", "weights", "normalise")})
            for role in ("teacher", "global_teacher")
            if role in facts
        }
        FitConfig(
            teacher=teachers["teacher"],
            global_teacher=teachers.get("global_teacher", TeacherConfig("none")),
            method=MethodConfig(
                **{
                    **facts["method"],
                    "pdd": PDDConfig(**facts["method"]["pdd"]),
                    "attention": AttentionConfig(**facts["method"]["attention"]),
                }
            ),
            preprocessing=facts["preprocessing"],
            task_intensity=facts["task_intensity"],
            scoring=facts["scoring"],
        )
    except (ConfigError, TypeError, ValueError) as err:
        raise NotReadyError(f"{where}: is damaged ({err}) Copy the whole bundle again.") from err


def check_preprocessing(preprocessing: Preprocessing) -> None:
    """Refuse settings that no image can be prepared with.

    Raises:
        ConfigError: A value is out of range; whether the size fits the teacher is not known here.
    """
    _check_words(preprocessing, "preprocessing")
    sides = preprocessing.size
    _check("preprocessing.size", sides, 0 < min(sides) <= max(sides) <= 8192, "height and width from 1 to 8192")
    check_intensity(preprocessing.intensity, "preprocessing.intensity")


def check_intensity(intensity: Intensity, where: str) -> None:
    """Refuse a rule that maps no range of values to [0, 1].

    Args:
        intensity: The rule; "auto" has no numbers to check.
        where: Name of the setting, for the message.

    Raises:
        ConfigError: The rule is unknown or its numbers make no sense.
    """
    _check_words(intensity, where)
    low, high = intensity.low, intensity.high
    valid, expected = {
        "auto": (True, ""),
        "window": (math.isfinite(low) and 0 < high < math.inf, "centre and a width above 0"),
        "range": (-math.inf < low < high < math.inf, "lowest below highest"),
        "percentile": (0 <= low < high <= 100, "0 <= lower < upper <= 100"),
    }[intensity.rule]
    _check(f"{where}: {intensity.rule}", f"{low:g} and {high:g}", valid, expected)


def check_scoring(scoring: Scoring) -> None:
    """Refuse a blur or pooling that cannot be computed.

    Raises:
        ConfigError: A value is out of range.
    """
    _check_words(scoring, "scoring")
    _check("scoring.blur", scoring.blur, 0 <= scoring.blur < math.inf, "at least 0")
    _check("scoring.top_fraction", scoring.top_fraction, 0 < scoring.top_fraction <= 1, "above 0 and at most 1")


def _check_words(settings: Any, where: str) -> None:
    """Compare the fields that take one of a few words with these words."""
    for name, kind in get_type_hints(type(settings)).items():
        words, value = get_args(kind), getattr(settings, name)
        if words and isinstance(words[0], str):
            _check(f"{where}.{name}", value, value in words, f"one of {', '.join(words)}")


def _check(where: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ConfigError(f"{where}: got {value}, expected {expected}.")
