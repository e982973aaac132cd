"""The grid: method x teacher x task x shots x seed, each cell run once, whatever happens to the machine in between.

A cell is a folder whose `cell.json` is written last and says what the cell was made of; a cell that says what is wanted
now is never run again.  Cells run in processes of their own; nothing but files passes from one run to the next.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from anatomaly.errors import ConfigError
from anatomaly.evaluation.protocols import (
    draw_supports,
    forbid_leak,
    leave_one_task_out,
    samples_to_test,
)
from anatomaly.evaluation.support_lists import lists_digest, read_support_lists
from anatomaly.files import file_digest
from anatomaly.methods import METHODS

if TYPE_CHECKING:
    from anatomaly.config import FitConfig, TeacherConfig
    from anatomaly.data.manifest import Manifest
    from anatomaly.evaluation.support_lists import SupportLists
    from anatomaly.types import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One competitor of the grid.

    Attributes:
        name: What tables call it.
        config: Settings of `fit`; the grid sets teacher and seed.
        teacher: The one frozen backbone of this competitor; None takes each of the grid's in turn.
        peer: Name in `peers.PEERS` for a method that is not ours; of `config` it then takes the preprocessing.
        images: In protocol one_class, how many normal training images a method that compares with images gets; 0 = all.
        options: Keyword arguments of a peer.
    """

    name: str
    config: FitConfig
    teacher: TeacherConfig | None = None
    peer: str | None = None
    images: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether `fit` makes a model before anything is judged."""
        return self.peer is None and METHODS[self.config.method.name].trained


@dataclass(frozen=True)
class Grid:
    """Everything a benchmark consists of.

    Attributes:
        manifest: Normals in split train, both labels in split test.
        protocol: few_shot gives K supports of a task, and trains on all other tasks what needs training; one_class
            gives all normal training images of the task.
        entries: The competitors; names differ.
        teachers: The frozen backbones, each with every entry that has none of its own.
        tasks: Tasks to judge; none takes all.
        shots: Values of K (few_shot).
        seeds: Of training and of support draws: the draws of one seed are the same for all competitors.
        draws: Support draws per seed (few_shot).
        supports: File of fixed support lists, instead of draws.
    """

    manifest: Manifest
    protocol: Literal["few_shot", "one_class"]
    entries: Sequence[Entry]
    teachers: Sequence[TeacherConfig]
    tasks: Sequence[str] = ()
    shots: Sequence[int] = (2, 4, 8)
    seeds: Sequence[int] = (0, 1, 2)
    draws: int = 5
    supports: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what would run into an error hours later.

        Raises:
            ConfigError: Something is empty, given twice or below 1, or a method or peer cannot work like this.
            NotReadyError: A peer needs anomalib, which is not installed.
            ManifestError: A task is unknown.
        """
        names = [entry.name for entry in self.entries]
        chosen: dict[str, Sequence[object]] = {
            "methods": names,
            "tasks": self.judged,
            "seeds": self.seeds,
            "shots": self.shots,
        }
        if self.teachers or any(entry.teacher is None for entry in self.entries):
            chosen["teachers"] = [teacher.name for teacher in self.teachers]
        for what, values in chosen.items():
            if not values or len(set(values)) < len(values):
                given = ", ".join(map(str, values)) or "none"
                raise ConfigError(f"benchmark: {what}: got {given}, expected at least one and none of them twice.")
        if self.protocol == "few_shot" and min(*self.shots, self.draws) < 1:
            raise ConfigError(f"benchmark: got shots {list(self.shots)} and {self.draws} draws, expected 1 or more.")
        for task in self.judged:
            tests = samples_to_test(self.manifest, task)
            if {row.label for row in tests} != {0, 1}:
                raise ConfigError(
                    f"benchmark: the test split of task {task!r} needs normal and anomalous images and no unlabelled "
                    "ones. `anatomaly data check` lists what is wrong with it."
                )
        from anatomaly.backbones import check_name
        from anatomaly.benchmark.anomalib_bridge import require_anomalib
        from anatomaly.benchmark.peers import build_algorithm

        for teacher in self.teachers:
            check_name(teacher.name)
        for entry in self.entries:
            if entry.teacher is not None:
                check_name(entry.teacher.name)
            if entry.peer is not None and build_algorithm(entry.peer, **entry.options).from_anomalib:
                require_anomalib(entry.name)
            few_shot = entry.peer is not None or METHODS[entry.config.method.name].few_shot
            if self.protocol == "few_shot" and not few_shot:
                raise ConfigError(f"benchmark: {entry.name} is a one-class method. Set protocol: one_class.")
            one_class = METHODS[entry.config.method.name].one_class
            if self.protocol == "one_class" and entry.trained and not one_class:
                raise ConfigError(f"benchmark: {entry.name} trains on other tasks. Set protocol: few_shot.")
            if self.protocol == "few_shot" and entry.trained:
                leave_one_task_out(self.manifest)

    @property
    def judged(self) -> tuple[str, ...]:
        """The tasks that are judged."""
        return tuple(self.tasks) or self.manifest.tasks

    def cells(self) -> list[Cell]:
        """All cells, in the order they are run: cheap references first, so that a table is soon there."""
        order = sorted(self.entries, key=lambda entry: (entry.trained, entry.peer is not None))
        shots = self.shots if self.protocol == "few_shot" else (0,)
        return [
            Cell(entry.name, teacher.name, task, k, seed)
            for seed in self.seeds
            for entry in order
            for teacher in self.teachers_of(entry)
            for task in self.judged
            for k in shots
        ]

    def teachers_of(self, entry: Entry) -> Sequence[TeacherConfig]:
        """The frozen backbones that a competitor is run with."""
        return self.teachers if entry.teacher is None else (entry.teacher,)


