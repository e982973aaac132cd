"""The cases of a report: a compact list of all images, and one large view for each of the highest scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anatomaly.detector.conformal import Call
from anatomaly.results.controls import FIND, KEYS, LOOK
from anatomaly.results.layers import layered, small_uri
from anatomaly.tables import escaped
from anatomaly.types import Prediction

GROUPS = {1: "anomalous", 0: "normal", None: "no label"}
KINDS = {1: "anomalous", 0: "normal", None: "unlabelled"}  # the style sheet's classes
_BARS_PER_CASE = 8
_LONGEST_LIST = 5000  # a browser stays quick


class Reference(NamedTuple):
    """A support image, as the page shows it.

    Attributes:
        name: To be read.
        picture: Address of its picture, or empty.
        thumbnail: Address of a small one, or empty.
        score: What the other references gave it, or NaN.
    """

    name: str
    picture: str
    thumbnail: str
    score: float


class Shared(NamedTuple):
    """What all cases share."""

    references: Sequence[Reference]
    scale: tuple[float, float]
    calls: Sequence[Call]
    scale_bar: str  # address of a picture


def number(value: float) -> str:
    """Four digits."""
    return f"{value:#.4g}"


def count(number: int, noun: str) -> str:
    """Such as "1 image" and "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def is_called(prediction: Prediction, call: Call) -> bool:
    """Whether the rule calls the image anomalous."""
    return prediction.p_value is not None and prediction.p_value <= call.p


def cases_section(scored: Sequence[Prediction], shared: Shared, max_cases: int) -> str:
    """All images, highest score first: each a line of the list, the first `max_cases` with a large view.

    Args:
        scored: Highest score first.
        shared: What they share.
        max_cases: Images with a view.
    """
    if not scored:
        return '<section id="cases"><h2>Cases</h2><p>No image was scored.</p></section>'
    shown, listed = scored[: max(0, max_cases)], scored[:_LONGEST_LIST]
    note = f"{count(len(listed), 'image')}, highest score first."
    if pictureless := len(scored) - len(shown):
        note += (
            f" The pictures of {count(pictureless, 'image')} with lower scores are left out here;"
            " all scores are in scores.csv."
        )
    if len(listed) < len(scored):
        note += f" The list ends after {len(listed)} of {len(scored)}."
    rows = "".join(_row(p, rank, len(shown), shared) for rank, p in enumerate(listed, 1))
    views = "".join(_case(p, rank, len(scored), shared) for rank, p in enumerate(shown, 1))
    low, high = (number(value) for value in shared.scale)
    bar = f'<span class="key"><span>{low}</span><img src="{shared.scale_bar}" alt="to"><span>{high}</span></span>'
    return (
        f'<section id="cases"><h2>Cases</h2><p class="note">{note} <a href="#guide">How to read this</a></p>'
        f'<div class="desk"><div class="list">{FIND}<ol id="rows">{rows}</ol></div>'
        f'<div class="stage" id="stage">{LOOK.format(bar=bar)}{views}{_PICTURELESS if pictureless else ""}</div>'
        f"</div>{KEYS}</section>"
    )


_PICTURELESS = (
    '<div class="case" id="listed"><header><div class="name"><h3>Images without a picture here</h3></div></header>'
    "<p>This report holds the pictures of the highest scores only. The map and the overlay of this image are in the "
    "folders maps and overlays beside scores.csv, if they were written.</p></div>"
)


def _row(prediction: Prediction, rank: int, views: int, shared: Shared) -> str:
    """A line of the list; all of it is one link."""
    sample = prediction.sample
    has_view = rank <= views
    uri = small_uri(prediction) if has_view else ""
    picture = f'<img src="{uri}" alt="" decoding="async">' if uri else '<span class="blank"></span>'
    marks = (
        f'<span class="badge {KINDS[sample.label]}">{GROUPS[sample.label]}</span>' if sample.label is not None else ""
    )
    marks += '<span class="call">called</span>' if any(is_called(prediction, call) for call in shared.calls) else ""
    p_value = "" if prediction.p_value is None else f"<span>p {prediction.p_value:.3g}</span>"
    p_data = "" if prediction.p_value is None else f"{prediction.p_value:.6g}"
    return (
        f'<li data-name="{escaped(sample.path)}" data-label="{GROUPS[sample.label]}" data-p="{p_data}"'
        f'{"" if has_view else " class=bare"}><a href="#{f"case-{rank}" if has_view else "listed"}">'
        f'<span class="rank">{rank}</span>{picture}<span class="who"><b>{escaped(sample.name)}</b>'
        f'<span class="marks">{marks}</span></span>'
        f'<span class="value"><b>{number(prediction.score)}</b>{p_value}</span></a></li>'
    )


