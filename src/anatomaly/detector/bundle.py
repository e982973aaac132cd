"""Models and support banks on disk: safetensors for numbers, JSON for facts, never pickle.

A bundle is a folder: ``config.json`` (method, teacher identity and hash, preprocessing, scoring, training facts,
versions), ``weights.safetensors`` (the trainable part), ``calibration.json`` once it was calibrated and, when a teacher
came from a user's own file, ``teacher.safetensors`` or ``global_teacher.safetensors``.  A bank is one safetensors file
with its facts as metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anatomaly._version import __version__
from anatomaly.backbones import build_backbone
from anatomaly.backbones.weights import load_strict, state_digest
from anatomaly.config import check_intensity, check_preprocessing, check_scoring
from anatomaly.detector.facts import TEACHERS, ModelFacts
from anatomaly.errors import ConfigError, NotReadyError, WeightsError, check, check_words
from anatomaly.files import read_json, require_file, write_whole
from anatomaly.types import Calibration, Intensity, Preprocessing, Scoring

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher, TeacherFacts
    from anatomaly.types import Method

FORMAT = 1
#: The bundle in the package: docs/bundle.md says how it is made.
BUILT_IN = Path(__file__).parent / "built_in"
CONFIG, WEIGHTS, CALIBRATION = "config.json", "weights.safetensors", "calibration.json"


@dataclass(frozen=True)
class Bundle:
    """What `config.json` of a bundle says.

    Attributes:
        facts: Method, teachers, training.
        preprocessing: From file to network input.
        task_intensity: Intensity rules of known tasks that differ from `preprocessing.intensity`.
        scoring: From maps to scores.
    """

    facts: ModelFacts
    preprocessing: Preprocessing
    scoring: Scoring
    task_intensity: Mapping[str, Intensity]

    def __post_init__(self) -> None:
        """Hold the settings to the same ranges as those of `fit`: somebody may have edited the file."""
        check_preprocessing(self.preprocessing)
        check_scoring(self.scoring, self.preprocessing.size)
        for task, rule in self.task_intensity.items():
            check_intensity(rule, f"task_intensity.{task}")


def save_bundle(folder: Path, method: Method, bundle: Bundle) -> None:
    """Write a bundle; every file appears whole or not at all.

    Args:
        folder: Created if needed; files of an older bundle are replaced.
        method: Its trainable weights are stored.
        bundle: What it is; format, versions and the weights' digest are added here.  Teachers whose weights came from a
            "file" are stored too.

    Raises:
        OutputError: The folder cannot be written.
    """
    state = method.state_dict()
    facts = {
        "format": FORMAT,
        **bundle.facts.as_dict(),
        "preprocessing": asdict(bundle.preprocessing),
        "task_intensity": {task: asdict(rule) for task, rule in bundle.task_intensity.items()},
        "scoring": asdict(bundle.scoring),
        "weights_hash": state_digest(state),
        "versions": {"anatomaly": __version__, "torch": _version("torch"), "python": platform.python_version()},
        "note": "Research only, not for clinical use.",
    }
    write_tensors(folder / WEIGHTS, state)
    teachers = dict(zip(TEACHERS, zip(method.teachers.values(), bundle.facts.teachers, strict=True), strict=False))
    for role in TEACHERS:
        if role in teachers and teachers[role][1].weights == "file":
            write_tensors(teacher_file(folder, role), teachers[role][0].body.state_dict())
        else:
            teacher_file(folder, role).unlink(missing_ok=True)  # of an older bundle; `Detector.load` would take it
    (folder / CALIBRATION).unlink(missing_ok=True)  # likewise
    write_whole(folder / CONFIG, (json.dumps(facts, indent=2) + "\n").encode())


def teacher_file(folder: Path, role: str) -> Path:
    """Where a bundle keeps the weights of a teacher that came from a user's own file."""
    return folder / f"{role}.safetensors"


def read_bundle(folder: Path) -> tuple[Bundle, str]:
    """What a bundle says, and the digest of its weights.

    Raises:
        NotReadyError: The folder is not a bundle, one of a newer format, or a value in it is out of range.
    """
    file = folder / CONFIG
    try:
        facts = read_json(file, finite=False)  # of a training some figures may be none
        check_format(facts["format"], str(folder), "bundle")
        preprocessing, scoring = read_preprocessing(facts["preprocessing"]), Scoring(**facts["scoring"])
        rules = {task: Intensity(**rule) for task, rule in dict(facts["task_intensity"]).items()}
        told, weights_hash = ModelFacts.from_dict(facts), facts["weights_hash"]
        check("weights_hash", weights_hash, isinstance(weights_hash, str), "a digest")
    except DAMAGED as err:
        raise NotReadyError(
            f"{folder}: not a model bundle (no usable {CONFIG}). Make one with `anatomaly fit` or `anatomaly import`."
        ) from err
    except ConfigError as err:
        raise NotReadyError(f"{file}: is damaged ({err}) Copy the whole bundle again.") from err
    try:
        return Bundle(told, preprocessing, scoring, rules), weights_hash
    except (ConfigError, TypeError, ValueError) as err:
        raise NotReadyError(f"{file}: is damaged ({err}) Copy the whole bundle again.") from err


#: What content of another form than expected leads to.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)


