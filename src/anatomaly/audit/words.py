"""An audit in words, tables and files: what each figure means, for a reader who has never seen a release's code."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from anatomaly.audit.figure import draw_audit
from anatomaly.audit.published import ACROSS, ACROSS_BATCH, FIRST, FIRST_BATCH, SOUND
from anatomaly.evaluation.evaluation import count_unreadable, tell_undefined
from anatomaly.evaluation.metrics import summarise_draws
from anatomaly.files import write_whole
from anatomaly.tables import Table, interval_text

if TYPE_CHECKING:
    from pathlib import Path

    from anatomaly.audit.measure import Audit, ProtocolResult


def write_audit(audit: Audit, out: Path) -> None:
    """Write audit.json, audit.csv (a figure per line), audit.md (explanation) and audit.png.

    Raises:
        OutputError: `out` cannot be written.
    """
    write_whole(out / "audit.json", (json.dumps(_plain(_facts(audit)), indent=2) + "\n").encode())
    write_whole(out / "audit.csv", _figures(audit).csv())
    write_whole(out / "audit.png", draw_audit(audit))
    write_whole(out / "audit.md", explain(audit).encode(errors="backslashreplace"))


def table_of(audit: Audit) -> Table:
    """One row per evaluation."""
    draws, unreadable = len(audit.runs.draws), bool(audit.runs.unreadable)
    columns = ["evaluation", "image AUROC", "95 % interval", "AP", "F1max", "images scored"]
    columns += ["unreadable"] * unreadable + ["best draw"] * (draws > 1)
    rows = []
    for result in audit.results:
        shown = "–" if math.isnan(result.auroc) else mean_sd(result.draws)
        best = "–" if math.isnan(result.auroc) else f"{max(result.draws):.3f} ({_signed(result.luck)})"
        cells = [result.protocol, shown, interval_text(*result.interval[1:]), number(result.ap), number(result.f1max)]
        cells += [f"{result.scored} of {result.total}", *[str(result.unreadable)] * unreadable]
        rows.append(cells + [best] * (draws > 1))
    note = tell_undefined((result.protocol, result.undefined) for result in audit.results)
    return Table(f"{audit.runs.source} on {audit.runs.task}", columns, rows, note)


def tell_unreadable(audit: Audit) -> str:
    """How many test images have no score, in a line with the first reason; empty where all have one."""
    runs = audit.runs
    named = [why if sample.path.name in why else f"{sample.name}: {why}" for sample, why in runs.unreadable]
    told = count_unreadable(named, runs.total)
    return told if runs.method != "files" else told.replace("unreadable", "without a score", 1)


def mean_sd(values: tuple[float, ...]) -> str:
    """`0.750 ± 0.021` over draws, `0.750` of one, `not defined` where only one class was scored."""
    mean, sd = summarise_draws(values)
    if math.isnan(mean):
        return "not defined"
    return f"{mean:.3f}" if math.isnan(sd) else f"{mean:.3f} ± {sd:.3f}"


def number(value: float) -> str:
    """Three digits, or a dash where undefined."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return "not defined" if math.isnan(value) else f"{value + 0.0:+.3f}"


def _images(count: int, kind: str = "") -> str:
    return f"{count} {kind}image{'' if count == 1 else 's'}"


def explain(audit: Audit) -> str:
    """The audit as Markdown that a researcher can paste."""
    runs = audit.runs
    normal = int((runs.labels == 0).sum())
    shots = "" if not runs.shots else f" K = {runs.shots} support images,"
    table = table_of(audit)
    draws = f"{len(runs.draws)} support draws" if len(runs.draws) > 1 else "one run"
    lines = [
        f"# Audit of {runs.source} on {runs.task}",
        "",
        f"The same anomaly maps under every evaluation:{shots} {draws}, {normal} normal and "
        f"{len(runs.labels) - normal} anomalous test images. Image AUROC is the mean ± standard deviation over the "
        "draws; the interval is a bootstrap of that mean over test images (patients where known).",
        "",
        table.markdown(),
        "",
        *([table.note, ""] if table.note else []),
        "![Image AUROC under every evaluation](audit.png)",
        "",
        "## What the figures mean",
        "",
        *(f"- {paragraph}" for paragraph in paragraphs(audit)),
    ]
    if runs.unreadable:
        lines += ["", f"{len(runs.unreadable)} test images have no score: " + _examples(audit)]
    return "\n".join(lines) + "\n"


