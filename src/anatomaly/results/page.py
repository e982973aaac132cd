"""One self-contained HTML page about a run that a doctor can read, print and pass on.

The page asks nothing of the network (its content security policy forbids it) and reads the same without JavaScript.
All maps are coloured on one fixed scale, printed on the page.
"""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anatomaly.detector.conformal import Call, describe
from anatomaly.files import write_whole
from anatomaly.results.frame import FILTER, framed
from anatomaly.results.pictures import encode_picture, overlay, render_map, thumbnail
from anatomaly.tables import Table, escaped
from anatomaly.types import Calibration, Prediction

_BARS_PER_CASE = 8
_GROUPS = {1: "anomalous", 0: "normal", None: "no label"}
_COLOURS = {1: "#b4531a", 0: "#4a7fa8", None: "#6b7885"}


class _Reference(NamedTuple):
    name: str
    picture: str  # data URI, or empty


class _Page(NamedTuple):
    """What all cases share."""

    references: Sequence[_Reference]
    scale: tuple[float, float]
    calls: Sequence[Call]


def write_report(
    out: Path,
    predictions: Sequence[Prediction],
    *,
    title: str,
    bank_names: Sequence[str],
    bank_images: Sequence[NDArray[Any]] = (),
    scale: tuple[float, float],
    about: Mapping[str, str] | None = None,
    tables: Sequence[Table] = (),
    calibration: Calibration | None = None,
    calls: Sequence[Call] = (),
    max_cases: int = 200,
) -> Path:
    """Write one .html file: how to read it, overview, measured quality, and the cases from the highest score down.

    Args:
        out: The file, or an existing folder that gets a `report.html`; replaced if it exists.
        predictions: The verdicts, in any order; those with an error are listed with their reason.
        title: Heading of the page.
        bank_names: K display names of the support images, in the order of `Prediction.support_weights`.
        bank_images: The support images, each (C, H, W) in [0, 1], as far as they are at hand.
        scale: (low, high) in map units, the one colour scale of the page.
        about: What the run was, such as model, data set and date, as label and text.
        tables: Measured quality.
        calibration: Where the p-values of the predictions come from.
        calls: The rules by which images were called anomalous.
        max_cases: The highest-scored cases to show; the page says how many are left out.

    Returns:
        The file written.

    Raises:
        OutputError: The file cannot be written.
        ValueError: Not low < high.
    """
    path = out / "report.html" if out.is_dir() else out
    scored = sorted((p for p in predictions if _is_scored(p)), key=lambda p: -p.score)
    references = [
        _Reference(name, _picture_uri(_grey_or_rgb(bank_images[k], None)) if k < len(bank_images) else "")
        for k, name in enumerate(bank_names)
    ]
    body = (
        f"<header><h1>{escaped(title)}</h1>{_pairs(about or {}, 'about')}</header><main>"
        f"{_overview(predictions, scored, calls)}{_calibrated(scored, calibration, calls)}"
        f"{_reading_guide(references, scale, predictions)}"
        f"{_reference_gallery(references)}{_quality(tables)}"
        f"{_cases(scored, _Page(references, scale, calls), max_cases)}</main>"
    )
    write_whole(path, framed(body, title=title))
    return path


def shrink(prediction: Prediction) -> Prediction:
    """The same prediction with picture and map at the page's size, for callers that collect many."""
    if prediction.image is None or prediction.anomaly_map is None:
        return prediction
    image, anomaly_map = _small(prediction)
    return replace(prediction, image=image, anomaly_map=anomaly_map, spacing=None)


def _small(prediction: Prediction) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Image and map at the page's size; None for what is absent or cannot be shown, which must not cost the page."""
    image, anomaly_map, spacing = prediction.image, prediction.anomaly_map, prediction.spacing
    try:
        return (
            None if image is None else thumbnail(image, spacing),
            None if anomaly_map is None else thumbnail(anomaly_map[None], spacing)[0],
        )
    except Exception:  # numpy's and Pillow's many ways to refuse an odd array
        return None, None


def _is_scored(prediction: Prediction) -> bool:
    return prediction.error is None and math.isfinite(prediction.score)


def _number(value: float) -> str:
    return f"{value:#.4g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _pairs(pairs: Mapping[str, str], kind: str) -> str:
    """A mapping as a definition list, or nothing."""
    items = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in pairs.items())
    return f'<dl class="{kind}">{items}</dl>' if items else ""


