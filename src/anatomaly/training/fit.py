"""fit(): train a student on normal images of several tasks and keep the checkpoint that finds pasted lesions best."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.backbones import build_backbone
from anatomaly.backbones.teacher import misfit
from anatomaly.config import TeacherConfig, differences, with_later_settings
from anatomaly.data.listing import natural_key
from anatomaly.data.readers import read_image
from anatomaly.data.support_range import tell_training
from anatomaly.data.transforms import resolve_intensity
from anatomaly.detector.bundle import CONFIG
from anatomaly.detector.detector import Detector
from anatomaly.detector.device import choose_device
from anatomaly.detector.facts import TEACHERS, ModelFacts
from anatomaly.errors import ConfigError
from anatomaly.evaluation.protocols import normals_to_train_on, split_normals
from anatomaly.files import read_json, write_whole
from anatomaly.methods import METHODS, build_method
from anatomaly.presets import load_preset
from anatomaly.scoring import scale_from_normals
from anatomaly.training.loaders import Preparation, synthetic_images_of
from anatomaly.training.processes import processes_of, train_in_processes
from anatomaly.training.student import load_best, train_student
from anatomaly.training.validation import VALIDATION_IMAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anatomaly.backbones.teacher import Teacher
    from anatomaly.config import FitConfig
    from anatomaly.data.manifest import Manifest
    from anatomaly.types import Image, Intensity, Sample

logger = logging.getLogger(__name__)


def fit(
    manifest: Manifest,
    out: str | Path,
    config: FitConfig | None = None,
    *,
    teachers: Sequence[Teacher] | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
) -> Detector:
    """Train on a manifest's normal training images and write a bundle.

    A run that was killed goes on where it stopped when called again with the same data and settings, also with another
    number of processes (`TrainingConfig.devices`).  The same data and settings give the same weights on the same
    machine, numbers of threads and processes, whatever the order of the rows; other numbers round differently, and
    training multiplies that (weights have been seen to move by 0.006).

    Args:
        manifest: Rows of split "train" (normal) are trained on, normal rows of split "val" choose the checkpoint; a
            task without these gives up a share of its training rows.  Rows of split "test" are never touched.  A method
            that learns from nothing takes no more from them than intensity rules.
        out: Folder of the bundle; training state and progress go to its subfolder `training`.
        config: All settings; None takes the default preset, as `anatomaly fit` does.
        teachers: Frozen backbones of your own, instead of those that `config` names; see `Teacher.of_module`.
        on_progress: Called with how many of how many "images" are read, then with how many "steps" are trained.

    Returns:
        The trained detector, without support.

    Raises:
        ConfigError: No normal image, too few for the shots, or `out` holds a run with other settings or data.
        ReadError: A training image cannot be read.
        WeightsError: The teacher's weights cannot be had.
        OutputError: `out` cannot be written.
    """
    out, config = Path(out), config or load_preset()
    record = METHODS[config.method.name]
    if teachers is not None:  # what is recorded is what is used
        own = [TeacherConfig(each.name, each.facts().weights, each.normalise, each.blocks) for each in teachers]
        config = replace(config, teacher=own[0], global_teacher=own[1] if own[1:] else config.global_teacher)
    precision = config.training.precision
    device = choose_device(config.training.device, precision)
    learns = record.trained and config.training.epochs > 0
    processes = processes_of(config, device, teachers is not None) if learns else 0
    manifest = _in_order(manifest).with_hashes()
    train, held_out = normals_to_train_on(manifest), replace(manifest, samples=())
    if record.trained:
        train, held_out = split_normals(manifest, validation=config.training.validation, seed=config.training.seed)
    built = teachers_of(config) if teachers is None else list(teachers)
    _check_size(built, config)
    method = build_method(config.method.name, built, config.method.settings, seed=config.training.seed)
    if _finished(out, config, manifest):
        logger.info("%s: this run is finished already, nothing to train.", out)
        return Detector.load(out, device=device, precision=precision, teachers=teachers)
    rules = _resolve(config, train, on_progress)
    facts = ModelFacts.of(config.method, method, _training_facts(config, manifest, train) if record.trained else None)
    prepare = Preparation(config.preprocessing, rules, device)
    if learns:
        folder = out / "training"
        if processes:
            trained = train_in_processes(processes, train, held_out, prepare, folder, config, on_progress)
            load_best(method, folder)
        method.to(device)
        for teacher in method.teachers.values():
            teacher.to(device)
        if not processes:
            trained = train_student(method, train, held_out, prepare, folder, config, on_progress)
        facts = replace(facts, training={**facts.training, **trained})
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
        detector.facts = replace(facts, map_ranges=_map_ranges(detector, held_out, prepare))
    detector.save(out)
    return detector


def _in_order(manifest: Manifest) -> Manifest:
    """What may be looked at, each task's rows by their files: the order of a table must not change a training."""
    tasks = {task: number for number, task in enumerate(sorted(manifest.tasks))}

    def place(row: Sample) -> tuple[int, str, str, int]:
        return tasks[row.task], natural_key(str(row.path)), str(row.path), row.frame or 0

    return replace(manifest, samples=tuple(sorted((row for row in manifest if row.split != "test"), key=place)))