def _examples(audit: Audit) -> str:
    shown = [f"{sample.name} ({reason})" for sample, reason in audit.runs.unreadable[:3]]
    return "; ".join(shown) + ("; ..." if len(audit.runs.unreadable) > 3 else "") + "."


def paragraphs(audit: Audit) -> list[str]:
    """The explanation, one statement per figure."""
    sound = audit.result(SOUND)
    found = {result.protocol: result for result in audit.results}
    said = [
        f"**sound, {mean_sd(sound.draws)}**: every image is blurred alone and every image is scored. This is what the "
        "method does for a single new image, and the figure to quote."
    ]
    if audit.runs.draws[0].across is None:
        said = [
            f"**sound, {mean_sd(sound.draws)}**: the given scores of all images, as they are. Whether the tool lets "
            "images of a batch smooth each other can only be told from its maps."
        ]
    if given := found.get("as given"):
        said.append(
            f"**as given, {mean_sd(given.draws)}**: the tool's own scores of the same images. Where they differ from "
            "`sound`, the tool scores maps of another size (`predict` those of the network, before they are brought to "
            "the grid of the file), turns a map into a score in another way, or lets other images into it."
        )
    if across := found.get(ACROSS):
        said.append(_across(audit, across, sound))
    elif audit.runs.draws[0].across is not None:
        said.append(f"**{ACROSS}** scores no image: there are fewer than {ACROSS_BATCH}, and it drops the rest.")
    said.append(_first_of_ten(audit, found[FIRST]))
    if len(sound.draws) > 1:
        said.append(
            f"**A lucky support draw** adds {_signed(sound.luck)} under the sound evaluation (best of "
            f"{len(sound.draws)} draws {max(sound.draws):.3f}, mean {sound.auroc:.3f}, worst {min(sound.draws):.3f}). "
            "A figure of a single draw may lie anywhere in this range."
        )
    said += [_epoch(choice) for choice in audit.epochs if choice.protocol in (SOUND, audit.release)]
    said += [_together(audit)]
    return said + list(audit.runs.notes)


def _across(audit: Audit, result: ProtocolResult, sound: ProtocolResult) -> str:
    shuffled = audit.runs.shuffled
    text = (
        f"**{ACROSS}, {mean_sd(result.draws)}** ({_signed(result.auroc - sound.auroc)} on sound): D²4FAD's "
        f"release smooths the maps of a batch as one block of {ACROSS_BATCH} images, so that an image's own weight in "
        "its score is 0.10 to 0.20 and the rest comes from its neighbours in the file list. The list is sorted by "
        "class: the neighbours carry the label into the score. The last incomplete batch is dropped, "
        f"{_images(sound.scored - result.scored)}."
    )
    if not shuffled:
        return text
    mean, _ = summarise_draws(shuffled)
    return text + (
        f" With a shuffled loader the same maps give {mean_sd(shuffled)} ({len(shuffled)} orders): the order of the "
        f"files alone makes a difference of {_signed(result.auroc - mean)}, and it says nothing about an image."
    )


def _first_of_ten(audit: Audit, result: ProtocolResult) -> str:
    mean, sd, low, high = audit.file_name_range()
    undefined = sum(math.isnan(value) for value in audit.file_names)
    text = (
        f"**{FIRST}, {mean_sd(result.draws)}**: PDD's single-class release scores the first image of every batch "
        f"of {FIRST_BATCH}, {result.scored} of {result.total}, and calls it anomalous if any image of the batch is "
        f"(true here of {_images(result.relabelled, 'normal ')})."
    )
    if not math.isnan(mean):
        text += (
            f" Had the files other names within their class, the same scores would give {mean:.3f} ± {sd:.3f}, "
            f"{low:.3f} to {high:.3f} in {len(audit.file_names)} tries: not a gain, but luck of that size."
        )
    if undefined:
        text += f" In {undefined} of {len(audit.file_names)} orders only one class is scored and there is no AUROC."
    return text + " What that release prints as aupro is average precision (AP here), not the overlap with lesions."


