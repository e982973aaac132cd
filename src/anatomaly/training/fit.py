"""fit(): train a student on normal images of several tasks and keep the checkpoint that finds pasted lesions best."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.backbones import build_backbone
from anatomaly.config import differences, with_later_settings
from anatomaly.data.readers import read_image
from anatomaly.data.transforms import resolve_intensity
from anatomaly.detector.bundle import CONFIG, TEACHERS
from anatomaly.detector.detector import Detector, choose_device
from anatomaly.errors import ConfigError
from anatomaly.evaluation.protocols import split_normals
from anatomaly.files import write_whole
from anatomaly.methods import PatchNearestNeighbours, build_method
from anatomaly.scoring import scale_from_normals
from anatomaly.training.loaders import Preparation, synthetic_images_of
from anatomaly.training.student import train_student
from anatomaly.training.validation import VALIDATION_IMAGES

if TYPE_CHECKING:
    from anatomaly.backbones.teacher import Teacher
    from anatomaly.config import FitConfig
    from anatomaly.data.manifest import Manifest
    from anatomaly.methods import AnyMethod
    from anatomaly.types import Intensity

logger = logging.getLogger(__name__)


def fit(manifest: Manifest, out: str | Path, config: FitConfig) -> Detector:
    """Train on a manifest's normal training images and write a bundle.

    A run that was killed goes on where it stopped when called again with the same data and settings.

    Args:
        manifest: Rows of split "train" (normal) are trained on, normal rows of split "val" choose the checkpoint; a
            task without these gives up a share of its training rows.  Rows of split "test" are never touched.
        out: Folder of the bundle; training state and progress go to its subfolder `training`.
        config: All settings.

    Returns:
        The trained detector, without support.

    Raises:
        ConfigError: Too few images for the shots, or `out` holds a run with other settings or data.
        ReadError: A training image cannot be read.
        WeightsError: The teacher's weights cannot be had.
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    device, precision = choose_device(config.training.device), config.training.precision
    manifest = replace(manifest, samples=tuple(row for row in manifest if row.split != "test")).with_hashes()
    train, held_out = split_normals(manifest, validation=config.training.validation, seed=config.training.seed)
    method = build_method(teachers=_teachers(config), seed=config.training.seed, **asdict(config.method))
    if _finished(out, config, manifest):
        logger.info("%s: this run is finished already, nothing to train.", out)
        return Detector.load(out, device=device, precision=precision)
    rules = _resolve(config, train)
    facts = _facts(method, config, manifest, train)
    prepare = Preparation(config.preprocessing, rules, device)
    if not isinstance(method, PatchNearestNeighbours) and config.training.epochs > 0:
        method.to(device)
        for teacher in method.teachers.values():
            teacher.to(device)
        facts["training"] |= train_student(method, train, held_out, prepare, out / "training", config)
    detector = Detector(
        method,
        preprocessing=config.preprocessing,
        scoring=config.scoring,
        facts=facts,
        task_intensity=rules,
        device=device,
        precision=precision,
    )
    if not method.needs_support:  # there is no support to take the colour scale from
        detector.facts["map_ranges"] = _map_ranges(detector, held_out, prepare)
    detector.save(out)
    return detector


def _teachers(config: FitConfig) -> list[Teacher]:
    """The frozen backbones a method needs.

    Raises:
        ConfigError: The input size does not fit one of them.
        WeightsError: Their weights cannot be had.
    """
    wanted = {"teacher": config.teacher}
    if config.method.name == "pdd" and config.global_teacher.name != "none":
        wanted["global_teacher"] = config.global_teacher
    teachers = []
    for role, facts in wanted.items():
        teacher = build_backbone(facts.name, weights=facts.weights, normalise=facts.normalise)
        stride = teacher.strides[-1]
        if any(side % stride for side in config.preprocessing.size):
            raise ConfigError(
                f"preprocessing: size {config.preprocessing.size} does not fit {role} {teacher.name}, expected "
                f"multiples of {stride}. Change --preprocessing.size."
            )
        teachers.append(teacher)
    return teachers


def _map_ranges(detector: Detector, held_out: Manifest, prepare: Preparation) -> dict[str, tuple[float, float]]:
    """Per task, the fixed colour scale of maps, from normal images that were not trained on."""
    ranges = {}
    for task in held_out.tasks:
        bank = detector.empty_bank(task)
        rows = held_out.select(task=task).samples[:VALIDATION_IMAGES]
        maps = [
            one
            for images in prepare.inputs(rows)
            for one in detector.compare(detector.encode(list(images.cpu().numpy())), bank).maps.cpu().numpy()
        ]
        ranges[task] = scale_from_normals(maps)
    return ranges


def _facts(method: AnyMethod, config: FitConfig, manifest: Manifest, train: Manifest) -> dict[str, Any]:
    """What a bundle says about where it comes from."""
    return {
        "method": asdict(config.method),
        **{role: teacher.facts() for role, teacher in zip(TEACHERS, method.teachers.values(), strict=False)},
        "training": {
            **asdict(config.training),
            "synthetic": synthetic_images_of(method, train, config.training),
            "tasks": list(train.tasks),
            "images": len(train),
            "manifest": manifest.fingerprint(),
        },
    }


def _resolve(config: FitConfig, train: Manifest) -> dict[str, Intensity]:
    """Fix every training task's intensity rule: percentiles become a range on that task's training images.

    Rules of other tasks are kept as they are, for the supports of a task that is only met later.
    """
    rules = dict(config.task_intensity)
    for task in train.tasks:
        rule = config.task_intensity.get(task, config.preprocessing.intensity)
        rows = train.select(task=task)
        rules[task] = resolve_intensity(rule, (read_image(s.path, frame=s.frame) for s in rows))
    if later := sorted(set(config.task_intensity).difference(train.tasks)):
        logger.warning("task_intensity: %s is not trained on, its rule is kept for later.", ", ".join(later))
    return {task: rule for task, rule in rules.items() if rule != config.preprocessing.intensity}


def _finished(out: Path, config: FitConfig, manifest: Manifest) -> bool:
    """Say whether `out` holds this run complete; refuse to mix it with another one."""
    wanted = json.loads(json.dumps({"data": manifest.fingerprint(), **asdict(config)}))
    record = out / "training" / "run.json"
    try:
        found = with_later_settings(json.loads(record.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        found = None
    complete = (out / CONFIG).is_file()
    if found == wanted:
        return complete
    if complete or (found is not None and set(record.parent.iterdir()) != {record}):
        differ = "they are not recorded" if found is None else ", ".join(differences(found, wanted)[:3])
        raise ConfigError(f"{out}: holds a run with other settings ({differ}). Choose another --out or delete it.")
    write_whole(record, (json.dumps(wanted, indent=2) + "\n").encode())  # a run that failed at once is forgotten
    return False
