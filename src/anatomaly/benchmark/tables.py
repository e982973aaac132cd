"""The leaderboard for people and programs: Markdown, one HTML page, and CSV with every figure."""

from __future__ import annotations

from collections import defaultdict
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from anatomaly.benchmark.leaderboard import ALL_TASKS, Place, duels, rank
from anatomaly.evaluation.evaluation import count_unreadable, tell_undefined
from anatomaly.files import write_whole
from anatomaly.tables import Table, escaped, interval_text, mean_sd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anatomaly.benchmark.leaderboard import Duel, Finished, Row

#: Columns of the tables for people; all metrics are in the CSV.
_SHOWN = (
    ("AP", "ap"),
    ("F1max", "f1max"),
    ("floor", "f1max_floor"),
    ("patient AUROC", "patient_auroc"),
    ("pixel AUROC", "pixel_auroc"),
    ("AUPRO", "aupro"),
    ("Dice max", "dice_max"),
)


def write_leaderboard(
    cells: Sequence[Finished], out: Path, *, reference: str | None, note: str = ""
) -> tuple[list[Row], list[Duel]]:
    """Write leaderboard.csv, comparisons.csv, leaderboard.md and leaderboard.html.

    Args:
        cells: At least one.
        out: The folder.
        reference: Competitor that the others are compared with; None compares nobody.
        note: A sentence on what the run was, shown above the tables.

    Returns:
        The rows and the duels.

    Raises:
        ConfigError: See `duels`.
        OutputError: `out` cannot be written.
    """
    rows = rank(cells)
    fought = [] if reference is None else duels(cells, reference=reference)
    write_whole(out / "leaderboard.csv", _full(rows).csv())
    write_whole(out / "comparisons.csv", _full_duels(fought, rows).csv())
    sections = tables(rows, fought)
    write_whole(out / "leaderboard.md", _markdown(sections, note))
    write_whole(out / "leaderboard.html", _page(sections, note))
    return rows, fought


def _full(rows: Sequence[Row]) -> Table:
    known = [name for row in rows for name in (*row.metrics, *row.undefined) if name != "interval"]
    names = list(dict.fromkeys(known))
    columns = ["task", "shots", "method", "teacher", "seeds", "draws", "images", "unreadable"]
    columns += ["auroc_low", "auroc_high"]
    columns += [column for name in names for column in (name, f"{name}_sd")]
    columns += ["milliseconds_per_image", "peak_mib", "training_seconds"]
    cells = []
    for row in rows:
        place = row.place
        line: list[object] = [place.task, place.shots, place.entry, place.teacher, row.seeds, row.draws, row.images]
        line += [len(row.unreadable), row.low, row.high]
        line += [value for name in names for value in row.metrics.get(name, ("", ""))]
        cells.append([*line, row.milliseconds, row.peak_mib, row.training_seconds])
    return Table("", columns, cells)


def _full_duels(fought: Sequence[Duel], rows: Sequence[Row]) -> Table:
    unreadable: dict[Place, int] = defaultdict(int)
    for row in rows:
        unreadable[row.place] += len(row.unreadable)
        unreadable[row.place._replace(task=ALL_TASKS)] += len(row.unreadable)
    columns = ["task", "shots", "method", "teacher", "against", "difference", "low", "high", "p", "p_holm"]
    columns += ["unreadable"]
    lines = [[*d.place, d.against, *d.difference, d.adjusted, unreadable[d.place]] for d in fought]
    return Table("", columns, lines)


def tables(rows: Sequence[Row], fought: Sequence[Duel]) -> list[Table]:
    """The leaderboard as people read it: over all tasks, then task by task, then the duels.

    Args:
        rows: What `rank` returned.
        fought: What `duels` returned.
    """
    teachers = len({row.place.teacher for row in rows}) > 1
    several = len({row.place.task for row in rows}) > 1
    sections = [_overview(rows, teachers=teachers)] if several else []
    for task, shots in dict.fromkeys((row.place.task, row.place.shots) for row in rows):
        members = [row for row in rows if (row.place.task, row.place.shots) == (task, shots)]
        known = {name for row in members for name in (*row.metrics, *row.undefined)}
        shown = [(title, name) for title, name in _SHOWN if name in known]
        unequal = len({row.seeds for row in members}) > 1
        trained = any(row.training_seconds is not None for row in members)
        unlike = len({(row.images, len(row.unreadable)) for row in members}) > 1  # prepared otherwise, a file may do
        columns = ["method", *["teacher"] * teachers, *["seeds"] * unequal, "image AUROC", "95 % interval"]
        columns += [*(title for title, _ in shown), *["images", "unreadable"] * unlike]
        columns += ["ms/image", "MiB", *["training"] * trained]
        lines = []
        for row in members:
            cells = [row.place.entry, *[row.place.teacher] * teachers, *[str(row.seeds)] * unequal]
            cells += [mean_sd(*row.metrics["auroc"]), interval_text(row.low, row.high)]
            cells += [
                mean_sd(*row.metrics[name]) if name in row.metrics else "–" * (name in row.undefined)
                for _, name in shown
            ]
            cells += [str(row.images), str(len(row.unreadable))] if unlike else []
            cells += [f"{row.milliseconds:.0f}", "" if row.peak_mib is None else f"{row.peak_mib:.0f}"]
            if trained:
                cells.append("" if row.training_seconds is None else f"{row.training_seconds:.0f} s")
            lines.append(cells)
        most = max(row.metrics["auroc"][0] for row in members)
        best = {(i, 0) for i, row in enumerate(members) if row.metrics["auroc"][0] == most}
        most_seeds = max(row.seeds for row in members)
        unreadable = len(members[0].unreadable)
        about = f"{members[0].images} test images, " + f"{unreadable} unreadable, " * bool(unreadable)
        about = f"{'' if unlike else about}{most_seeds} seed{'s' * (most_seeds > 1)}"
        about += f" × {members[0].draws} draw{'s' * (members[0].draws > 1)}" if shots else ""
        title = f"{task}{f', K = {shots}' if shots else ''} ({about})"
        sections.append(Table(title, columns, lines, _notes(members), bold=best))
    if fought:
        sections += _duel_sections(fought, teachers=teachers)
    return sections


