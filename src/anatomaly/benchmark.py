"""The grid: method x teacher x task x shots x seed, each cell run once, whatever happens to the machine in between.

A cell is a folder whose `cell.json` is written last and says what the cell was made of; a cell that says what is wanted
now is never run again.  Cells run in processes of their own; nothing but files passes from one run to the next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from anatomaly import __version__
from anatomaly.config import differences, with_later_settings
from anatomaly.cost import Cost
from anatomaly.data.decoding import MAX_DECODED_GIB, decoded_limit, limit_decoded
from anatomaly.errors import AnatomalyError, ConfigError
from anatomaly.protocols import draw_supports, forbid_leak, leave_one_task_out, samples_to_test, supports_at_most
from anatomaly.results import write_whole
from anatomaly.support_lists import lists_digest, read_support_lists, write_support_lists

if TYPE_CHECKING:
    from anatomaly.config import FitConfig, TeacherConfig
    from anatomaly.data.manifest import Manifest
    from anatomaly.support_lists import SupportLists
    from anatomaly.types import Sample

logger = logging.getLogger(__name__)

#: What a finished cell is recognised by.
CELL = "cell.json"


@dataclass(frozen=True)
class Entry:
    """One competitor of the grid.

    Attributes:
        name: What tables call it.
        config: Settings of `fit`; the grid sets teacher and seed.
        peer: Name in `peers.PEERS` for a method that is not ours; of `config` it then takes the preprocessing.
        images: In protocol one_class, how many normal training images a method that compares with images gets; 0 = all.
        options: Keyword arguments of a peer.
    """

    name: str
    config: FitConfig
    peer: str | None = None
    images: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether `fit` makes a model before anything is judged."""
        return self.peer is None and self.config.method.name != "nearest"


@dataclass(frozen=True)
class Grid:
    """Everything a benchmark consists of.

    Attributes:
        manifest: Normals in split train, both labels in split test.
        protocol: few_shot gives K supports of a task, and trains on all other tasks what needs training; one_class
            gives all normal training images of the task.
        entries: The competitors; names differ.
        teachers: The frozen backbones, each with every entry.
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
        chosen: Mapping[str, Sequence[object]] = {
            "methods": names,
            "teachers": [teacher.name for teacher in self.teachers],
            "tasks": self.judged,
            "seeds": self.seeds,
            "shots": self.shots,
        }
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
        from anatomaly.anomalib_bridge import require_anomalib
        from anatomaly.backbones import check_name
        from anatomaly.peers import build_algorithm

        for teacher in self.teachers:
            check_name(teacher.name)
        for entry in self.entries:
            if entry.peer is not None and build_algorithm(entry.peer, **entry.options).from_anomalib:
                require_anomalib(entry.name)
            few_shot = entry.peer is not None or entry.config.method.name != "pdd"
            if self.protocol == "few_shot" and not few_shot:
                raise ConfigError(f"benchmark: {entry.name} is a one-class method. Set protocol: one_class.")
            one_class = entry.config.method.name in ("pdd", "attention")
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
            for teacher in self.teachers
            for task in self.judged
            for k in shots
        ]


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


@dataclass(frozen=True)
class Failure:
    """A cell that could not be run, and why; the next run tries it again."""

    cell: str
    reason: str


def slug(name: str) -> str:
    """`name` as the name of a folder, never one above."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).replace("..", "__")