class Cell(NamedTuple):
    """One place of the grid: all support draws of one seed; `shots` is 0 in protocol one_class."""

    entry: str
    teacher: str
    task: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        shots = f", K = {self.shots}" if self.shots else ""
        return f"{self.task}, {self.entry} ({self.teacher}){shots}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Where its figures are."""
        place = f"k{self.shots}_seed_{self.seed}" if self.shots else f"seed_{self.seed}"
        return out / "cells" / slug(self.task) / slug(self.entry) / slug(self.teacher) / place

    def model(self, out: Path) -> Path:
        """Where its trained model is; cells that differ in shots share it."""
        return out / "models" / slug(self.entry) / slug(self.teacher) / slug(self.task) / f"seed_{self.seed}"


def slug(name: str) -> str:
    """`name` as the name of a folder, never one above."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).replace("..", "__")


def support_lists_of(grid: Grid) -> SupportLists:
    """The supports of every task and seed at the largest K; fewer shots take the beginning of each draw."""
    if grid.protocol == "one_class":
        if grid.supports is not None:
            raise ConfigError("benchmark: supports are fixed for protocol few_shot only. Leave them out.")
        return {}
    most = max(grid.shots)
    if grid.supports is None:
        return {
            task: {
                seed: draw_supports(grid.manifest, task=task, shots=most, draws=grid.draws, seed=seed)
                for seed in grid.seeds
            }
            for task in grid.judged
        }
    given = read_support_lists(grid.supports, grid.manifest)
    for task in grid.judged:
        tests = samples_to_test(grid.manifest, task)
        for seed in grid.seeds:
            draws = given.get(task, {}).get(seed, [])
            if len(draws) < grid.draws or any(len(draw) < most for draw in draws[: grid.draws]):
                raise ConfigError(
                    f"{grid.supports}: task {task!r}, seed {seed}: lists {len(draws)} draws of "
                    f"{min(map(len, draws), default=0)} images, expected {grid.draws} draws of {most}. Lower draws or "
                    "shots, or take other seeds."
                )
            for draw in draws:
                forbid_leak(draw, tests)
    return {task: {seed: given[task][seed][: grid.draws] for seed in grid.seeds} for task in grid.judged}


def settings_of(grid: Grid, cell: Cell) -> FitConfig:
    """What `fit` is called with."""
    (entry,) = (entry for entry in grid.entries if entry.name == cell.entry)
    (teacher,) = (teacher for teacher in grid.teachers_of(entry) if teacher.name == cell.teacher)
    training = replace(entry.config.training, seed=cell.seed)
    return replace(entry.config, teacher=teacher, training=training)


#: The groups of settings that a peer takes from those of `fit`.
_OF_PEERS = ("teacher", "preprocessing", "task_intensity")


def keys_of(grid: Grid, lists: SupportLists) -> dict[Cell, dict[str, Any]]:
    """Everything the figures of each cell depend on, in JSON's terms."""
    entries = {entry.name: entry for entry in grid.entries}
    prints: dict[tuple[str, ...], str] = {}
    keys = {}
    for cell in grid.cells():
        entry = entries[cell.entry]
        tasks = tuple(grid.manifest.tasks) if entry.trained and grid.protocol == "few_shot" else (cell.task,)
        if tasks not in prints:
            prints[tasks] = _fingerprint(grid.manifest.select(task=tasks))
        settings = settings_of(grid, cell).identity()
        if entry.peer is not None:
            settings = {name: settings[name] for name in _OF_PEERS}
        facts = {
            "protocol": grid.protocol,
            "cell": cell._asdict(),
            "peer": entry.peer,
            "options": dict(entry.options),
            "images": entry.images,
            "settings": settings,
            "draws": grid.draws if cell.shots else 1,
            "data": prints[tasks],
            "supports": lists_digest({cell.task: {cell.seed: supports_of(lists, cell)}}) if lists else None,
        }
        keys[cell] = json.loads(json.dumps(facts))
    return keys


def _fingerprint(manifest: Manifest) -> str:
    """Of a data set, masks included."""
    masks = sorted({row.mask for row in manifest if row.mask is not None})
    digests = [file_digest(mask) for mask in masks]
    return hashlib.sha256("\n".join([manifest.fingerprint(), *sorted(digests)]).encode()).hexdigest()


def supports_of(lists: SupportLists, cell: Cell) -> list[Sequence[Sample]]:
    """The draws of one cell: the first K images of each."""
    return [draw[: cell.shots] for draw in lists[cell.task][cell.seed]]
