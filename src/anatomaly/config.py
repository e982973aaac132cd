"""The settings of a run as frozen records; jsonargparse fills them from YAML files and flags in the top rows only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from anatomaly.errors import ConfigError, check, check_words
from anatomaly.methods import METHODS
from anatomaly.methods.settings import D24FADSettings
from anatomaly.types import Intensity, Preprocessing, Scoring

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen backbone.

    Attributes:
        name: efficientnet_lite0 or efficientnet_lite2 (offline), wide_resnet50_2 (both papers'), vmamba_tiny_merged
            (PDD's global one), or timm/<model> for any other timm model, vision transformers included.
        weights: auto (file, package, cache or download), random (untrained), or a .pth/.safetensors file.
        normalise: Scale the input by the teacher's own mean and std; D24FAD's release does not.
        blocks: Of a model of one stride, such as a vision transformer: which four blocks are its levels, ascending,
            from 0. Without: spread evenly, such as 2, 5, 8, 11 of 12.
    """

    name: str = "efficientnet_lite0"
    weights: str = "auto"
    normalise: bool = True
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse values of another type with a ConfigError: those of a bundle may have been edited."""
        for name, kind in (("name", str), ("weights", str), ("normalise", bool)):
            value = getattr(self, name)
            check(f"teacher.{name}", repr(value), isinstance(value, kind), f"a {kind.__name__}")
        if self.blocks is None:
            return
        blocks = tuple(self.blocks) if isinstance(self.blocks, (tuple, list)) else ()
        ascending = len(blocks) == 4 and all(map(_whole, blocks)) and blocks[0] >= 0
        ascending = ascending and all(low < high for low, high in pairwise(blocks))
        check("teacher.blocks", repr(self.blocks), ascending, "four ascending whole numbers from 0")
        object.__setattr__(self, "blocks", blocks)


#: Settings that bundles and runs of before spelled beside the name, whatever the method.
_FORMER = {each.name for each in fields(D24FADSettings)}


@dataclass(frozen=True)
class MethodConfig:
    """A method and its settings.

    Attributes:
        name: A name in `methods.METHODS`: of a built-in method or of an installed package.
        settings: A record of the method's own class (`METHODS[name].settings`); None takes its defaults.

    Example:
        >>> name = METHODS.built_in[0]
        >>> MethodConfig(name).as_dict().keys() == {"name", name}
        True
    """

    name: str
    settings: Any = None

    def __post_init__(self) -> None:
        """Refuse an unknown name, or settings of another method, with a ConfigError."""
        kind = METHODS[self.name].settings
        if self.settings is None:
            object.__setattr__(self, "settings", kind())
        given = type(self.settings).__name__
        check(f"method.{self.name}", f"a {given}", isinstance(self.settings, kind), f"a {kind.__name__}")

    def as_dict(self) -> dict[str, Any]:
        """As it is spelled in YAML files, recorded runs and bundles: the settings stand under the method's name."""
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.settings).items()}
        return {"name": self.name, self.name: own}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> MethodConfig:
        """The reverse; settings of other methods are ignored, and those missing take their defaults.

        Raises:
            ConfigError: The name is unknown or a value is out of range.
            KeyError, TypeError: It is no such mapping.
        """
        name, others = facts["name"], {key: value for key, value in facts.items() if key != "name"}
        kind = METHODS[name].settings
        if unknown := [key for key in others if key not in METHODS and key not in _FORMER]:
            raise ConfigError(f"method: unknown setting {unknown[0]!r}, expected name and {name}.")
        if name not in others:  # bundles and runs of before spelled one method's settings beside the name
            known = {each.name for each in fields(kind)}
            return cls(name, kind(**{key: value for key, value in others.items() if key in known}))
        return cls(name, kind(**others[name]))