def run_grid(
    grid: Grid, out: Path, *, jobs: int = 1, on_step: Callable[[str, int, int], None] = lambda name, done, total: None
) -> list[Failure]:
    """Run all cells that are not finished yet.

    Args:
        grid: What to run.
        out: Folder; `supports.json` (few_shot) and `cells/` are written to it, trained models to `models/`.
        jobs: Processes; the machine's cores are shared out among them.
        on_step: Called with a name and how many of how many steps are done, after each cell and each training.

    Returns:
        The cells that failed; all others are finished.

    Raises:
        ConfigError: `out` holds cells of other settings or data, or the supports are unusable.
        OutputError: `out` cannot be written.
    """
    grid = replace(grid, manifest=grid.manifest.with_hashes())
    lists = _lists(grid)
    keys = _keys(grid, lists)
    todo = [cell for cell in keys if not _finished(cell.folder(out), keys[cell])]
    entries = {entry.name: entry for entry in grid.entries}
    trainings = {cell.model(out): cell for cell in todo if entries[cell.entry].trained}
    total, done = len(keys) + len(trainings), len(keys) - len(todo)
    on_step("finished before", done, total)
    reasons: dict[Cell, str] = {}
    if not todo:
        return []
    if lists:
        write_support_lists(lists, out / "supports.json")
    context = multiprocessing.get_context("spawn")
    start = (jobs, decoded_limit())
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=start) as pool:
        waiting: dict[Future[None], tuple[str, list[Cell]]] = {}

        def submit(cell: Cell) -> None:
            job = pool.submit(_run_cell, grid, cell, lists, out, keys[cell])
            waiting[job] = (cell.name, [cell])

        try:
            for cell in todo:
                if not entries[cell.entry].trained:
                    submit(cell)
            for model, first in trainings.items():
                cells = [cell for cell in todo if cell.model(out) == model and entries[cell.entry].trained]
                job = pool.submit(_train, grid, first, model)
                waiting[job] = (f"training of {first._replace(shots=0).name}", cells)
            while waiting:
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for job in finished:
                    name, cells = waiting.pop(job)
                    trained = name.startswith("training of")
                    done += 1
                    try:
                        job.result()
                    except BrokenProcessPool:
                        raise
                    except Exception as err:  # one cell's trouble must not cost the others
                        done += len(cells) * trained
                        kind = "" if isinstance(err, AnatomalyError) else f"{type(err).__name__}: "
                        reasons |= dict.fromkeys(cells, f"{kind}{err}")
                    else:
                        for cell in cells if trained else ():
                            submit(cell)
                    on_step(name, done, total)
        except BrokenProcessPool:
            reason = "a process was killed, probably for want of memory. Run again with fewer --jobs."
            reasons |= {cell: reason for cell in todo if not _finished(cell.folder(out), keys[cell])}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [Failure(cell.name, reasons[cell]) for cell in keys if cell in reasons]


def _lists(grid: Grid) -> SupportLists:
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


def _settings(grid: Grid, cell: Cell) -> FitConfig:
    """What `fit` is called with."""
    (entry,) = (entry for entry in grid.entries if entry.name == cell.entry)
    (teacher,) = (teacher for teacher in grid.teachers if teacher.name == cell.teacher)
    training = replace(entry.config.training, seed=cell.seed)
    return replace(entry.config, teacher=teacher, training=training)


def _keys(grid: Grid, lists: SupportLists) -> dict[Cell, dict[str, Any]]:
    """Everything the figures of each cell depend on, in JSON's terms."""
    entries = {entry.name: entry for entry in grid.entries}
    prints: dict[tuple[str, ...], str] = {}
    keys = {}
    for cell in grid.cells():
        entry = entries[cell.entry]
        tasks = tuple(grid.manifest.tasks) if entry.trained and grid.protocol == "few_shot" else (cell.task,)
        if tasks not in prints:
            prints[tasks] = _fingerprint(grid.manifest.select(task=tasks))
        facts = {
            "protocol": grid.protocol,
            "cell": cell._asdict(),
            "peer": entry.peer,
            "options": dict(entry.options),
            "images": entry.images,
            "settings": asdict(_settings(grid, cell)),
            "draws": grid.draws if cell.shots else 1,
            "data": prints[tasks],
            "supports": lists_digest({cell.task: {cell.seed: _first(lists, cell)}}) if lists else None,
        }
        keys[cell] = json.loads(json.dumps(facts))
    return keys


def _fingerprint(manifest: Manifest) -> str:
    """Of a data set, masks included."""
    masks = sorted({row.mask for row in manifest if row.mask is not None})
    digests = [hashlib.sha256(mask.read_bytes()).hexdigest() for mask in masks]
    return hashlib.sha256("\n".join([manifest.fingerprint(), *sorted(digests)]).encode()).hexdigest()


def _first(lists: SupportLists, cell: Cell) -> list[Sequence[Sample]]:
    return [draw[: cell.shots] for draw in lists[cell.task][cell.seed]]