def _notes(members: Sequence[Row]) -> str:
    """What is unreadable and what cannot be had, of the rows of a task at some K."""
    most = max(members, key=lambda row: len(row.unreadable))
    left_out = count_unreadable(most.unreadable, most.images + len(most.unreadable))
    undefined = tell_undefined(("", row.undefined) for row in members)
    return " ".join(told for told in (left_out, undefined) if told)


def _overview(rows: Sequence[Row], *, teachers: bool) -> Table:
    """Mean image AUROC by task, and over all of them, at every K."""
    tasks = list(dict.fromkeys(row.place.task for row in rows))
    ks = sorted({row.place.shots for row in rows})
    shots = ks != [0]
    found = {row.place: row.metrics["auroc"] for row in rows}
    lines, means = [], []
    for entry, teacher in dict.fromkeys((row.place.entry, row.place.teacher) for row in rows):
        for k in ks:
            values = [found.get(Place(task, k, entry, teacher)) for task in tasks]
            if not any(values):
                continue
            mean = float(np.mean([value[0] for value in values if value])) if all(values) else float("nan")
            cells = [entry, *[teacher] * teachers, *[str(k)] * shots]
            cells += [mean_sd(*value) if value else "" for value in values]
            lines.append([*cells, "" if np.isnan(mean) else f"{mean:.3f}"])
            means.append((k, mean))
    order = sorted(range(len(lines)), key=lambda i: (means[i][0], -np.nan_to_num(means[i][1])))
    tops = {k: max((mean for other, mean in means if other == k and not np.isnan(mean)), default=None) for k in ks}
    best = {(place, 0) for place, i in enumerate(order) if means[i][1] == tops[means[i][0]]}
    columns = ["method", *["teacher"] * teachers, *["K"] * shots, *tasks, "mean"]
    most = {task: max(len(row.unreadable) for row in rows if row.place.task == task) for task in tasks}
    note = ", ".join(f"{task} {count}" for task, count in most.items() if count)
    note = f"Unreadable test images, left out: {note}." if note else ""
    return Table("Image AUROC by task", columns, [lines[i] for i in order], note, bold=best)


def _duel_sections(fought: Sequence[Duel], *, teachers: bool) -> list[Table]:
    shots = any(duel.place.shots for duel in fought)
    sections = []
    for over_all in (True, False):
        chosen = [duel for duel in fought if (duel.place.task == ALL_TASKS) == over_all]
        lines = [
            [
                *[duel.place.task] * (not over_all),
                *[str(duel.place.shots)] * shots,
                duel.place.entry,
                *[duel.place.teacher] * teachers,
                f"{duel.difference.difference:+.3f}",
                interval_text(duel.difference.low, duel.difference.high, sign="+"),
                _p(duel.difference.p),
                _p(duel.adjusted),
            ]
            for duel in chosen
        ]
        columns = [*["task"] * (not over_all), *["K"] * shots, "method", *["teacher"] * teachers]
        columns += ["difference", "95 % interval", "p", "p (Holm)"]
        where = "mean over the tasks" if over_all else "task by task"
        title = f"Against {chosen[0].against} on the same images: image AUROC, {where}" if chosen else ""
        significant = {(i, len(columns) - 1) for i, duel in enumerate(chosen) if duel.adjusted < 0.05}
        reasons = ((duel.place.task * (not over_all), {"interval": duel.reason}) for duel in chosen if duel.reason)
        sections += [Table(title, columns, lines, tell_undefined(reasons), bold=significant)] if chosen else []
    return sections


def _p(value: float) -> str:
    if np.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


_READING = (
    "Mean ± standard deviation over training seeds and support draws. The interval is a bootstrap of the mean AUROC "
    "over test images (patients where every image names one). F1max and Dice take the best threshold on the test "
    "labels; the floor is the F1 of calling everything anomalous. Costs are those of this machine while other cells "
    "ran. Comparisons are paired (DeLong, averaged over seeds and draws, clustered by patient where known) and say "
    "what other test images would have changed, not other seeds or draws; bold there means p < 0.05 after Holm."
)


def _markdown(sections: Sequence[Table], note: str) -> str:
    parts = ["# Leaderboard", *[note] * bool(note), _READING]
    for section in sections:
        parts += [f"## {section.title}", section.markdown(), *[section.note] * bool(section.note)]
    return "\n\n".join(parts) + "\n"


def _page(sections: Sequence[Table], note: str) -> str:
    style = files("anatomaly.results").joinpath("page.css").read_text(encoding="utf-8")
    style += "td, th { white-space: nowrap; }"
    body = [f"<header><h1>Leaderboard</h1><p>{escaped(note)}</p></header><main><p>{_READING}</p>"]
    body += [f"<section>{section.html()}</section>" for section in sections]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Leaderboard</title><style>{style}</style></head><body>{''.join(body)}</main></body></html>\n"
    )
