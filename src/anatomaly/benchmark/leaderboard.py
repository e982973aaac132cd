"""From the cells of a benchmark to its figures: means, spreads, intervals, costs, and who beats whom beyond chance."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from anatomaly.errors import ConfigError
from anatomaly.evaluation.cells import read_evaluation
from anatomaly.evaluation.comparison import Difference, compare_auroc, holm
from anatomaly.evaluation.metrics import auroc, bootstrap, no_interval, summarise_draws
from anatomaly.files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

#: In place of a task: the mean over all of them.
ALL_TASKS = "mean of tasks"


@dataclass(frozen=True)
class Finished:
    """A finished cell, as `evaluation.cells.write_evaluations` and the benchmark left it.

    Attributes:
        entry: Name of the competitor.
        teacher: Name of the frozen backbone.
        task: The task.
        shots: K; 0 for one class.
        seed: Of training and draws.
        images: N test images as (path, frame).
        labels: (N,) 0 or 1.
        groups: N patients, or None where not all are known.
        scores: (draws, N).
        metrics: Per draw, metric by name.
        seconds: Wall time of judging.
        peak_mib: Peak memory of judging, or None.
        training: Wall time and peak memory of training, empty where nothing is trained.
        unreadable: Per test image that could not be scored, its name and why.
        undefined: Why figures cannot be had, by name, as `Evaluation.undefined`.
    """

    entry: str
    teacher: str
    task: str
    shots: int
    seed: int
    images: tuple[tuple[str, str], ...]
    labels: NDArray[np.int64]
    groups: tuple[str, ...] | None
    scores: NDArray[np.float64]
    metrics: tuple[dict[str, float], ...]
    seconds: float
    peak_mib: float | None
    training: Mapping[str, float | None]
    unreadable: tuple[str, ...] = ()
    undefined: Mapping[str, str] = field(default_factory=dict)


class Place(NamedTuple):
    """One row of the leaderboard: a competitor with a teacher on a task at K shots, all seeds and draws together."""

    task: str
    shots: int
    entry: str
    teacher: str


@dataclass(frozen=True)
class Row:
    """The figures of one place.

    Attributes:
        place: Whose they are.
        seeds: Number of seeds.
        draws: Support draws per seed.
        images: Test images that were scored.
        metrics: (mean, standard deviation over seeds and draws) by metric; sd NaN for a single value.
        low: Lower end of the 95 % bootstrap interval of the mean AUROC over test images (patients where known); NaN
            where there is none.
        high: Upper end, likewise.
        milliseconds: Judging an image, per draw.
        peak_mib: Largest peak memory of a cell, or None where not measured.
        training_seconds: Mean wall time of a training, or None where nothing is trained or it was not measured.
        unreadable: Per test image that could not be scored, its name and why.
        undefined: Why figures cannot be had, by name, as `Evaluation.undefined`.
    """

    place: Place
    seeds: int
    draws: int
    images: int
    metrics: Mapping[str, tuple[float, float]]
    low: float
    high: float
    milliseconds: float
    peak_mib: float | None
    training_seconds: float | None
    unreadable: tuple[str, ...] = ()
    undefined: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Duel:
    """A place against the reference on the same images, seeds and draws.

    Attributes:
        place: The challenger; task `ALL_TASKS` for the mean over all tasks.
        against: Name of the reference.
        difference: Of the mean AUROC, with interval and p; these are NaN where they cannot be had.
        adjusted: p after Holm over all duels on single tasks, or over all on means of tasks, that have one; else NaN.
        reason: Why interval and p cannot be had, or empty.
    """

    place: Place
    against: str
    difference: Difference
    adjusted: float
    reason: str = ""


def read_cells(folders: Iterable[Path]) -> list[Finished]:
    """Read the finished cells among some folders.

    Raises:
        ConfigError: A cell is damaged.
    """
    return [_read_cell(folder) for folder in folders if (folder / "cell.json").is_file()]


def _read_cell(folder: Path) -> Finished:
    try:
        return _parsed(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as err:
        raise ConfigError(f"{folder}: a damaged cell. Delete the folder and run the benchmark again.") from err


def _parsed(folder: Path) -> Finished:
    facts = read_json(folder / "cell.json", finite=False)
    cell = facts["key"]["cell"]
    if not all(isinstance(cell[name], str) for name in ("entry", "teacher", "task")):
        raise TypeError("a name is no text")
    return Finished(
        entry=cell["entry"],
        teacher=cell["teacher"],
        task=cell["task"],
        shots=int(cell["shots"]),
        seed=int(cell["seed"]),
        **read_evaluation(folder)._asdict(),
        seconds=float(facts["seconds"]),
        peak_mib=None if facts["peak_mib"] is None else float(facts["peak_mib"]),
        training={name: None if value is None else float(value) for name, value in facts["training"].items()},
    )


def rank(cells: Iterable[Finished]) -> list[Row]:
    """One row per place, by task, K and descending AUROC."""
    places: dict[Place, list[Finished]] = defaultdict(list)
    for cell in cells:
        places[Place(cell.task, cell.shots, cell.entry, cell.teacher)].append(cell)
    rows = [_row(place, members) for place, members in places.items()]
    return sorted(rows, key=lambda row: (row.place.task, row.place.shots, -row.metrics["auroc"][0]))


def _row(place: Place, cells: Sequence[Finished]) -> Row:
    first = cells[0]
    draws = [draw for cell in cells for draw in cell.metrics]
    interval = bootstrap(auroc, scores_of(cells), first.labels, groups=first.groups)
    peaks = [cell.peak_mib for cell in cells if cell.peak_mib is not None]
    trainings = [cell.training["seconds"] for cell in cells if cell.training.get("seconds") is not None]
    judged = sum(cell.scores.size for cell in cells)
    reason = no_interval(first.labels, first.groups)
    return Row(
        place=place,
        seeds=len(cells),
        draws=len(first.scores),
        images=len(first.images),
        metrics={name: summarise_draws([draw[name] for draw in draws if name in draw]) for name in draws[0]},
        low=interval.low,
        high=interval.high,
        milliseconds=1000 * sum(cell.seconds for cell in cells) / judged,
        peak_mib=max(peaks, default=None),
        training_seconds=float(np.mean([t for t in trainings if t is not None])) if trainings else None,
        unreadable=first.unreadable,
        undefined={**first.undefined, **({} if reason is None else {"interval": reason})},
    )


def scores_of(cells: Sequence[Finished]) -> NDArray[np.float64]:
    """(seeds * draws, N) scores of cells that have scored the same images.

    Raises:
        ConfigError: They have not.
    """
    _require_same_images(cells)
    return np.concatenate([cell.scores for cell in cells])


def _require_same_images(cells: Sequence[Finished]) -> None:
    for cell in cells:
        if cell.images != cells[0].images:
            raise ConfigError(
                f"benchmark: task {cell.task!r}: {cell.entry} with seed {cell.seed} scored other images than "
                f"{cells[0].entry} with seed {cells[0].seed}; a file was unreadable. Delete both cells and run again."
            )


def duels(cells: Iterable[Finished], *, reference: str) -> list[Duel]:
    """Compare every competitor with one that was named before, on the same images, seeds and draws.

    Seeds that only one of two has finished take no part; a mean is taken over all tasks or not at all.  With a single
    image or patient of a class there is a difference, but neither interval nor p.

    Args:
        cells: Of one benchmark.
        reference: Name of the competitor to beat; a teacher's competitors meet it with the same teacher.

    Returns:
        Duels on single tasks, then on the mean over tasks where there are several; none where the reference is alone.

    Raises:
        ConfigError: The reference took no part, or two competitors scored other images.
    """
    places: dict[Place, list[Finished]] = defaultdict(list)
    for cell in cells:
        places[Place(cell.task, cell.shots, cell.entry, cell.teacher)].append(cell)
    if reference not in {place.entry for place in places}:
        raise ConfigError(f"benchmark: the reference {reference!r} has no finished cells. Name another --reference.")
    single: dict[Place, tuple[Difference, str]] = {}
    for place, members in sorted(places.items()):
        other = places.get(place._replace(entry=reference), [])
        shared = {cell.seed for cell in members} & {cell.seed for cell in other}
        if place.entry == reference or not shared:
            continue
        ours, theirs = ([cell for cell in side if cell.seed in shared] for side in (members, other))
        _require_same_images([*ours, *theirs])
        single[place] = _difference(ours, theirs)
    together: dict[Place, list[Difference]] = defaultdict(list)
    for place, (difference, _) in single.items():
        together[place._replace(task=ALL_TASKS)].append(difference)
    tasks = len({place.task for place in places})
    over_all = {place: _mean(found) for place, found in together.items() if len(found) == tasks > 1}
    return [
        Duel(place, reference, difference, adjusted, reason)
        for differences in (single, over_all)
        for (place, (difference, reason)), adjusted in zip(
            differences.items(), _adjusted([difference.p for difference, _ in differences.values()]), strict=True
        )
    ]


def _difference(ours: Sequence[Finished], theirs: Sequence[Finished]) -> tuple[Difference, str]:
    """On the same images, seeds and draws; and why it has no interval and no p, or nothing."""
    labels, groups = ours[0].labels, ours[0].groups
    one, other = scores_of(ours), scores_of(theirs)
    owners = groups or ours[0].images
    for name, label in (("normal", 0), ("anomalous", 1)):
        if len({owners[i] for i in np.flatnonzero(labels == label)}) < 2:
            unit = "patients" if groups else "images"
            reason = f"a comparison needs 2 {unit} of a class, there is 1 {name} one"
            return Difference(auroc(one, labels) - auroc(other, labels), math.nan, math.nan, math.nan), reason
    return compare_auroc(one, other, labels, groups=groups), ""


def _adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm over those that are known, NaN for the others."""
    adjusted = np.full(len(p_values), math.nan)
    known = ~np.isnan(p_values)
    adjusted[known] = holm(np.asarray(p_values)[known])
    return adjusted.tolist()


def _mean(differences: Sequence[Difference]) -> tuple[Difference, str]:
    """The mean over tasks, whose test images have nothing to do with each other: the variances add."""
    from scipy.stats import norm

    value = float(np.mean([difference.difference for difference in differences]))
    if any(math.isnan(difference.p) for difference in differences):
        return Difference(value, math.nan, math.nan, math.nan), "a task has none"
    reach = float(np.linalg.norm([(each.high - each.low) / 2 for each in differences])) / len(differences)
    p = float(2 * norm.sf(norm.ppf(0.975) * abs(value) / reach)) if reach else float(value == 0)
    return Difference(value, value - reach, value + reach, p), ""