def _finished(folder: Path, key: Mapping[str, Any]) -> bool:
    """Whether a cell's figures are there; refuse those of other settings."""
    try:
        found = json.loads((folder / CELL).read_text(encoding="utf-8"))["key"]
        found["settings"] = with_later_settings(found["settings"])
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(f"{folder / CELL}: is damaged. Delete the folder, and the cell is run again.") from err
    if found == key:
        return True
    raise ConfigError(
        f"{folder}: holds a cell of another benchmark ({', '.join(differences(found, key)[:3])}). Choose another --out "
        "or delete it."
    )


def _start_worker(jobs: int, max_decoded_gib: float = MAX_DECODED_GIB) -> None:
    """Share out the cores, or what OMP_NUM_THREADS leaves of them, and pass on the limit of decoded files."""
    import torch

    limit_decoded(max_decoded_gib)
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def _end_with(parent: Any) -> None:
    """End this process when its parent has gone, even killed: the next run must not meet it in the same folders."""
    if parent is not None:  # None where a test runs cells in its own process
        parent.join()
        os._exit(1)


def _train(grid: Grid, cell: Cell, model: Path) -> None:
    from anatomaly.training import fit

    if grid.protocol == "few_shot":
        fold = next(fold for fold in leave_one_task_out(grid.manifest) if fold.test_task == cell.task)
        rows = grid.manifest.select(task=fold.train_tasks)
    else:
        rows = grid.manifest.select(task=cell.task)
    fresh = not model.exists()  # the time of a resumed training says nothing
    cost = Cost()
    fit(rows, model, _settings(grid, cell))
    if fresh:
        write_whole(model / "cost.json", json.dumps(cost.so_far()).encode())


def _run_cell(grid: Grid, cell: Cell, lists: SupportLists, out: Path, key: Mapping[str, Any]) -> None:
    from anatomaly.evaluation import evaluate, write_evaluations

    (entry,) = (entry for entry in grid.entries if entry.name == cell.entry)
    judge: Any = _judge(grid, cell, entry, cell.model(out))
    cost = Cost()  # of judging; the first cell of a process has loaded libraries and teacher before
    if cell.shots:
        supports: Sequence[Sequence[Sample]] | None = _first(lists, cell)
        shots, draws = cell.shots, grid.draws
    else:
        supports, draws = None, 1
        most = supports_at_most(grid.manifest, cell.task)
        shots = min(entry.images or most, most)
    found = evaluate(
        judge, grid.manifest, task=cell.task, shots=[shots], draws=draws, seed=cell.seed, supports=supports
    )
    folder = cell.folder(out)
    write_evaluations(found, folder)
    recorded = cell.model(out) / "cost.json"
    training = json.loads(recorded.read_text(encoding="utf-8")) if entry.trained and recorded.is_file() else {}
    facts = {"key": key, **cost.so_far(), "training": training, "version": __version__}
    write_whole(folder / CELL, (json.dumps(facts, indent=1) + "\n").encode())


def _judge(grid: Grid, cell: Cell, entry: Entry, model: Path) -> Any:
    """What `evaluate` asks for scores: a trained model, a peer, or nearest neighbours."""
    from anatomaly.backbones import build_backbone
    from anatomaly.inference import Detector, choose_device
    from anatomaly.methods import build_method
    from anatomaly.peers import build_peer

    settings = _settings(grid, cell)
    if entry.trained:
        return Detector.load(model, device=settings.training.device)
    wanted = settings.teacher
    teacher = build_backbone(wanted.name, weights=wanted.weights, normalise=wanted.normalise)
    if entry.peer is not None:
        return build_peer(
            entry.peer,
            teacher,
            preprocessing=settings.preprocessing,
            seed=cell.seed,
            task_intensity=settings.task_intensity,
            device=choose_device(settings.training.device),
            **entry.options,
        )
    method = build_method(settings.method.name, teacher)
    return Detector(
        method,
        preprocessing=settings.preprocessing,
        scoring=settings.scoring,
        facts={"method": asdict(settings.method), "teacher": teacher.facts()},
        task_intensity=settings.task_intensity,
        device=settings.training.device,
    )
