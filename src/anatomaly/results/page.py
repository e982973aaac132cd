"""One self-contained HTML page about a run that a doctor can read, print and pass on.

The page asks nothing of the network (its content security policy forbids it) and shows the same without JavaScript.
All maps are coloured on one fixed scale, printed on the page.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.contrast import NOTE
from anatomaly.data.origin import MISLEAD
from anatomaly.detector.conformal import Call
from anatomaly.files import write_whole
from anatomaly.results.cases import GROUPS, Reference, Shared, cases_section, count, is_called
from anatomaly.results.figures import (
    p_values_section,
    pairs,
    quality_section,
    reading_guide,
    reference_gallery,
    scores_section,
)
from anatomaly.results.frame import framed
from anatomaly.results.layers import THUMBNAIL, jpeg_uri, png_uri
from anatomaly.results.pictures import render_map
from anatomaly.tables import Table, escaped
from anatomaly.types import Calibration, Prediction


def write_report(
    out: Path,
    predictions: Sequence[Prediction],
    *,
    title: str,
    bank_names: Sequence[str],
    bank_images: Sequence[NDArray[Any]] = (),
    scale: tuple[float, float],
    normal_scores: Sequence[float] | None = None,
    about: Mapping[str, str] | None = None,
    tables: Sequence[Table] = (),
    calibration: Calibration | None = None,
    calls: Sequence[Call] = (),
    max_cases: int = 200,
) -> Path:
    """Write one .html file: the cases from the highest score down, then the figures and how to read them.

    Args:
        out: The file, or an existing folder that gets a `report.html`; replaced if it exists.
        predictions: The verdicts, in any order; those with an error are listed with their reason.
        title: Heading of the page.
        bank_names: K display names of the support images, in the order of `Prediction.support_weights`.
        bank_images: The support images, each (C, H, W) in [0, 1], as far as they are at hand.
        scale: (low, high) in map units, the one colour scale of the page.
        normal_scores: What each support image scores when the others judge it, in the order of `bank_names`; NaN, None
            or a shorter sequence where unknown.
        about: What the run was, such as model, data set and date, as label and text.
        tables: Measured quality.
        calibration: Where the p-values of the predictions come from.
        calls: The rules by which images were called anomalous.
        max_cases: The highest-scored cases to show with pictures; the others are lines of the list.

    Returns:
        The file written.

    Raises:
        OutputError: The file cannot be written.
        ValueError: Not low < high.
    """
    path = out / "report.html" if out.is_dir() else out
    scored = sorted((p for p in predictions if _is_scored(p)), key=lambda p: -p.score)
    references = references_of(bank_names, bank_images, normal_scores or ())
    scale_bar = png_uri(render_map(np.linspace(*scale, 256)[None].repeat(14, axis=0), scale))
    run = pairs(about or {}, "about")
    figures = (
        f"{reading_guide(references, scale, scale_bar, predictions)}{scores_section(scored, references, calls)}"
        f"{p_values_section(scored, calibration, calls)}"
    )
    body = (
        f"<header><h1>{escaped(title)}</h1>{_summary(predictions, scored, calls)}</header><main>"
        f"{cases_section(scored, Shared(references, scale, calls, scale_bar), max_cases)}"
        f'<div class="figures">{figures}</div>{quality_section(tables)}{reference_gallery(references)}'
        f"{f'<section><h2>About this run</h2>{run}</section>' if run else ''}</main>"
    )
    write_whole(path, framed(body, title=title))
    return path


def references_of(
    names: Sequence[str], images: Sequence[NDArray[Any]], scores: Sequence[float]
) -> tuple[Reference, ...]:
    """The support images as a page shows them; arguments as in `write_report`."""
    references = []
    for k, name in enumerate(names):
        picture = small = ""
        with contextlib.suppress(Exception):  # an odd array costs its picture, not the page
            if k < len(images):
                picture, small = jpeg_uri(images[k], 256), jpeg_uri(images[k], THUMBNAIL)
        references.append(Reference(name, picture, small, float(scores[k]) if k < len(scores) else math.nan))
    return tuple(references)


def _is_scored(prediction: Prediction) -> bool:
    return prediction.error is None and math.isfinite(prediction.score)


def _summary(predictions: Sequence[Prediction], scored: Sequence[Prediction], calls: Sequence[Call]) -> str:
    """The run in a line, and what could not be scored."""
    failed = [p for p in predictions if not _is_scored(p)]
    said = [count(len(predictions), "image"), f"{len(scored)} scored"]
    known = [p for p in scored if p.p_value is not None]
    said += [f"{sum(is_called(p, call) for p in known)} called at {call.name}" for call in calls]
    if any(p.sample.label is not None for p in scored):
        said += [f"{sum(p.sample.label == k for p in scored)} known to be {GROUPS[k]}" for k in (1, 0)]
    line = "".join(f"<span>{escaped(each)}</span>" for each in said)
    lost = f'<span class="lost">{len(failed)} not scored</span>' if failed else ""
    return f'<p class="summary">{line}{lost}</p>{_failures(failed)}{_poor(scored)}{_elsewhere(scored)}'


def _poor(scored: Sequence[Prediction]) -> str:
    """A warning where most images show next to nothing: then no score means anything."""
    poor = sum(NOTE in (p.note or "") for p in scored)
    if 2 * poor <= len(scored):
        return ""
    return (
        f'<div class="failures"><p><b>{poor} of {len(scored)} images show hardly any contrast</b> after the intensity '
        "rule. Their scores say nothing. Judge them again with a rule that fits their values (--intensity).</p></div>"
    )


def _elsewhere(scored: Sequence[Prediction]) -> str:
    """In what images differ from the support images: their scores may say that, and nothing else."""
    notes = Counter(note for p in scored for note in (p.note or "").split("; ") if note.endswith(MISLEAD))
    lines = "".join(
        f"<p><b>{number} of {len(scored)} images:</b> {escaped(note)}.</p>" for note, number in sorted(notes.items())
    )
    return f'<div class="failures">{lines}</div>' if lines else ""


def _failures(failed: Sequence[Prediction]) -> str:
    if not failed:
        return ""
    reasons = [p.error or f"{p.sample.name}: the score is not a finite number." for p in failed]
    items = "".join(
        f"<li>{'' if p.sample.path.name in reason else f'<b>{escaped(p.sample.name)}</b> '}{escaped(reason)}</li>"
        for p, reason in zip(failed, reasons, strict=True)
    )
    heading = f"{count(len(failed), 'image')} could not be scored"
    return (
        f'<div class="failures"><p><b>{heading}</b> and {"is" if len(failed) == 1 else "are"} missing from all that '
        f'follows.</p><ul tabindex="0" aria-label="{heading}">{items}</ul></div>'
    )
