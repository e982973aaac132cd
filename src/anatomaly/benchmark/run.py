"""Run the cells of a grid that are not finished yet, in processes of their own; only files pass between them."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from anatomaly._version import __version__
from anatomaly.benchmark.cost import Cost
from anatomaly.benchmark.grid import Cell, Entry, Grid, keys_of, settings_of, support_lists_of, supports_of
from anatomaly.config import differences, with_later_settings
from anatomaly.data.decoding import MAX_DECODED_GIB, decoded_limit, limit_decoded
from anatomaly.errors import AnatomalyError, ConfigError
from anatomaly.evaluation.protocols import leave_one_task_out, supports_at_most
from anatomaly.evaluation.support_lists import write_support_lists
from anatomaly.files import read_json, write_whole

if TYPE_CHECKING:
    from anatomaly.evaluation.support_lists import SupportLists
    from anatomaly.types import Sample

logger = logging.getLogger(__name__)

#: What a finished cell is recognised by.
CELL = "cell.json"


@dataclass(frozen=True)
class Failure:
    """A cell that could not be run, and why; the next run tries it again."""

    cell: str
    reason: str


def run_grid(
    grid: Grid,
    out: Path,
    *,
    jobs: int = 1,
    cluster: Cluster | None = None,
    on_step: Callable[[Sequence[str], int, int], None] = lambda running, done, total: None,
) -> list[Failure]:
    """Run all cells that are not finished yet.

    Args:
        grid: What to run.
        out: Folder; `supports.json` (few_shot) and `cells/` are written to it, trained models to `models/`.
        jobs: Processes; the machine's cores are shared out among them.
        cluster: Machines that run the cells instead; all of them see `out` and the images under the same names.
        on_step: Called with what runs now and how many of how many cells are done: at the start, and after each cell
            and each training.

    Returns:
        The cells that failed; all others are finished.

    Raises:
        ConfigError: `out` holds cells of other settings or data, the supports are unusable, or jobs is below 1.
        OutputError: `out` cannot be written.
    """
    if jobs < 1:
        raise ConfigError(f"benchmark: jobs is {jobs}, expected at least 1.")
    grid = replace(grid, manifest=grid.manifest.with_hashes())
    lists = support_lists_of(grid)
    keys = keys_of(grid, lists)
    todo = [cell for cell in keys if not _finished(cell.folder(out), keys[cell])]
    entries = {entry.name: entry for entry in grid.entries}
    trainings = {cell.model(out): cell for cell in todo if entries[cell.entry].trained}
    total, done = len(keys), len(keys) - len(todo)
    reasons: dict[Cell, str] = {}
    if not todo:
        on_step((), done, total)
        return []
    if lists:
        write_support_lists(lists, out / "supports.json")
    with _own_processes(jobs) if cluster is None else nullcontext(_Everywhere(cluster)) as pool:
        at_once = jobs if cluster is None else cluster.at_once
        waiting: dict[Future[None], tuple[str, list[Cell]]] = {}

        def running() -> list[str]:  # jobs are begun in the order in which they were submitted
            return [name for job, (name, _) in waiting.items() if not job.done()][:at_once]

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
            on_step(running(), done, total)
            while waiting:
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for job in finished:
                    name, cells = waiting.pop(job)
                    trained = name.startswith("training of")
                    done += 0 if trained else 1
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
                    on_step(running(), done, total)
        except BrokenProcessPool:
            reason = "a process was killed, probably for want of memory. Run again with fewer --jobs."
            reasons |= {cell: reason for cell in todo if not _finished(cell.folder(out), keys[cell])}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [Failure(cell.name, reasons[cell]) for cell in keys if cell in reasons]


class Cluster(Protocol):
    """Machines that run calls (`archive.cluster.Tasks`)."""

    processors: int
    at_once: int

    def submit(self, call: Callable[..., None], /, *arguments: Any) -> Future[None]:
        """Run a call as soon as there is room."""
        ...


class _Everywhere:
    """The calls of a grid on the machines of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def submit(self, call: Callable[..., None], *arguments: Any) -> Future[None]:
        return self.cluster.submit(_run_elsewhere, self.cluster.processors, decoded_limit(), call, *arguments)

    def shutdown(self, *, cancel_futures: bool) -> None:
        """What runs ends with the connection to the cluster."""