@dataclass(frozen=True)
class TrainingConfig:
    """How the student is trained.

    Attributes:
        shots: K, supports per episode; one-class methods have none.
        epochs: Passes over the training images, or 100 batches each where a method learns from lesions; 0 leaves it
            untrained.
        batch_size: Episodes per step, over all devices and all parts that `accumulate` makes.
        accumulate: Parts a batch is taken in, one after the other, where it does not fit in memory as a whole; batch
            norms see one part at a time.
        synthetic: For methods that learn from lesions: normal images of each of the five built-in tasks that are
            trained on as well, unless the data are built-in ones themselves.
        learning_rate: Of Adam, at the start.
        schedule: constant, or cosine: down to a tenth in `cosine_epochs` epochs, up again in as many, and so on.
        cosine_epochs: Half a period of the cosine.
        resample: Draw new supports every epoch; False draws them once (release).
        validation: Share of each task's normals held out to choose the checkpoint, where there is no val split.
        validate_every: Epochs between validations.
        gradient_clip: Largest gradient norm; 0 switches clipping off.
        precision: fp32, or bf16: faster on GPUs and on CPUs that have instructions for it, far slower on others.
        device: auto, cpu or cuda.
        devices: Processes that share each batch, one a GPU; auto takes all GPUs, and one process on a CPU.
        strategy: ddp trains in processes of their own, auto does so where there are several devices.
        cache_gib: Memory of each process for the teachers' features, computed once per image; 0 computes them at every
            step.
        cache_disk_gib: Disk for those that memory cannot hold, kept for later runs; rounds all features to float16.
        keep_checkpoints: Keep the weights of every validated epoch, for `anatomaly audit`; changes no number.
        seed: Of everything random.
    """

    shots: int = 4
    epochs: int = 70
    batch_size: int = 16
    accumulate: int = 1
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
    devices: int | Literal["auto"] = 1
    strategy: Literal["auto", "ddp"] = "auto"
    cache_gib: float = 4.0
    cache_disk_gib: float = 0.0
    keep_checkpoints: bool = False
    seed: int = 111

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        check_words(self, "training")
        counts = ("shots", "batch_size", "accumulate", "validate_every", "cosine_epochs")
        for name, lowest in (*((count, 1) for count in counts), ("epochs", 0), ("synthetic", 0), ("seed", 0)):
            value = getattr(self, name)
            check(f"training.{name}", value, lowest <= value < 2**31, f"{lowest} or more, and less than 2**31")
        check("training.learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "more than 0")
        check("training.validation", self.validation, 0 < self.validation < 1, "a share between 0 and 1")
        check("training.gradient_clip", self.gradient_clip, 0 <= self.gradient_clip < math.inf, "at least 0")
        for name in ("cache_gib", "cache_disk_gib"):
            check(f"training.{name}", getattr(self, name), getattr(self, name) >= 0, "at least 0")
        whole = type(self.devices) is int and 1 <= self.devices < 2**31
        check("training.devices", repr(self.devices), whole or self.devices == "auto", "1 or more, or auto")
        self.check_parts(1 if self.devices == "auto" else self.devices)
        kept = self.keep_checkpoints
        check("training.keep_checkpoints", kept, isinstance(kept, bool), "true or false")

    def check_parts(self, devices: int) -> None:
        """Refuse with a ConfigError a batch that so many devices and `accumulate` do not cut into equal parts."""
        parts = devices * self.accumulate
        fewer = self.batch_size // parts * parts
        near = f"{fewer} or {fewer + parts}" if fewer else f"{parts}"
        expected = f"a multiple of devices x accumulate, {devices} x {self.accumulate}, such as {near}"
        check("training.batch_size", self.batch_size, self.batch_size == fewer, expected)


@dataclass(frozen=True)
class FitConfig:
    """Everything `fit` depends on besides the images; stored with the run and compared when it resumes.

    Only the method has to be named.  The other defaults suit no method in particular: `presets.load_preset` returns
    those that a method is meant to be trained with, and `fit` without settings takes these.

    Attributes:
        method: The method and its settings.
        teacher: The frozen backbone; PDD's local one.
        global_teacher: Second frozen backbone of methods with two; name none leaves it out.
        preprocessing: From file to network input.
        task_intensity: Intensity rules of tasks that need another one than `preprocessing.intensity`.
        scoring: From maps to scores.
        training: How the student is trained.
    """

    method: MethodConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    global_teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig("efficientnet_lite2"))
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    task_intensity: dict[str, Intensity] = field(default_factory=dict)
    scoring: Scoring = field(default_factory=Scoring)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def as_dict(self) -> dict[str, Any]:
        """As it is spelled in YAML files and recorded with a run."""
        return {**asdict(self), "method": self.method.as_dict()}

    def identity(self) -> dict[str, Any]:
        """`as_dict` without how many processes trained, which changes no number but its last digits."""
        return with_later_settings(self.as_dict())

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        check_preprocessing(self.preprocessing)
        check_scoring(self.scoring, self.preprocessing.size)
        for task, intensity in self.task_intensity.items():
            check_intensity(intensity, f"task_intensity.{task}")