def teachers_of(config: FitConfig) -> list[Teacher]:
    """The frozen backbones that the settings name and the method takes.

    Raises:
        WeightsError: Their weights cannot be had.
    """
    most = METHODS[config.method.name].teachers
    wanted = [each for each in (config.teacher, config.global_teacher)[:most] if each.name != "none"]
    return [
        build_backbone(each.name, weights=each.weights, normalise=each.normalise, blocks=each.blocks) for each in wanted
    ]


def _check_size(teachers: Sequence[Teacher], config: FitConfig) -> None:
    size = config.preprocessing.size
    if expected := misfit(teachers, size):
        names = " and ".join(f"{role} {teacher.name}" for role, teacher in zip(TEACHERS, teachers, strict=False))
        raise ConfigError(
            f"preprocessing: size {size} does not fit {names}, expected {expected}. Change --preprocessing.size."
        )


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


def _training_facts(config: FitConfig, manifest: Manifest, train: Manifest) -> dict[str, Any]:
    """What a bundle says of the training it comes from."""
    lesions = METHODS[config.method.name].learns_from == "lesions"
    return {
        **asdict(config.training),
        "synthetic": synthetic_images_of(train, config.training) if lesions else 0,
        "tasks": list(train.tasks),
        "images": len(train),
        "manifest": manifest.fingerprint(),
    }


def _resolve(config: FitConfig, train: Manifest, on_progress: Callable[[int, int, str], None]) -> dict[str, Intensity]:
    """Fix every training task's intensity rule: percentiles become a range on that task's training images.

    Rules of other tasks are kept as they are, for the supports of a task that is only met later.
    """
    rules = dict(config.task_intensity)
    for task in train.tasks:
        rule = config.task_intensity.get(task, config.preprocessing.intensity)
        rows = train.select(task=task)
        rules[task] = resolve_intensity(rule, _read(rows, on_progress))
        flag = "--preprocessing.intensity RULE" if len(train.tasks) == 1 else f"--task_intensity '{{{task}: RULE}}'"
        tell_training(rows.samples, replace(config.preprocessing, intensity=rules[task]), flag)
    if later := sorted(set(config.task_intensity).difference(train.tasks)):
        logger.warning("task_intensity: %s is not trained on, its rule is kept for later.", ", ".join(later))
    return {task: rule for task, rule in rules.items() if rule != config.preprocessing.intensity}


def _read(rows: Manifest, on_progress: Callable[[int, int, str], None]) -> Iterator[Image]:
    for done, row in enumerate(rows, start=1):
        yield read_image(row.path, frame=row.frame)
        on_progress(done, len(rows), "images")


def _finished(out: Path, config: FitConfig, manifest: Manifest) -> bool:
    """Say whether `out` holds this run complete; refuse to mix it with another one."""
    wanted = json.loads(json.dumps({"data": manifest.fingerprint(), **config.identity()}))
    record = out / "training" / "run.json"
    try:
        found = with_later_settings(read_json(record, finite=False))
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as err:
        raise ConfigError(f"{record}: is damaged. Choose another --out or delete {out}.") from err
    complete = (out / CONFIG).is_file()
    if found == wanted:
        return complete
    if complete or (found is not None and set(record.parent.iterdir()) != {record}):
        differ = "they are not recorded" if found is None else ", ".join(differences(found, wanted)[:3])
        raise ConfigError(f"{out}: holds a run with other settings ({differ}). Choose another --out or delete it.")
    write_whole(record, (json.dumps(wanted, indent=2) + "\n").encode())  # a run that failed at once is forgotten
    return False
