"""Who may see what: support draws, leave-one-task-out folds, the validation share of the normals, the test set.

Every choice depends on the seed and on the rows themselves, never on their order in the manifest.  Images that belong
together are kept together: those of one patient where the patient is known, else those of one file (the slices of a
volume).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from anatomaly.data.manifest import Manifest
from anatomaly.errors import ConfigError
from anatomaly.types import Sample


@dataclass(frozen=True, slots=True)
class Fold:
    """One round of leave-one-task-out: train on the other tasks, test on a task never seen in training.

    Attributes:
        train_tasks: Tasks whose normal images may be trained on.
        test_task: The task held out; it may give support images, but no training images.
    """

    train_tasks: tuple[str, ...]
    test_task: str


def draw_supports(
    manifest: Manifest, *, task: str, shots: int, draws: int = 5, seed: int = 0
) -> list[tuple[Sample, ...]]:
    """Draw the K support images of a task several times, so that the luck of one draw can be told from the method.

    Candidates are the normal rows of split "train"; where none of the task's training rows has a label, all of them.
    A draw holds different images, and different patients as long as there are enough of them.  Draw i with fewer shots
    is the beginning of draw i with more shots, so a curve over K adds images and exchanges none.  Draws are independent
    of each other: the nearer K comes to the number of candidates, the more images they share.

    Args:
        manifest: The data set.
        task: Whose images to draw.
        shots: K, >= 1.
        draws: Number of draws, >= 1.
        seed: Seed of the draws.

    Returns:
        `draws` tuples of K samples.

    Raises:
        ConfigError: The task has too few normal training images, or a number is below 1.
        ManifestError: The task is unknown.
    """
    if shots < 1 or draws < 1:
        raise ConfigError(f"draw_supports: got shots={shots} and draws={draws}, expected both to be at least 1.")
    candidates = _normal_training_rows(manifest, task)
    supports = []
    for draw in range(draws):
        order = _distinct(_shuffled(candidates, f"{seed}/{task}/{draw}"))
        if len(order) < shots:
            raise ConfigError(
                f"draw_supports: task {task!r} has {len(order)} normal training images, {shots} shots asked."
                " Lower shots or add normal rows of split 'train'."
            )
        supports.append(tuple(_patients_in_turn(order)[:shots]))
    return supports


def supports_at_most(manifest: Manifest, task: str) -> int:
    """The largest K that `draw_supports` can draw: normal training images of a task, copies counted once.

    Raises:
        ManifestError: The task is unknown.
    """
    return len(_distinct(_normal_training_rows(manifest, task)))


def leave_one_task_out(manifest: Manifest) -> list[Fold]:
    """One fold per task, in the order of `manifest.tasks`: that task is tested, all others are trained on.

    Raises:
        ConfigError: The manifest has fewer than two tasks.
    """
    tasks = tuple(manifest.tasks)
    if len(tasks) < 2:
        raise ConfigError(
            f"leave_one_task_out: the manifest has {len(tasks)} task, expected at least 2. Add a data set."
        )
    return [Fold(tuple(other for other in tasks if other != task), task) for task in tasks]


def split_normals(manifest: Manifest, *, validation: float = 0.1, seed: int = 0) -> tuple[Manifest, Manifest]:
    """Divide the normal images that training may see into those it learns from and those that stop it.

    A task with normal rows of split "val" uses them.  Any other task gives up that share of its normal training rows,
    whole patients at a time and at least one image; a task of a single patient gives none, for half a patient would
    leak.  Split "test" and anomalous rows are never touched.

    Args:
        manifest: The data set.
        validation: Share of a task's normal training rows to hold out, in (0, 1).
        seed: Seed of the choice.

    Returns:
        (train, validation), both in manifest order; rows held out from "train" come back marked "val".

    Raises:
        ConfigError: The share is out of range, or one of the two parts would be empty.
    """
    if not 0.0 < validation < 1.0:
        raise ConfigError(f"split_normals: validation is {validation}, expected a share between 0 and 1, such as 0.1.")
    train: set[Sample] = set()
    held_out: set[Sample] = set()
    for task in manifest.tasks:
        normals = _normal_training_rows(manifest, task)
        given = manifest.select(task=task, split="val", label=0).samples
        chosen = given or _hold_out(normals, validation, f"{seed}/{task}/validation")
        held_out.update(chosen)
        train.update(row for row in normals if row not in held_out)
    if not train:
        raise _no_normals(manifest)
    if not held_out:
        alone = (
            "1 normal image" if len(train) == 1 else f"{len(train)} normal images, for all that is known of 1 patient"
        )
        raise ConfigError(
            f"{manifest.source}: {alone}; expected some of another patient, to be held out for choosing the "
            "checkpoint. Add images, or rows of split val."
        )
    return (
        replace(manifest, samples=tuple(row for row in manifest if row in train)),
        replace(manifest, samples=tuple(replace(row, split="val") for row in manifest if row in held_out)),
    )


def normals_to_train_on(manifest: Manifest) -> Manifest:
    """The normal rows of split "train" of all tasks, in manifest order.

    Raises:
        ConfigError: There is none.
    """
    chosen = {row for task in manifest.tasks for row in _normal_training_rows(manifest, task)}
    if not chosen:
        raise _no_normals(manifest)
    return replace(manifest, samples=tuple(row for row in manifest if row in chosen))


def _no_normals(manifest: Manifest) -> ConfigError:
    """The refusal of a data set without a normal training image."""
    return ConfigError(
        f"{manifest.source}: no normal image of split train. Give a folder of normal images, or a table whose normal "
        "images have split train."
    )


def samples_to_test(manifest: Manifest, task: str) -> tuple[Sample, ...]:
    """The rows of a task's split "test", in manifest order.

    Raises:
        ConfigError: The task has no test rows.
        ManifestError: The task is unknown.
    """
    tests = manifest.select(task=task, split="test").samples
    if not tests:
        raise ConfigError(f"evaluate: task {task!r} has no rows of split 'test'. Add some or choose another task.")
    return tests


def forbid_leak(supports: Iterable[Sample], tests: Iterable[Sample]) -> None:
    """Refuse support images that are also tested, or that show a patient who is.

    Two rows clash if they are the same image (same frame of the same path or file digest), if they name the same
    patient of the same task, or if they name no patient and come from one file.

    Args:
        supports: The normal images shown to the method.
        tests: The images it is judged on.

    Raises:
        ConfigError: Some supports clash; names the first one.
    """
    tested = {key for row in tests for key in (*_image_keys(row), *_owner_keys(row))}
    clashes = [row for row in supports if not tested.isdisjoint((*_image_keys(row), *_owner_keys(row)))]
    if clashes:
        raise ConfigError(
            f"forbid_leak: {len(clashes)} support images share image or patient with the test set, first"
            f" {clashes[0].name} of task {clashes[0].task!r}. Draw supports from other patients."
        )


def _image_keys(row: Sample) -> list[Hashable]:
    """What makes two rows the same image: frame and path, frame and digest."""
    return [("image", file, row.frame) for file in (row.path, row.sha256) if file is not None]


def _owner_keys(row: Sample) -> list[Hashable]:
    """What makes two rows one patient: the id within a task or, without one, the file; the surest key comes last."""
    if row.patient_id is not None:
        return [("patient", row.task, row.patient_id)]
    return [("file", file) for file in (row.path, row.sha256) if file is not None]


def _normal_training_rows(manifest: Manifest, task: str) -> list[Sample]:
    """Training rows labelled normal; where a task has no training label at all, its training data count as normal."""
    training = manifest.select(task=task, split="train").samples
    unlabelled = all(row.label is None for row in training)
    return [row for row in training if unlabelled or row.label == 0]


def _shuffled(rows: Iterable[Sample], salt: str) -> list[Sample]:
    """The rows in an order that depends on the salt and on their paths relative to each other, not on their order."""
    order = sorted(rows, key=lambda row: (row.path.as_posix(), -1 if row.frame is None else row.frame))
    random.Random(salt).shuffle(order)
    return order


def _distinct(rows: Iterable[Sample]) -> list[Sample]:
    """The rows without those that repeat an earlier image."""
    seen: set[Hashable] = set()
    distinct = []
    for row in rows:
        keys = _image_keys(row)
        if seen.isdisjoint(keys):
            distinct.append(row)
        seen.update(keys)
    return distinct


def _patients_in_turn(rows: Sequence[Sample]) -> list[Sample]:
    """The first image of every patient, then the second of every patient, and so on."""
    turns: Counter[Hashable] = Counter()
    turn_of = []
    for row in rows:
        owner = _owner_keys(row)[-1]
        turn_of.append(turns[owner])
        turns[owner] += 1
    return [row for _, row in sorted(zip(turn_of, rows, strict=True), key=lambda pair: pair[0])]


def _hold_out(normals: Collection[Sample], share: float, salt: str) -> set[Sample]:
    """Whole patients that together make up at most the share of the rows; the smallest one where none fits."""
    patients: defaultdict[Hashable, list[Sample]] = defaultdict(list)
    for row in _shuffled(normals, salt):
        patients[_owner_keys(row)[-1]].append(row)
    wanted = min(round(share * len(normals)), len(normals) - 1)
    held_out: set[Sample] = set()
    for rows in patients.values():
        if len(held_out) + len(rows) <= wanted:
            held_out.update(rows)
    if not held_out and len(patients) > 1:
        smallest = min(patients.values(), key=len)
        held_out.update(smallest)
    return held_out