def _overview(predictions: Sequence[Prediction], scored: Sequence[Prediction], calls: Sequence[Call]) -> str:
    failed = [p for p in predictions if not _is_scored(p)]
    facts = {"images": str(len(predictions)), "scored": str(len(scored)), "could not be scored": str(len(failed))}
    labels = [label for label in _GROUPS if any(p.sample.label == label for p in scored)]
    labelled = any(label is not None for label in labels)
    if labelled:
        facts |= {f"known to be {_GROUPS[k]}": str(sum(p.sample.label == k for p in scored)) for k in (0, 1)}
    return (
        f"<section><h2>Overview</h2>{_pairs(facts, 'facts')}{_histogram(scored, labels, calls)}"
        f"{_scores_by_label(scored, labels).html() if labelled else ''}{_failures(failed)}</section>"
    )


def _scores_by_label(scored: Sequence[Prediction], labels: Sequence[int | None]) -> Table:
    rows = []
    for label in labels:
        scores = [p.score for p in scored if p.sample.label == label]
        spread = (min(scores), float(np.median(scores)), max(scores))
        rows.append([_GROUPS[label], str(len(scores)), *map(_number, spread)])
    return Table("Scores by known label", ("label", "images", "lowest", "median", "highest"), rows)


def _failures(failed: Sequence[Prediction]) -> str:
    if not failed:
        return ""
    reasons = [p.error or f"{p.sample.name}: the score is not a finite number." for p in failed]
    items = "".join(
        f"<li>{'' if p.sample.path.name in reason else f'<b>{escaped(p.sample.name)}</b> '}{escaped(reason)}</li>"
        for p, reason in zip(failed, reasons, strict=True)
    )
    heading = f"{_count(len(failed), 'image')} could not be scored"
    return (
        f'<div class="failures"><h3>{heading}</h3><p>They are missing from everything below.</p><ul>{items}</ul></div>'
    )


def _histogram(scored: Sequence[Prediction], labels: Sequence[int | None], calls: Sequence[Call]) -> str:
    """How the scores are spread, as inline SVG; bars are stacked by known label."""
    if not scored:
        return "<p>No image was scored.</p>"
    width, height = 640, 130
    scores = np.array([p.score for p in scored], dtype=np.float64)
    bins = min(30, max(5, round(2 * math.sqrt(len(scores)))))
    halves = scores / 2  # for the spread of the largest numbers is no number
    position = (halves - halves.min()) / (np.ptp(halves) or 1.0)  # (N,) in [0, 1]
    index = np.minimum((position * bins).astype(np.intp), bins - 1)
    counts = {k: np.bincount(index[[p.sample.label == k for p in scored]], minlength=bins) for k in labels}
    tallest = int(np.bincount(index).max())
    step = width / bins
    bars = []
    below = np.zeros(bins)
    for label, heights in counts.items():
        bars += [
            f'<rect x="{i * step + 1:.1f}" y="{height * (1 - (low + n) / tallest):.1f}" width="{step - 2:.1f}" '
            f'height="{height * n / tallest:.1f}" fill="{_COLOURS[label]}"/>'
            for i, (low, n) in enumerate(zip(below, heights, strict=True))
            if n
        ]
        below += heights
    for call in calls:
        if scores.min() <= call.score <= scores.max():
            x = width * (call.score / 2 - halves.min()) / (np.ptp(halves) or 1.0)
            bars.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#a8201a" stroke-dasharray="5 4">'
                f"<title>{escaped(call.name)}: above {_number(call.score)}</title></line>"
            )
    legend = "".join(f'<span style="--c:{_COLOURS[k]}">{_GROUPS[k]}</span>' for k in labels if labels != [None])
    lowest, highest, fullest = _number(scores.min()), _number(scores.max()), _count(tallest, "image")
    alt = f"Histogram of image scores from {lowest} to {highest}; the fullest bar holds {fullest}."
    return (
        f'<figure class="histogram"><figcaption>Distribution of the {_count(len(scored), "score")}, fullest bar '
        f'{fullest}{"; dashed: called above" if calls else ""} <span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height + 1}" role="img" aria-label="{alt}">{"".join(bars)}'
        f'<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="#51606f"/></svg>'
        f'<div class="ends"><span>{lowest}<br>lowest score</span><span>{highest}<br>highest score, least normal</span>'
        "</div></figure>"
    )