def with_later_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recorded run as this version would have recorded them: `FitConfig.identity`.

    Args:
        recorded: Those of the run, possibly spelled by an earlier version or older than some settings.

    Returns:
        A copy with the settings it lacks; a setting whose default changed what a run does is never filled in.
    """
    later = {"keep_checkpoints": False, "synthetic": 0, "accumulate": 1}
    training, method, scoring = (recorded.get(group) for group in ("training", "method", "scoring"))
    teachers = {role: recorded.get(role) for role in ("teacher", "global_teacher")}
    return {
        **recorded,
        **{role: {"blocks": None, **each} for role, each in teachers.items() if isinstance(each, dict)},
        **({"training": _without(_PROCESSES, {**later, **training})} if isinstance(training, dict) else {}),
        **({"scoring": {"levels": "sum", **scoring}} if isinstance(scoring, dict) else {}),
        **({"method": MethodConfig.from_dict(method).as_dict()} if isinstance(method, dict) else {}),
    }


#: How many processes train; a run may go on with another number of them.
_PROCESSES = ("devices", "strategy")


def _without(names: tuple[str, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


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


#: The longest side and the most pixels of the network's input.  On a CPU an image takes 1 to 2 KiB of memory a pixel.
_LONGEST, _MOST = 8192, 2**22


def check_preprocessing(preprocessing: Preprocessing) -> None:
    """Refuse settings that no image can be prepared with.

    Raises:
        ConfigError: A value is of another type or out of range; whether the size fits the teacher is not known here.
    """
    check_words(preprocessing, "preprocessing")
    sides = preprocessing.size
    numbers = isinstance(sides, (tuple, list)) and len(sides) == 2 and all(map(_whole, sides))
    allowed = numbers and 0 < min(sides) <= max(sides) <= _LONGEST and math.prod(sides) <= _MOST
    expected = (
        f"height and width, whole numbers from 1 to {_LONGEST} and together at most {_MOST} pixels, as 2048 x 2048 "
        "(4 to 8 GiB of memory per image)"
    )
    check("preprocessing.size", sides, allowed, expected)
    check_intensity(preprocessing.intensity, "preprocessing.intensity")


def _whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


#: Pixel values, and what divides them, stay below this and above one part of it: float32 holds them.
_HIGHEST = 1e30


def check_intensity(intensity: Intensity, where: str) -> None:
    """Refuse a rule that maps no range of values to [0, 1].

    Args:
        intensity: The rule; "auto" has no numbers to check.
        where: Name of the setting, for the message.

    Raises:
        ConfigError: The rule is unknown or its numbers make no sense.
    """
    check_words(intensity, where)
    low, high = intensity.low, intensity.high
    in_float32 = abs(low) < _HIGHEST and abs(high) < _HIGHEST
    spans = in_float32 and low - high / 2 < low + high / 2
    valid, expected = {
        "auto": (True, ""),
        "window": (spans and high > 1 / _HIGHEST, "centre and a width above 0"),
        "range": (in_float32 and high - low > 1 / _HIGHEST, "lowest below highest"),
        "percentile": (0 <= low < high <= 100, "0 <= lower < upper <= 100"),
    }[intensity.rule]
    check(f"{where}: {intensity.rule}", f"{low:g} and {high:g}", valid, expected)


def check_scoring(scoring: Scoring, size: tuple[int, int]) -> None:
    """Refuse a blur or pooling that cannot be computed.

    Args:
        scoring: Blur and pooling.
        size: (height, width) of the maps; a wider blur than their diagonal leaves nothing of them.

    Raises:
        ConfigError: A value is of another type or out of range.
    """
    check_words(scoring, "scoring")
    widest = math.hypot(*size)
    expected = f"0 to {widest:.1f}, the diagonal of a map of {size[0]} x {size[1]}"
    check("scoring.blur", scoring.blur, 0 <= scoring.blur <= widest, expected)
    check("scoring.top_fraction", scoring.top_fraction, 0 < scoring.top_fraction <= 1, "above 0 and at most 1")
