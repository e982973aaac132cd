"""What stands behind the cases of a report: how the scores are spread, what p-values rest on, how to read it all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from anatomaly.detector.conformal import Call, describe
from anatomaly.results.cases import GROUPS, KINDS, Reference, count, is_called, number, shares_of
from anatomaly.results.layers import LONGEST, TOP_SHARE
from anatomaly.tables import Table, escaped
from anatomaly.types import Calibration, Prediction

_WIDTH, _HEIGHT, _MARKS = 640, 130, 14


def scores_section(scored: Sequence[Prediction], references: Sequence[Reference], calls: Sequence[Call]) -> str:
    """The histogram, and the scores by known label."""
    if not scored:
        return ""
    labels = [label for label in GROUPS if any(p.sample.label == label for p in scored)]
    by_label = _scores_by_label(scored, labels).html() if labels != [None] else ""
    return f"<section><h2>Scores</h2>{_histogram(scored, labels, references, calls)}{by_label}</section>"


def _scores_by_label(scored: Sequence[Prediction], labels: Sequence[int | None]) -> Table:
    rows = []
    for label in labels:
        scores = [p.score for p in scored if p.sample.label == label]
        spread = (min(scores), float(np.median(scores)), max(scores))
        rows.append([GROUPS[label], str(len(scores)), *map(number, spread)])
    return Table("Scores by known label", ("label", "images", "lowest", "median", "highest"), rows)


def _histogram(
    scored: Sequence[Prediction],
    labels: Sequence[int | None],
    references: Sequence[Reference],
    calls: Sequence[Call],
) -> str:
    scores = np.array([p.score for p in scored], dtype=np.float64)
    ends = (float(scores.min()), float(scores.max()))
    bins = bins_for(len(scores))
    known = np.array([-1 if p.sample.label is None else p.sample.label for p in scored])
    counts = {k: in_bins(scores[known == (-1 if k is None else k)], ends, references, bins) for k in labels}
    return histogram(counts, ends, references, calls)


def bins_for(count: int) -> int:
    """Bars of a histogram of so many scores."""
    return min(30, max(5, round(2 * math.sqrt(count))))


def _span(ends: tuple[float, float], references: Sequence[Reference]) -> tuple[float, float]:
    """Half of the lowest score and of the spread, with those of the references: the largest spread is no number."""
    halves = [each / 2 for each in (*ends, *_known(references))]
    return min(halves), (max(halves) - min(halves)) or 1.0


def _known(references: Sequence[Reference]) -> list[float]:
    return [each.score for each in references if math.isfinite(each.score)]


def in_bins(
    scores: NDArray[np.float64], ends: tuple[float, float], references: Sequence[Reference], bins: int
) -> NDArray[np.intp]:
    """(bins,) how many scores each bar of `histogram` holds.

    Args:
        scores: Some of all.
        ends: The lowest and the highest of all.
        references: They may reach further.
        bins: From `bins_for`.
    """
    low, spread = _span(ends, references)
    index = np.minimum(((scores / 2 - low) / spread * bins).astype(np.intp), bins - 1)
    return np.bincount(index, minlength=bins)


def histogram(
    counts: Mapping[int | None, NDArray[np.intp]],
    ends: tuple[float, float],
    references: Sequence[Reference],
    calls: Sequence[Call],
) -> str:
    """How the scores are spread, as inline SVG; bars are stacked by known label, references are marks below.

    Args:
        counts: From `in_bins`, by label.
        ends: The lowest and the highest score.
        references: The support images.
        calls: What was called.
    """
    labels, normals = list(counts), _known(references)
    (low, spread), bins = _span(ends, references), len(next(iter(counts.values())))
    tallest, scores = int(np.max(sum(counts.values()))), int(np.sum(list(counts.values())))
    high = max(each / 2 for each in (*ends, *normals))
    step = _WIDTH / bins
    drawn = []
    below = np.zeros(bins)
    for label, heights in counts.items():
        drawn += [
            f'<rect class="{KINDS[label]}" x="{i * step + 1:.1f}" y="{_HEIGHT * (1 - (under + n) / tallest):.1f}" '
            f'width="{step - 2:.1f}" height="{_HEIGHT * n / tallest:.1f}"/>'
            for i, (under, n) in enumerate(zip(below, heights, strict=True))
            if n
        ]
        below += heights
    for call in calls:
        if low <= call.score / 2 <= high:
            x = f"{_WIDTH * ((call.score / 2 - low) / spread):.1f}"
            name = f"{escaped(call.name)}: above {number(call.score)}"
            drawn.append(f'<line class="cut" x1="{x}" x2="{x}" y1="0" y2="{_HEIGHT}"><title>{name}</title></line>')
    for reference in references:
        if math.isfinite(reference.score):
            place = _WIDTH * ((reference.score / 2 - low) / spread)
            name = f"{escaped(reference.name)}: {number(reference.score)}"
            top, foot = _HEIGHT + 3, _HEIGHT + _MARKS
            shape = f"M{place:.1f} {top}l-5 {foot - top}h10z"
            drawn.append(f'<path class="reference" d="{shape}"><title>{name}</title></path>')
    legend = "".join(f'<span class="{KINDS[k]}">{GROUPS[k]}</span>' for k in labels if labels != [None])
    legend += '<span class="reference">references, each judged by the others</span>' if normals else ""
    lowest, highest = number(2 * low), number(2 * high)
    fullest = count(tallest, "image")
    alt = f"Histogram of image scores from {number(ends[0])} to {number(ends[1])}; "
    alt += f"the fullest bar holds {fullest}."
    alt += f" References from {number(min(normals))} to {number(max(normals))}." if normals else ""
    return (
        f'<figure class="histogram"><figcaption>Distribution of the {count(scores, "score")}, fullest bar '
        f'{fullest}{"; dashed: called above" if calls else ""} <span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="-6 0 {_WIDTH + 12} {_HEIGHT + _MARKS + 1}" role="img" aria-label="{alt}">{"".join(drawn)}'
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/></svg>'
        f'<div class="ends"><span>{lowest}<br>lowest</span><span>{highest}<br>highest, least normal</span>'
        "</div></figure>"
    )


def p_values_section(scored: Sequence[Prediction], calibration: Calibration | None, calls: Sequence[Call]) -> str:
    """What the p-values are and rest on, and what was called."""
    if calibration is None:
        return ""
    known = [p for p in scored if p.p_value is not None]
    facts = {f"called at {call.name}": f"{sum(is_called(p, call) for p in known)} of {len(known)}" for call in calls}
    rules = {c.name: f"p up to {c.p:.3g}, score above {number(c.score)}" if c.p > 0 else "calls none" for c in calls}
    group = {"patient": "patient", "scan": "file"}.get(calibration.unit)
    pooled = f" For a {group} with several images, the smallest p-value of its images counts." if group else ""
    vague = " They are approximate: they rest on the reference images alone, each judged by the others."
    return (
        f"<section><h2>P-values</h2>{pairs(facts, 'facts-large')}<p>A p-value of 0.02 says: of 100 normal "
        f"{calibration.unit}s like those calibrated on, about 2 would score as high as this one or higher. It is not "
        f"the chance that the image is normal, and a high p-value does not rule out disease.{pooled}"
        f"{vague if calibration.guarantee == 'approximate' else ''}</p>"
        f"<p>Calibrated on {escaped(describe(calibration))} They hold for images from the same source: another "
        f"scanner, protocol or age group needs its own calibration.</p>{pairs(rules, 'about')}</section>"
    )


def pairs(facts: Mapping[str, str], kind: str) -> str:
    """Labels and texts as a definition list, or nothing."""
    items = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="{kind}">{items}</dl>' if items else ""


def reading_guide(
    references: Sequence[Reference], scale: tuple[float, float], scale_bar: str, predictions: Sequence[Prediction]
) -> str:
    """What score, map, lines and references mean, in plain words."""
    low, high = (number(value) for value in scale)
    compared = ""
    if references:
        compared = f" and compares every image with the {count(len(references), 'reference image')} below"
    weights = (
        "<p><b>References.</b> The bars beside a case say how much each reference image counted when the program "
        "worked out what the image should look like if it were normal. They add up to 100%.</p>"
    )
    yardstick = (
        "<p><b>Yardstick.</b> Each reference image was also judged by the others, as if it were new. Their scores are "
        "the marks in the histogram and stand below their pictures. They are a rough yardstick: they are few, and each "
        "of them had one reference less to be compared with. A score above all of them is no proof of disease, one "
        "among them no proof of health.</p>"
    )
    return (
        '<section id="guide"><h2>How to read this report</h2>'
        f"<p>The program has only been shown normal images{compared}. "
        "It does not know any disease: it reports what looks unlike normal.</p>"
        "<p><b>Score.</b> One number per image; the higher, the less the image resembles normal ones. It has no unit "
        "and no upper limit: compare it with the scores of images you know to be normal.</p>"
        f"{yardstick if any(math.isfinite(each.score) for each in references) else ''}"
        "<p><b>Map.</b> It shows where the image differs. A bright spot may be a lesion, but also an implant, writing "
        "on the image, an unusual position or noise; a faint map does not rule out disease.</p>"
        f"<p><b>Lines.</b> The solid white line holds the {100 * TOP_SHARE:g}% of the picture with the highest map "
        "values of this image. Every image has it, a normal one too: it says where to look first, not that there is "
        "something. The dashed blue line holds values above the upper end of the colour scale, where there are "
        "any.</p>"
        f"{weights if references and any(shares_of(p) is not None for p in predictions) else ''}"
        f'<figure class="scale"><img src="{scale_bar}" alt="Colour scale from black at {low} through purple and orange '
        f'to pale yellow at {high}"><div class="ends"><span>{low}<br>as in normal images</span>'
        f"<span>{high} and above<br>very unlike normal images</span></div><figcaption>The colours are fixed: the same "
        "colour means the same value in every map of this report. Over the image, low values are "
        f"transparent. Pictures have at most {LONGEST} pixels a side here.</figcaption></figure></section>"
    )


def reference_gallery(references: Sequence[Reference]) -> str:
    """Every reference with its picture and its score."""
    if not references:
        return ""
    items = "".join(
        f"<figure>{_picture(each)}<figcaption>{escaped(each.name)}{_own_score(each)}</figcaption></figure>"
        for each in references
    )
    heading = "Normal reference image" + "s" * (len(references) > 1)
    return f'<section><h2>{heading}</h2><div class="gallery">{items}</div></section>'


def _picture(reference: Reference) -> str:
    alt = f"Reference image {escaped(reference.name)}"
    return f'<img src="{reference.picture}" alt="{alt}" decoding="async">' if reference.picture else ""


def _own_score(reference: Reference) -> str:
    if not math.isfinite(reference.score):
        return ""
    return f"<br>score <b>{number(reference.score)}</b>, judged by the others"


def quality_section(tables: Sequence[Table]) -> str:
    """Measured quality."""
    shown = "".join(table.html() for table in tables)
    return f"<section><h2>Measured quality</h2>{shown}</section>" if shown else ""
