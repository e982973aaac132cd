"""The report of a run from its table, whatever its size: counts, the spread of the scores, the most striking cases.

The table is read piece by piece, twice: rows never become objects, except for those that the page shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from anatomaly.archive.stages import Reader
from anatomaly.archive.table import TABLE
from anatomaly.files import write_whole
from anatomaly.results.cases import GROUPS, Shared, cases_section, count
from anatomaly.results.figures import (
    bins_for,
    histogram,
    in_bins,
    p_values_section,
    pairs,
    reading_guide,
    reference_gallery,
)
from anatomaly.results.folder import about_run
from anatomaly.results.frame import framed
from anatomaly.results.layers import png_uri, shrink
from anatomaly.results.page import references_of
from anatomaly.results.pictures import render_map
from anatomaly.results.rows import prediction_of
from anatomaly.tables import escaped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anatomaly.detector.detector import Detector
    from anatomaly.results.cases import Reference
    from anatomaly.types import Calibration, Prediction

_CASES = 100  # read and judged once more, for their pictures
_AT_ONCE = 16  # of those
_REASONS = 50  # of failures that are told
_LABELS = (1, 0, None)


@dataclass
class Totals:
    """What a table says in sum.

    Attributes:
        report: The page.
        images: Rows.
        scored: Those with a score.
        above: Those that score higher than every support image among the others; None where these have no scores.
        labels: How many of the scored ones have each label.
        ends: The lowest and the highest score.
        reasons: The first errors.
        notes: How many rows have each note.
        top: The rows with the highest scores, from the highest down.
    """

    report: Path
    images: int = 0
    scored: int = 0
    above: int | None = None
    labels: Counter[int | None] = field(default_factory=Counter)
    ends: tuple[float, float] = (float("inf"), float("-inf"))
    reasons: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    top: pa.Table | None = None

    @property
    def failed(self) -> int:
        """Rows without a score."""
        return self.images - self.scored


def write_table_report(
    detector: Detector,
    out: Path,
    *,
    source: str,
    bank_images: Sequence[NDArray[np.float32]] = (),
    calibration: Calibration | None = None,
) -> Totals:
    """Write OUT/report.html from OUT/table.

    Args:
        detector: With its support set; it sees the cases that are shown once more, for their pictures.
        out: Folder of the run.
        source: What was judged, in words.
        bank_images: The support images, each (C, H, W) in [0, 1], as far as they are at hand.
        calibration: Where the p-values come from.

    Raises:
        OutputError: The page cannot be written.
    """
    bank = detector.ready()
    table = ds.dataset(out / TABLE, format="parquet")
    totals = _totals(table, out / "report.html", bank.normal_scores)
    cases = list(_cases(detector, totals.top))
    references = references_of(bank.names, bank_images, bank.normal_scores)
    scale_bar = png_uri(render_map(np.linspace(*bank.map_range, 256)[None].repeat(14, axis=0), bank.map_range))
    figures = reading_guide(references, bank.map_range, scale_bar, cases)
    if totals.scored:
        drawn = histogram(_counts(table, totals, references), totals.ends, references, ())
        figures += f"<section><h2>Scores</h2>{drawn}</section>{p_values_section(cases, calibration, ())}"
    about = pairs({"Images": source, **about_run(detector, bank.task)}, "about")
    body = (
        f"<header><h1>Anomaly report</h1>{_summary(totals, len(cases))}</header><main>"
        f"{cases_section(cases, Shared(references, bank.map_range, (), scale_bar), len(cases))}"
        f'<div class="figures">{figures}</div>{reference_gallery(references)}'
        f"<section><h2>About this run</h2>{about}</section></main>"
    )
    write_whole(totals.report, framed(body, title="Anomaly report"))
    return totals


def _totals(table: ds.Dataset, report: Path, normal_scores: Sequence[float]) -> Totals:
    """Count everything and find the highest scores, in one pass."""
    totals = Totals(report, above=0 if normal_scores else None, top=table.schema.empty_table())
    for batch in table.to_batches():
        rows = pa.table(batch)
        totals.images += rows.num_rows
        failed = rows.filter(pc.equal(rows["status"], "error"))
        totals.reasons += failed["error"].slice(0, _REASONS - len(totals.reasons)).to_pylist()
        for told in pc.value_counts(rows["note"].drop_null()).to_pylist():
            totals.notes.update(dict.fromkeys(told["values"].split("; "), told["counts"]))
        scored = rows.filter(pc.equal(rows["status"], "ok"))
        if not scored.num_rows:
            continue
        totals.scored += scored.num_rows
        totals.labels.update({each["values"]: each["counts"] for each in pc.value_counts(scored["label"]).to_pylist()})
        ends = pc.min_max(scored["score"]).as_py()
        totals.ends = (min(totals.ends[0], ends["min"]), max(totals.ends[1], ends["max"]))
        if totals.above is not None:
            totals.above += pc.sum(pc.greater(scored["score"], max(normal_scores))).as_py()
        highest = pa.concat_tables([totals.top, scored])
        order = [("score", "descending"), ("item", "ascending")]
        totals.top = highest.take(pc.select_k_unstable(highest, min(_CASES, highest.num_rows), order))
    return totals


def _counts(
    table: ds.Dataset, totals: Totals, references: Sequence[Reference]
) -> Mapping[int | None, NDArray[np.intp]]:
    """Scores by bar of the histogram and label, in another pass."""
    bins = bins_for(totals.scored)
    counts = {label: np.zeros(bins, np.intp) for label in _LABELS if totals.labels[label]}
    for batch in table.to_batches(columns=["score", "label"], filter=ds.field("status") == "ok"):
        label = pc.fill_null(batch["label"], -1).to_numpy(zero_copy_only=False)
        for known, found in counts.items():
            some = batch["score"].to_numpy()[label == (-1 if known is None else known)]
            found += in_bins(some, totals.ends, references, bins)
    return counts


def _cases(detector: Detector, top: pa.Table | None) -> Iterator[Prediction]:
    """The rows of the highest scores with picture and map, as far as they can be had."""
    rows = [] if top is None else top.to_pylist()
    reader = Reader(detector.ready().preprocessing, _AT_ONCE, Path.cwd())
    left = iter(rows)
    for batch in reader.load([{**row, "patient_id": None, "whole": False} for row in rows]):
        for again in detector.judge([loaded for _, loaded in batch], since=0.0):
            row = next(left)
            weights = [row[name] for name in row if name.startswith("weight_")]
            known = {**row, "spacing": None, "support_weights": [weights] if weights and None not in weights else None}
            told = prediction_of(known, again.sample)
            yield shrink(replace(told, image=again.image, anomaly_map=again.anomaly_map, spacing=again.spacing))


def _summary(totals: Totals, cases: int) -> str:
    """The run in a line, what could not be scored, and what is to be known."""
    said = [count(totals.images, "image"), f"{totals.scored} scored"]
    said += [f"{totals.labels[k]} known to be {GROUPS[k]}" for k in (1, 0) if totals.labels[k]]
    line = "".join(f"<span>{escaped(each)}</span>" for each in said)
    lost = f'<span class="lost">{totals.failed} not scored</span>' if totals.failed else ""
    page = f'<p class="summary">{line}{lost}</p>'
    if totals.failed:
        heading = f"{count(totals.failed, 'image')} could not be scored"
        items = "".join(f"<li>{escaped(reason)}</li>" for reason in totals.reasons)
        page += (
            f'<div class="failures"><p><b>{heading}.</b></p><ul tabindex="0" aria-label="{heading}">{items}</ul></div>'
        )
    for note, number in totals.notes.most_common(_REASONS):
        page += f'<p class="note">{number} of {count(totals.images, "image")}: {escaped(note)}.</p>'
    if cases < totals.scored:
        page += f'<p class="note">The page shows the {cases} highest scores; the folder table holds all rows.</p>'
    return page
