"""A method's ablation as one table: every row trained and judged on every task and seed, resumable at any point."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from anatomaly.config import FitConfig, MethodConfig, TeacherConfig
from anatomaly.errors import ConfigError
from anatomaly.evaluation.cells import write_evaluations
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.metrics import auroc, bootstrap, summarise_draws
from anatomaly.evaluation.protocols import leave_one_task_out, samples_to_test, supports_at_most
from anatomaly.files import write_whole
from anatomaly.presets import configured
from anatomaly.training.fit import fit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from anatomaly.data.manifest import Manifest
    from anatomaly.types import Sample

logger = logging.getLogger(__name__)

#: Supports of the nearest-neighbour rows beside a one-class method; more are rarely better and cost memory.
NEIGHBOURS = 64


def _of(name: str, **changes: object) -> Callable[[FitConfig], FitConfig]:
    def change(base: FitConfig) -> FitConfig:
        return configured({"method": {"name": name, name: changes}}, base)

    return change


_pdd, _d24fad, _attention = partial(_of, "pdd"), partial(_of, "d24fad"), partial(_of, "attention")


def _one_student(**changes: object) -> Callable[[FitConfig], FitConfig]:
    return _pdd(two_students=False, shared_students=False, **changes)  # one student shares its weights with none


def _reverse_distillation(base: FitConfig) -> FitConfig:
    return replace(_one_student(mpa=False)(base), global_teacher=TeacherConfig("none"))


def _attention_trained(**changes: object) -> Callable[[FitConfig], FitConfig]:
    return lambda base: _attention()(replace(base, training=replace(base.training, **changes)))  # type: ignore[arg-type]


def _attention_maximum(base: FitConfig) -> FitConfig:
    return _attention()(replace(base, scoring=replace(base.scoring, pooling="max")))


def _nearest(base: FitConfig) -> FitConfig:
    return replace(base, method=MethodConfig("nearest"))


def _nearest_global(base: FitConfig) -> FitConfig:
    return replace(_nearest(base), teacher=base.global_teacher)


#: By method: name of the row -> what it changes in the settings.
ABLATIONS: Mapping[str, Mapping[str, Callable[[FitConfig], FitConfig]]] = {
    "pdd": {
        "one teacher, one student": _reverse_distillation,
        "+ global teacher (InA, MMU)": _one_student(mpa=False),
        "+ priors (MPA)": _one_student(),
        "+ second student (PDD)": _pdd(),
        "PDD without diversity loss": _pdd(diversity_weight=0.0),
        "PDD, students alike": _pdd(relation="alike"),
        "PDD, shared students": _pdd(shared_students=True),
        "PDD, release's cosine sign": _pdd(cosine_sign="release"),
        "nearest neighbours, teacher": _nearest,
        "nearest neighbours, global teacher": _nearest_global,
    },
    "d24fad": {
        "TSD only": _d24fad(self_distillation=False),
        "SSD only, equal weights": _d24fad(tsd_weight=0.0, learn_to_weight=False),
        "SSD + TSD, equal weights": _d24fad(learn_to_weight=False),
        "SSD + TSD + L2W (D24FAD)": _d24fad(),
        "nearest neighbours, teacher": _nearest,
    },
    "attention": {
        "patch attention": _attention(),
        "not trained": _attention_trained(epochs=0),
        "without synthetic tasks": _attention_trained(synthetic=0),
        "without surroundings": _attention(surroundings=False),
        "without mirrored supports": _attention(mirrored=False),
        "without resized supports": _attention(resized=False),
        "without the teacher's own levels": _attention(teacher_levels=0),
        "deepest level counts once": _attention(deepest=1.0),
        "score is the maximum": _attention_maximum,
        "nearest neighbours, teacher": _nearest,
    },
}


@dataclass(frozen=True)
class AblationRow:
    """One row of the table on one task.

    Attributes:
        task: The task.
        name: Name of the row in `ABLATIONS`.
        seeds: Number of trained models.
        auroc: Mean image AUROC over seeds and support draws.
        sd: Standard deviation of the seeds' means; NaN with one.
        low: Lower end of the 95 % bootstrap interval of the mean over test images (patients where known).
        high: Upper end.
    """

    task: str
    name: str
    seeds: int
    auroc: float
    sd: float
    low: float
    high: float


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
    on_cell: Callable[[str], None] = lambda cell: None,
) -> list[AblationRow]:
    """Train and judge every row on every task with every seed; cells that are finished in `out` are not redone.

    PDD trains on the task it is judged on (one class); the others train on all other tasks (leave one task out).  A
    nearest-neighbour row gets, beside PDD, `NEIGHBOURS` normal training images, else the same supports.

    Args:
        manifest: Normals in split train, both labels in split test; for all but PDD at least two tasks.
        out: Folder; a cell's model and figures go to <task>/<row>/seed_<n>, the table to ablation.csv and ablation.md.
        base: Settings that all rows share.
        method: A name in `ABLATIONS`.
        rows: Names in `ABLATIONS[method]`; none takes all.
        tasks: Tasks to judge; none takes all.
        seeds: Of the training.
        shots: K of few-shot rows.
        draws: Support draws of few-shot rows.
        on_cell: Called with the name of every cell before it is looked at.

    Returns:
        Rows by task, in the table's order.

    Raises:
        ConfigError: A row is unknown, a task has no test rows, no seeds, or `out` holds cells with other settings.
        ManifestError: A task is unknown.
        Errors of `fit` and `evaluate` otherwise.
    """
    table = ABLATIONS[method]
    if unknown := [name for name in rows if name not in table]:
        raise ConfigError(f"ablation: unknown row {unknown[0]!r}, expected one of {'; '.join(table)}.")
    if not seeds:
        raise ConfigError("ablation: seeds is empty, expected at least one. Pass --seeds [0].")
    chosen = [name for name in table if not rows or name in rows]
    tests = {task: samples_to_test(manifest, task) for task in tasks or manifest.tasks}
    results = []
    for task in tests:
        if method == "pdd":
            train = manifest.select(task=task)
        else:
            fold = next(fold for fold in leave_one_task_out(manifest) if fold.test_task == task)
            train = manifest.select(task=fold.train_tasks)
        for name in chosen:
            cells = [out / task / _slug(name) / f"seed_{seed}" for seed in seeds]
            for seed, cell in zip(seeds, cells, strict=True):
                on_cell(f"{task}, {name}, seed {seed}")
                config = table[name](replace(base, training=replace(base.training, seed=seed)))
                detector = fit(train, cell, config)
                supports, drawn = (0, 1) if method == "pdd" else (shots, draws)
                if method == "pdd" and detector.method.needs_support:
                    supports = min(NEIGHBOURS, supports_at_most(manifest, task))
                if not _judged(cell, supports, drawn, tests[task]):
                    found = evaluate(detector, manifest, task=task, shots=[supports], draws=drawn, seed=seed)
                    write_evaluations(found, cell)
            results.append(_summarise(task, name, cells))
            _write(results, out)
    return results


def _judged(cell: Path, shots: int, draws: int, tests: Sequence[Sample]) -> bool:
    """Whether a cell holds the figures of these supports and test rows."""
    try:
        (facts,) = json.loads((cell / "evaluation.json").read_text(encoding="utf-8"))
        with (cell / "scores.csv").open(encoding="utf-8", newline="") as stream:
            scored = {(row["path"], row["frame"], row["label"]) for row in csv.DictReader(stream)}
    except FileNotFoundError:
        return False
    wanted = {(str(row.path), "" if row.frame is None else str(row.frame), str(row.label)) for row in tests}
    same = scored <= wanted and len(scored) + len(facts["unreadable"]) == len(tests)
    return same and (facts["shots"], facts["draws"]) == (shots, draws)


def _slug(name: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split()).lower()


def _summarise(task: str, name: str, cells: Sequence[Path]) -> AblationRow:
    """One row's figures, read back from what `write_evaluations` left in its cells."""
    by_cell, all_labels, all_groups = zip(*map(_read_scores, cells), strict=True)
    labels, groups = all_labels[0], all_groups[0]  # the test images are the same in all cells
    means = [auroc(scores, labels) for scores in by_cell]
    mean, sd = summarise_draws(means)
    interval = bootstrap(auroc, np.concatenate(by_cell), labels, groups=groups)
    return AblationRow(task, name, len(cells), mean, sd, interval.low, interval.high)