def _calibrated(scored: Sequence[Prediction], calibration: Calibration | None, calls: Sequence[Call]) -> str:
    """What the p-values are and rest on, and what was called."""
    if calibration is None:
        return ""
    known = [p for p in scored if p.p_value is not None]
    facts = {f"called at {call.name}": f"{sum(_is_called(p, call) for p in known)} of {len(known)}" for call in calls}
    rules = {c.name: f"p up to {c.p:.3g}, score above {_number(c.score)}" if c.p > 0 else "calls none" for c in calls}
    group = {"patient": "patient", "scan": "file"}.get(calibration.unit)
    pooled = f" For a {group} with several images, the smallest p-value of its images counts." if group else ""
    vague = " They are approximate: they rest on the reference images alone, each judged by the others."
    return (
        f"<section><h2>P-values</h2>{_pairs(facts, 'facts')}<p>A p-value of 0.02 says: of 100 normal "
        f"{calibration.unit}s like those calibrated on, about 2 would score as high as this one or higher. It is not "
        f"the chance that the image is normal, and a high p-value does not rule out disease.{pooled}"
        f"{vague if calibration.guarantee == 'approximate' else ''}</p>"
        f"<p>Calibrated on {escaped(describe(calibration))} They hold for images from the same source: another "
        f"scanner, protocol or age group needs its own calibration.</p>{_pairs(rules, 'about')}</section>"
    )


def _is_called(prediction: Prediction, call: Call) -> bool:
    return prediction.p_value is not None and prediction.p_value <= call.p


def _reading_guide(
    references: Sequence[_Reference], scale: tuple[float, float], predictions: Sequence[Prediction]
) -> str:
    low, high = (_number(value) for value in scale)
    bar = _picture_uri(render_map(np.linspace(*scale, 256)[None].repeat(14, axis=0), scale), kind="PNG")
    compared = ""
    if references:
        compared = f" and compares every image with the {_count(len(references), 'reference image')} below"
    weights = (
        "<p><b>References.</b> The bars beside a case say how much each reference image counted when the program "
        "worked out what the image should look like if it were normal. They add up to 100%.</p>"
    )
    return (
        f"<section><h2>How to read this report</h2><p>The program has only been shown normal images{compared}. "
        "It does not know any disease: it reports what looks unlike normal.</p>"
        "<p><b>Score.</b> One number per image; the higher, the less the image resembles normal ones. It has no unit "
        "and no upper limit: compare it with the scores of images you know to be normal.</p>"
        "<p><b>Map.</b> It shows where the image differs. A bright spot may be a lesion, but also an implant, writing "
        "on the image, an unusual position or noise; a dark map does not rule out disease.</p>"
        f"{weights if references and any(_shares(p) is not None for p in predictions) else ''}"
        f'<figure class="scale"><img src="{bar}" alt="Colour scale from black at {low} through purple and orange '
        f'to pale yellow at {high}"><div class="ends"><span>{low}<br>as in normal images</span>'
        f"<span>{high} and above<br>very unlike normal images</span></div><figcaption>The colours are fixed: the same "
        "colour means the same value in every map of this report.</figcaption></figure></section>"
    )


def _reference_gallery(references: Sequence[_Reference]) -> str:
    if not references:
        return ""
    pictures = [_image(r.picture, f"Reference image {r.name}") if r.picture else "" for r in references]
    items = "".join(
        f"<figure>{picture}<figcaption>{escaped(r.name)}</figcaption></figure>"
        for picture, r in zip(pictures, references, strict=True)
    )
    heading = "Normal reference image" + "s" * (len(references) > 1)
    return f'<section><h2>{heading}</h2><div class="gallery">{items}</div></section>'


def _quality(tables: Sequence[Table]) -> str:
    shown = "".join(table.html() for table in tables)
    return f"<section><h2>Measured quality</h2>{shown}</section>" if shown else ""


def _cases(scored: Sequence[Prediction], page: _Page, max_cases: int) -> str:
    shown = scored[: max(0, max_cases)]
    left_out = len(scored) - len(shown)
    note = f"{_count(len(shown), 'image')}, highest score first."
    if left_out:
        note += f" {_count(left_out, 'image')} with lower scores are left out here; all of them are in scores.csv."
    articles = "".join(_case(p, rank, len(scored), page) for rank, p in enumerate(shown, 1))
    return f'<section id="cases"><h2>Cases</h2><p>{note}</p>{FILTER}{articles}</section>'