def _epoch(choice: Any) -> str:
    chosen = choice.last if choice.chosen is None else choice.chosen
    rule = "the last epoch" if choice.chosen is None else "the epoch that pasted lesions chose"
    return (
        f"**Choosing the epoch by test AUROC** adds {_signed(choice.adds)} under `{choice.protocol}`: epoch "
        f"{choice.best} has {number(choice.aurocs[choice.best])} on the test labels, {rule} ({chosen}) "
        f"{number(choice.aurocs[chosen])}, the last one ({choice.last}) {number(choice.aurocs[choice.last])}; "
        f"{len(choice.aurocs)} epochs were kept."
    )


def _together(audit: Audit) -> str:
    sound = audit.result(SOUND)
    several = len(audit.runs.draws) > 1
    parts = []
    for habits in audit.as_released:
        epoch = "" if habits.epoch is None else f", epoch {habits.epoch} by test labels"
        if math.isnan(habits.first):
            parts.append(f"`{habits.protocol}`, not defined")
            continue
        draws = f" for the first draw, {number(habits.luckiest)} for the luckiest" if several else ""
        parts.append(f"`{habits.protocol}`{epoch}, {number(habits.first)}{draws}")
    over = ", over all draws" * several
    return f"**All habits of a release at once**: {'; '.join(parts)}. Sound{over}: {mean_sd(sound.draws)}."


def _facts(audit: Audit) -> dict[str, Any]:
    runs = audit.runs
    mean, sd, low, high = audit.file_name_range()
    return {
        "source": runs.source,
        "method": runs.method,
        "task": runs.task,
        "shots": runs.shots,
        "draws": len(runs.draws),
        "images": len(runs.labels),
        "anomalous": int(runs.labels.sum()),
        "unscored": [f"{sample.name}: {reason}" for sample, reason in runs.unreadable],
        "protocols": {
            result.protocol: {**asdict(result), "interval": list(result.interval[1:]), "auroc": result.auroc}
            | ({"lucky_draw_adds": result.luck} if len(result.draws) > 1 else {})
            for result in audit.results
        },
        "shuffled_loader": {"protocol": ACROSS, "auroc": list(runs.shuffled)},
        "other_file_names": {
            "protocol": FIRST,
            "mean": mean,
            "sd": sd,
            "low": low,
            "high": high,
            "orders": len(audit.file_names),
            "undefined": sum(math.isnan(value) for value in audit.file_names),
        },
        "epochs": {
            choice.protocol: {
                "auroc": {str(epoch): value for epoch, value in choice.aurocs.items()},
                "chosen": choice.chosen,
                "last": choice.last,
                "best_on_test": choice.best,
                "choosing_by_test_auroc_adds": choice.adds,
            }
            for choice in audit.epochs
        },
        "as_released": [asdict(habits) for habits in audit.as_released],
        "notes": list(runs.notes),
    }


def _plain(value: Any) -> Any:
    """The same facts without NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _figures(audit: Audit) -> Table:
    """A figure per line."""
    lines: list[list[object]] = []

    def add(result: ProtocolResult | None, evaluation: str, what: str, values: dict[int, float]) -> None:
        scored: list[object] = ["", ""] if result is None else [result.scored, result.total]
        counts = [*scored, len(audit.runs.unreadable)]
        for place, value in values.items():
            lines.append([audit.runs.task, evaluation, what, place, value, *counts])

    found = {result.protocol: result for result in audit.results}
    for result in audit.results:
        add(result, result.protocol, "draw", dict(enumerate(result.draws)))
    add(found.get(ACROSS), ACROSS, "shuffled loader", dict(enumerate(audit.runs.shuffled)))
    add(found.get(FIRST), FIRST, "other file names", dict(enumerate(audit.file_names)))
    for choice in audit.epochs:
        add(found.get(choice.protocol), choice.protocol, "epoch", dict(choice.aurocs))
    return Table("", ["task", "evaluation", "what", "number", "auroc", "scored", "total", "unreadable"], lines)