def _badge(label: int, words: str) -> str:
    return f'<span class="badge {KINDS[label]}">{words}{GROUPS[label]}</span>'


def _case(prediction: Prediction, rank: int, total: int, shared: Shared) -> str:
    sample = prediction.sample
    badge = "" if sample.label is None else _badge(sample.label, "known to be ")
    called = [call.name for call in shared.calls if is_called(prediction, call)]
    badge += "".join(f' <span class="call">called at {escaped(name)}</span>' for name in called)
    badge += f' <span class="remark">{escaped(prediction.note)}</span>' if prediction.note is not None else ""
    p_value = "" if prediction.p_value is None else f" p <b>{prediction.p_value:.3g}</b>"
    kind = "frame" if sample.cut is None else f"{sample.cut.axis} slice"
    place = sample.task if sample.frame is None else f"{sample.task}, {kind} {sample.frame}"
    return (
        f'<article class="case{" on" if rank == 1 else ""}" id="case-{rank}"><header>'
        f'<span class="rank" title="rank {rank} of {total}">{rank}</span>'
        f'<div class="name"><h3>{escaped(sample.name)}</h3><p>{escaped(place)} {badge}</p></div>'
        f'<p class="score">score <b>{number(prediction.score)}</b>{p_value}</p></header>'
        f'<div class="parts"><div class="picture">{layered(prediction, shared.scale, str(rank))}</div>'
        f"{_facts(prediction, shared.references)}</div></article>"
    )


def _facts(prediction: Prediction, references: Sequence[Reference]) -> str:
    """What stands beside a picture, or nothing."""
    facts = _yardstick(prediction.score, references) + _weights(prediction, references)
    return f'<div class="facts">{facts}</div>' if facts else ""


def _yardstick(score: float, references: Sequence[Reference]) -> str:
    """Where the score stands among those of the references."""
    known = [reference.score for reference in references if math.isfinite(reference.score)]
    if not known:
        return ""
    higher = sum(each > score for each in known)
    of = f"of {count(len(known), 'reference image')}"
    said = f"{higher} {of} score{'s' if higher == 1 else ''} higher" if higher else f"None {of} scores higher"
    marks = _strip(score, known)
    return f'<div class="yardstick"><p><b>{said}</b> (a rough yardstick)</p>{marks}</div>'


def _strip(score: float, known: Sequence[float]) -> str:
    """The references' scores as ticks and this one's as a dot, on one line."""
    halves = [each / 2 for each in (*known, score)]  # for the spread of the largest numbers is no number
    low, spread = min(halves), (max(halves) - min(halves)) or 1.0
    places = [f"{4 + 192 * ((each - low) / spread):.1f}" for each in halves]
    ticks = "".join(f'<line x1="{x}" x2="{x}" y1="4" y2="16"/>' for x in places[:-1])
    alt = f"Scores of the references from {number(min(known))} to {number(max(known))}, this image at {number(score)}"
    return (
        f'<svg class="strip" viewBox="0 0 200 20" role="img" aria-label="{alt}"><line x1="0" x2="200" y1="10" y2="10"/>'
        f'{ticks}<circle cx="{places[-1]}" cy="10" r="4"/></svg><p class="note">ticks: references; dot: this image</p>'
    )


def shares_of(prediction: Prediction) -> NDArray[np.float64] | None:
    """(K,) share of every support image, mean over the levels, or None where unknown."""
    weights = prediction.support_weights
    if weights is None or weights.size == 0 or not np.isfinite(weights).all():
        return None
    shares: NDArray[np.float64] = weights.mean(axis=0, dtype=np.float64)
    return shares


def _weights(prediction: Prediction, references: Sequence[Reference]) -> str:
    """Which reference mattered: the top one with its picture, and a bar for each."""
    shares = shares_of(prediction)
    if shares is None or not references:
        return ""
    missing = range(len(references), len(shares))
    padded = [*references, *(Reference(f"reference {k + 1}", "", "", math.nan) for k in missing)]
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
    picture = f'<img src="{top.thumbnail}" alt="Reference image {escaped(top.name)}">' if top.thumbnail else ""
    return f'<div class="weights"><div class="top">{picture}<p>{verdict}</p></div><ol>{rows}</ol>{more}</div>'