def _run_elsewhere(threads: int, max_decoded_gib: float, call: Callable[..., None], *arguments: Any) -> None:
    import torch

    limit_decoded(max_decoded_gib)
    torch.set_num_threads(threads)
    call(*arguments)


def _own_processes(jobs: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(jobs, decoded_limit()))


def _finished(folder: Path, key: Mapping[str, Any]) -> bool:
    """Whether a cell's figures are there; refuse those of other settings."""
    try:
        found = read_json(folder / CELL, finite=False)["key"]
        found["settings"] = with_later_settings(found["settings"])
        if key["peer"] is not None:  # cells of before recorded settings that no peer has
            found["settings"] = {name: found["settings"].get(name) for name in key["settings"]}
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as err:
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
    from anatomaly.training.fit import fit

    if grid.protocol == "few_shot":
        fold = next(fold for fold in leave_one_task_out(grid.manifest) if fold.test_task == cell.task)
        rows = grid.manifest.select(task=fold.train_tasks)
    else:
        rows = grid.manifest.select(task=cell.task)
    fresh = not model.exists()  # the time of a resumed training says nothing
    cost = Cost()
    fit(rows, model, settings_of(grid, cell))
    if fresh:
        write_whole(model / "cost.json", json.dumps(cost.so_far()).encode())


def _run_cell(grid: Grid, cell: Cell, lists: SupportLists, out: Path, key: Mapping[str, Any]) -> None:
    from anatomaly.evaluation.cells import write_evaluations
    from anatomaly.evaluation.evaluate import evaluate

    (entry,) = (entry for entry in grid.entries if entry.name == cell.entry)
    judge: Any = _judge(grid, cell, entry, cell.model(out))
    cost = Cost()  # of judging; the first cell of a process has loaded libraries and teacher before
    if cell.shots:
        supports: Sequence[Sequence[Sample]] | None = supports_of(lists, cell)
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
    training = _cost_of(recorded) if entry.trained and recorded.exists() else {}
    facts = {"key": key, **cost.so_far(), "training": training, "version": __version__}
    write_whole(folder / CELL, (json.dumps(facts, indent=1) + "\n").encode())


def _cost_of(file: Path) -> dict[str, Any]:
    """What a training cost."""
    try:
        found = read_json(file)
        if not isinstance(found, dict):
            raise TypeError("no mapping")
    except (OSError, ValueError, TypeError) as err:
        raise ConfigError(f"{file}: is damaged. Delete it; the time of the training is then left open.") from err
    return found


def _judge(grid: Grid, cell: Cell, entry: Entry, model: Path) -> Any:
    """What `evaluate` asks for scores: a trained model, a peer, or an untrained method."""
    from anatomaly.backbones import build_backbone
    from anatomaly.benchmark.peers import build_peer
    from anatomaly.detector.detector import Detector
    from anatomaly.detector.device import choose_device
    from anatomaly.detector.facts import ModelFacts
    from anatomaly.methods import build_method
    from anatomaly.training.fit import teachers_of

    settings = settings_of(grid, cell)
    if entry.trained:
        return Detector.load(model, device=settings.training.device)
    if entry.peer is not None:
        wanted = settings.teacher
        teacher = build_backbone(wanted.name, weights=wanted.weights, normalise=wanted.normalise, blocks=wanted.blocks)
        return build_peer(
            entry.peer,
            teacher,
            preprocessing=settings.preprocessing,
            seed=cell.seed,
            task_intensity=settings.task_intensity,
            device=choose_device(settings.training.device),
            **entry.options,
        )
    method = build_method(settings.method.name, teachers_of(settings), settings.method.settings)
    return Detector(
        method,
        preprocessing=settings.preprocessing,
        scoring=settings.scoring,
        facts=ModelFacts.of(settings.method, method),
        task_intensity=settings.task_intensity,
        device=settings.training.device,
    )
