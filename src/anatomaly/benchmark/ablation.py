"""A method's ablation as one table: its rows are competitors of a grid that differ in a few settings."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anatomaly import presets
from anatomaly.benchmark.grid import Entry, Grid
from anatomaly.benchmark.leaderboard import read_cells, scores_of
from anatomaly.benchmark.run import Failure, run_grid
from anatomaly.errors import ConfigError
from anatomaly.evaluation.evaluation import tell_undefined
from anatomaly.evaluation.metrics import auroc, bootstrap, no_interval, summarise_draws
from anatomaly.files import write_whole
from anatomaly.methods import METHODS
from anatomaly.presets import configured
from anatomaly.tables import Table, interval_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from anatomaly.benchmark.leaderboard import Finished
    from anatomaly.config import FitConfig
    from anatomaly.data.manifest import Manifest

_FOLDER = Path(presets.__file__).parent / "ablations"


@dataclass(frozen=True)
class AblationRow:
    """One row of the table on one task.

    Attributes:
        task: The task.
        name: Name of the row.
        seeds: Number of trained models.
        auroc: Mean image AUROC over seeds and support draws.
        sd: Standard deviation of the seeds' means; NaN with one.
        low: Lower end of the 95 % bootstrap interval of the mean over test images (patients where known); NaN where
            there is none.
        high: Upper end, likewise.
        unreadable: Number of test images that could not be scored.
        undefined: Why there is no interval, as `Evaluation.undefined`.
    """

    task: str
    name: str
    seeds: int
    auroc: float
    sd: float
    low: float
    high: float
    unreadable: int = 0
    undefined: Mapping[str, str] = field(default_factory=dict)


def ablated_methods() -> list[str]:
    """Names of the methods that have a table of rows, a file each in `presets/ablations`."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def rows_of(method: str) -> Mapping[str, Mapping[str, Any]]:
    """A method's rows: by name, the settings in which each differs from those all share.

    Raises:
        ConfigError: The method has none.
    """
    import yaml

    if method not in ablated_methods():
        raise ConfigError(f"ablation: {method!r} has no rows, expected one of {', '.join(ablated_methods())}.")
    rows: Mapping[str, Mapping[str, Any]] = yaml.safe_load((_FOLDER / f"{method}.yaml").read_text(encoding="utf-8"))
    return rows


def entries_of(method: str, base: FitConfig, rows: Sequence[str] = ()) -> list[Entry]:
    """A method's rows as competitors of a grid, in the table's order.

    Args:
        method: A name in `ablated_methods()`.
        base: Settings that all rows share.
        rows: Names of rows; none takes all.

    Raises:
        ConfigError: The method or a row is unknown.
    """
    table = rows_of(method)
    if unknown := [name for name in rows if name not in table]:
        raise ConfigError(f"ablation: unknown row {unknown[0]!r}, expected one of {'; '.join(table)}.")
    return [_entry(name, dict(changes), base) for name, changes in table.items() if not rows or name in rows]


def _entry(name: str, changes: dict[str, Any], base: FitConfig) -> Entry:
    images = changes.pop("images", 0)
    if changes.get("teacher") == "global_teacher":
        changes["teacher"] = asdict(base.global_teacher)
    config = configured(changes, base)
    return Entry(name, config, images=images, teacher=config.teacher)


def run_ablation(
    manifest: Manifest,
    out: Path,
    base: FitConfig,
    *,
    method: str,
    rows: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    shots: int = 4,
    draws: int = 5,
    jobs: int = 1,
    on_step: Callable[[Sequence[str], int, int], None] = lambda running, done, total: None,
) -> tuple[list[AblationRow], list[Failure]]:
    """Train and judge every row on every task with every seed; cells that are finished in `out` are not redone.

    A few-shot method is judged on every task after training on all others, a one-class method trains on the very task.

    Args:
        manifest: Normals in split train, both labels in split test; for few-shot methods at least two tasks.
        out: Folder; cells and models as `run_grid` leaves them, the table in ablation.csv and ablation.md.
        base: Settings that all rows share.
        method: A name in `ablated_methods()`.
        rows: Names of rows; none takes all.
        tasks: Tasks to judge; none takes all.
        seeds: Of training and support draws.
        shots: K of few-shot methods.
        draws: Support draws of few-shot methods.
        jobs: Processes.
        on_step: Called as by `run_grid`.

    Returns:
        Rows by task, in the table's order, of the cells that are finished; and the cells that failed.

    Raises:
        ConfigError: The method or a row is unknown, a task has no test rows, no seeds, or `out` holds cells with other
            settings.
        ManifestError: A task is unknown.
        OutputError: `out` cannot be written.
    """
    entries = entries_of(method, base, rows)
    grid = Grid(
        manifest,
        "few_shot" if METHODS[method].few_shot else "one_class",
        entries,
        (),
        tasks=tasks,
        shots=[shots],
        seeds=seeds,
        draws=draws,
    )
    failures = run_grid(grid, out, jobs=jobs, on_step=on_step)
    found = summarise(read_cells(cell.folder(out) for cell in grid.cells()))
    order = {(task, entry.name): None for task in grid.judged for entry in entries}
    results = [found[place] for place in order if place in found]
    table = table_of(results)
    write_whole(out / "ablation.csv", table.csv())
    note = f"\n{table.note}\n" if table.note else ""
    write_whole(out / "ablation.md", f"{table.markdown()}\n{note}")
    return results, failures


def summarise(cells: Iterable[Finished]) -> dict[tuple[str, str], AblationRow]:
    """The figures by (task, row): of a row, all seeds together."""
    places: dict[tuple[str, str], list[Finished]] = defaultdict(list)
    for cell in cells:
        places[cell.task, cell.entry].append(cell)
    rows = {}
    for (task, name), members in places.items():
        scores, labels, groups = scores_of(members), members[0].labels, members[0].groups
        mean, sd = summarise_draws([auroc(cell.scores, labels) for cell in members])
        interval, reason = bootstrap(auroc, scores, labels, groups=groups), no_interval(labels, groups)
        rows[task, name] = AblationRow(
            task,
            name,
            len(members),
            mean,
            sd,
            *interval[1:],
            unreadable=len(members[0].unreadable),
            undefined={} if reason is None else {"interval": reason},
        )
    return rows


def table_of(results: Sequence[AblationRow], *, title: str = "") -> Table:
    """One line per row of the ablation, one column per task; a last line counts unreadable test images, if any."""
    tasks = list(dict.fromkeys(result.task for result in results))
    names = list(dict.fromkeys(result.name for result in results))
    found = {(result.task, result.name): result for result in results}

    def cell(task: str, name: str) -> str:
        if (task, name) not in found:
            return ""
        result = found[task, name]
        sd = "" if np.isnan(result.sd) else f" ± {result.sd:.3f}"
        return f"{result.auroc:.3f}{sd} ({interval_text(result.low, result.high)})"

    lines = [[name, *(cell(task, name) for task in tasks)] for name in names]
    unreadable = {task: max(row.unreadable for row in results if row.task == task) for task in tasks}
    if any(unreadable.values()):
        lines.append(["unreadable test images", *(str(unreadable[task]) for task in tasks)])
    note = tell_undefined((result.task, result.undefined) for result in results)
    return Table(title, ["row", *tasks], lines, note)