def _read_scores(cell: Path) -> tuple[NDArray[np.float64], NDArray[np.int64], list[str] | None]:
    """(draws, N) scores, (N,) labels, and N patients where all are known."""
    draws: dict[str, list[float]] = defaultdict(list)
    labels: dict[str, list[int]] = defaultdict(list)
    patients: dict[str, list[str]] = defaultdict(list)
    with (cell / "scores.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            draws[row["draw"]].append(float(row["score"]))
            labels[row["draw"]].append(int(row["label"]))
            patients[row["draw"]].append(row["patient"])
    first = next(iter(draws))
    groups = patients[first] if all(patients[first]) else None
    return np.array(list(draws.values())), np.array(labels[first]), groups


def _write(results: Sequence[AblationRow], out: Path) -> None:
    columns, cells = table_of(results)
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([columns, *cells])
    write_whole(out / "ablation.csv", stream.getvalue().encode())
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]
    write_whole(out / "ablation.md", ("\n".join(lines) + "\n").encode())


def table_of(results: Sequence[AblationRow]) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells: one line per row of the ablation, one column per task."""
    tasks = list(dict.fromkeys(result.task for result in results))
    names = list(dict.fromkeys(result.name for result in results))
    found = {(result.task, result.name): result for result in results}

    def cell(task: str, name: str) -> str:
        if (task, name) not in found:
            return ""
        result = found[task, name]
        sd = "" if np.isnan(result.sd) else f" ± {result.sd:.3f}"
        return f"{result.auroc:.3f}{sd} ({result.low:.3f} to {result.high:.3f})"

    return ["row", *tasks], [[name, *(cell(task, name) for task in tasks)] for name in names]