def _case(prediction: Prediction, rank: int, total: int, page: _Page) -> str:
    sample = prediction.sample
    label = _GROUPS[sample.label]
    badge = f'<span class="badge" style="--c:{_COLOURS[sample.label]}">known to be {label}</span>'
    badge = badge if sample.label is not None else ""
    called = [call.name for call in page.calls if _is_called(prediction, call)]
    badge += "".join(f' <span class="call">called at {escaped(name)}</span>' for name in called)
    badge += f' <span class="remark">{escaped(prediction.note)}</span>' if prediction.note is not None else ""
    p_value = "" if prediction.p_value is None else f" p <b>{prediction.p_value:.3g}</b>"
    place = sample.task if sample.frame is None else f"{sample.task}, frame {sample.frame}"
    return (
        f'<article data-name="{escaped(sample.path)}" data-label="{label}"><header>'
        f'<span class="rank" title="rank {rank} of {total}">{rank}</span>'
        f'<div class="name"><h3>{escaped(sample.name)}</h3><p>{escaped(place)} {badge}</p></div>'
        f'<p class="score">score <b>{_number(prediction.score)}</b>{p_value}</p></header>'
        f'<div class="views">{_views(prediction, page.scale)}{_weights(prediction, page.references)}</div></article>'
    )


def _views(prediction: Prediction, scale: tuple[float, float]) -> str:
    name = prediction.sample.name
    image, anomaly_map = _small(prediction)
    pictures = {"Image": "", "Overlay": "", "Map": ""}
    with contextlib.suppress(Exception):  # an odd array costs its picture, not the page
        if anomaly_map is not None:
            pictures["Map"] = _picture_uri(render_map(anomaly_map, scale))
        if image is not None:
            pictures["Image"] = _picture_uri(_grey_or_rgb(image, None))
        if image is not None and anomaly_map is not None:
            pictures["Overlay"] = _picture_uri(overlay(image, anomaly_map, scale))
    return "".join(
        f"<figure>{_image(uri, f'{kind} of {name}')}<figcaption>{kind}</figcaption></figure>"
        for kind, uri in pictures.items()
    )


def _shares(prediction: Prediction) -> NDArray[np.float64] | None:
    """(K,) share of every support image, mean over the levels, or None where unknown."""
    weights = prediction.support_weights
    if weights is None or weights.size == 0 or not np.isfinite(weights).all():
        return None
    shares: NDArray[np.float64] = weights.mean(axis=0, dtype=np.float64)
    return shares


def _weights(prediction: Prediction, references: Sequence[_Reference]) -> str:
    """Which reference mattered: the top one with its picture, and a bar for each."""
    shares = _shares(prediction)
    if shares is None or not references:
        return ""
    padded = [*references, *(_Reference(f"reference {k + 1}", "") for k in range(len(references), len(shares)))]
    order = np.argsort(-shares, kind="stable")
    top = padded[int(order[0])]
    verdict = f"Counted most: <b>{escaped(top.name)}</b>"
    if len(shares) > 1 and shares.max() < 1.1 * shares.mean():
        verdict = "All references counted about equally."
    rows = "".join(
        f'<li><span class="who">{escaped(padded[k].name)}</span>'
        f'<span class="bar"><i style="width:{shares[k]:.0%}"></i></span>'
        f'<span class="share">{shares[k]:.0%}</span></li>'
        for k in order[:_BARS_PER_CASE]
    )
    more = f"<p>and {len(shares) - _BARS_PER_CASE} more</p>" if len(shares) > _BARS_PER_CASE else ""
    picture = _image(top.picture, f"Reference image {top.name}") if top.picture else ""
    return f'<div class="weights"><div class="top">{picture}<p>{verdict}</p></div><ol>{rows}</ol>{more}</div>'


def _image(uri: str, alt: str) -> str:
    return f'<img src="{uri}" alt="{escaped(alt)}">' if uri else '<span class="absent">not kept</span>'


def _picture_uri(pixels: NDArray[np.uint8], *, kind: str = "JPEG") -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encode_picture(pixels, kind=kind)).decode()}"


def _grey_or_rgb(image: NDArray[Any], spacing: tuple[float, float] | None) -> NDArray[np.uint8]:
    """(C, H, W) in [0, 1] as (h, w, 3) thumbnail."""
    small = np.clip(np.nan_to_num(thumbnail(image, spacing)), 0.0, 1.0)
    pixels: NDArray[np.uint8] = np.rint(np.broadcast_to(small, (3, *small.shape[1:])) * 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))