def check_format(found: object, where: str, what: str) -> None:
    """Ask for an update where a later version wrote the file.

    Raises:
        NotReadyError: The format is another number.
        TypeError: It is no number.
    """
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError("the format is no number")
    if found != FORMAT:
        raise NotReadyError(f"{where}: {what} format {found}, expected {FORMAT}. Update anatomaly.")


def load_teacher(
    folder: Path, role: str, facts: TeacherFacts, weights: str | None, given: Teacher | None = None
) -> Teacher:
    """Build a bundle's teacher and make sure that it is the one the student was trained with.

    Args:
        folder: The bundle.
        role: One of `TEACHERS`.
        facts: What the bundle says of it.
        weights: File to take the weights from instead of where the bundle says.
        given: The teacher itself, where it is no named one.

    Raises:
        WeightsError: The weights cannot be had, or are others.
    """
    own = teacher_file(folder, role)
    stored = str(own) if own.is_file() else facts.weights
    if stored == "file" and weights is None and given is None:
        raise WeightsError(
            f"{own}: missing; {facts.name} had its weights from a file, and the bundle keeps a copy here. "
            f"Copy the whole bundle again, or pass the weights with --{role}.weights FILE."
        )
    teacher = given or build_backbone(
        facts.name, weights=weights or stored, normalise=facts.normalise, blocks=facts.blocks
    )
    if teacher.weights_hash != facts.hash:
        raise WeightsError(
            f"{folder}: trained with {facts.name} weights {facts.hash[:12]}..., found "
            f"{teacher.weights_hash[:12]}... Pass the same weights with --{role}.weights FILE."
        )
    return teacher


def load_weights(folder: Path, method: Method, *, expected: str) -> None:
    """Load a bundle's weights into a freshly built method.

    Raises:
        WeightsError: The file is missing, does not fit, or its values are not those that `config.json` names.
    """
    state = read_tensors(folder / WEIGHTS)
    load_strict(cast("torch.nn.Module", method), state, where=str(folder / WEIGHTS))
    if (got := state_digest(state)) != expected:
        raise WeightsError(
            f"{folder / WEIGHTS}: digest {got[:16]}..., {CONFIG} says {expected[:16]}... "
            "The two files are not from the same run; copy the whole bundle again."
        )


def save_calibrations(calibrations: Sequence[Calibration], folder: Path) -> None:
    """Write all calibrations of a bundle, the same bytes for the same calibrations.

    Raises:
        OutputError: The file cannot be written.
    """
    entries = [asdict(each) for each in calibrations]
    entries = [entry | {"digest": digest_of(entry)} for entry in entries]
    entries.sort(key=lambda entry: (entry["task"], entry["digest"]))
    text = json.dumps({"format": FORMAT, "calibrations": entries}, indent=1, allow_nan=False)
    write_whole(folder / CALIBRATION, (text + "\n").encode())


def load_calibrations(folder: Path) -> tuple[Calibration, ...]:
    """Read the calibrations of a bundle; none where it was never calibrated.

    Raises:
        NotReadyError: The file is damaged or changed, or one of a newer format.
    """
    file = folder / CALIBRATION
    try:
        facts = read_json(file)
        check_format(facts["format"], str(file), "calibration")
        return tuple(_calibration(dict(entry)) for entry in facts["calibrations"])
    except FileNotFoundError:
        return ()
    except (*DAMAGED, ConfigError) as err:
        raise NotReadyError(f"{file}: damaged or changed. Remove it and run `anatomaly calibrate` again.") from err


def _calibration(entry: dict[str, Any]) -> Calibration:
    """Rebuild a record from its JSON form.

    Raises:
        ConfigError: A value is out of range.
        KeyError, TypeError, ValueError: It is not what was written.
    """
    digest = entry.pop("digest")
    written = digest_of(entry)  # as it stands there: an earlier version knew fewer settings
    found = Calibration(
        **{
            **entry,
            **{key: tuple(entry[key]) for key in ("scores", "images", "sha256")},
            "preprocessing": read_preprocessing(entry["preprocessing"]),
            "scoring": Scoring(**entry["scoring"]),
        }
    )
    check_words(found, "calibration")
    check_preprocessing(found.preprocessing)
    check_scoring(found.scoring, found.preprocessing.size)
    texts = (found.task, found.model_hash, found.bank_digest, found.precision, *found.sha256)
    sound = (
        found.n == len(found.images) > 0
        and all(type(each) in (int, float) and math.isfinite(each) for each in found.scores)  # True is an int too
        and all(type(each) is int and each > 0 for each in found.images)
        and all(isinstance(each, str) for each in texts)
    )
    if not sound or digest != written:
        raise ValueError("the digest is not that of the entry")
    return found


def digest_of(entry: Mapping[str, Any]) -> str:
    """Digest of what is written as JSON."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def read_preprocessing(facts: Mapping[str, Any]) -> Preprocessing:
    """Rebuild a `Preprocessing` from its JSON form; `check_preprocessing` says whether it can be used."""
    height, width = facts["size"]
    return Preprocessing(
        size=(height, width),
        resize=facts["resize"],
        interpolation=facts["interpolation"],
        intensity=Intensity(**facts["intensity"]),
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        WeightsError: It is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        require_file(file)
        return dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as err:
        raise WeightsError(f"{file}: missing or damaged. Copy the whole bundle again.") from err


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    from safetensors.torch import save

    write_whole(file, save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, metadata))


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
