"""The picture of an audit: AUROC per evaluation with draws and interval, and per epoch where checkpoints were kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from anatomaly.audit.published import ACROSS, FIRST, SOUND
from anatomaly.results.pictures import encode_picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anatomaly.audit.measure import Audit, EpochChoice

_WIDTH = 1000  # in points; everything below is
_SHARP, _OUT = 4, 2  # drawn at 4 pixels a point, delivered at 2
_LEFT, _RIGHT, _ROW, _SUBROW = 300, 770, 62, 48  # a hollow row belongs to the one above it
_PAPER, _INK, _SOFT, _GRID = (255, 255, 255), (30, 34, 40), (105, 112, 122), (226, 229, 233)
#: Blue for what may be quoted, orange and plum for what may not; distinct also in grey and to colour-blind readers.
_COLOURS = {
    SOUND: (20, 96, 170),
    "as given": (70, 130, 120),
    ACROSS: (214, 96, 20),
    FIRST: (140, 50, 130),
}
_WORDS = {
    SOUND: "each image alone, all images",
    "as given": "the tool's own scores",
    ACROSS: "blurred across batches of 16",
    FIRST: "first image of every 10",
}


@dataclass(frozen=True)
class _Strip:
    """One row of the upper panel."""

    name: str
    words: str
    colour: tuple[int, int, int]
    values: Sequence[float]  # small dots
    mean: float
    low: float  # ends of the bar
    high: float
    right: str
    hollow: bool = False


def draw_audit(audit: Audit) -> bytes:
    """Draw an audit.

    Args:
        audit: The audit.

    Returns:
        A PNG file, 2000 pixels wide.
    """
    strips = _strips(audit)
    curves = [choice for choice in audit.epochs if np.isfinite(list(choice.aurocs.values())).all()]
    heights = [_SUBROW if strip.hollow else _ROW for strip in strips]
    top = 100
    below = top + sum(heights) + 4
    pen = _Pen(below + 84 + (330 if curves else 0))
    pen.text((24, 18), f"One set of anomaly maps, {len(strips)} ways to read it: {audit.runs.task}", size=21)
    pen.text((24, 49), _subtitle(audit), size=13, colour=_SOFT)
    pen.text((842, top - 22), "AUROC", size=12, colour=_SOFT, anchor="ra")
    pen.text((976, top - 22), "images scored", size=12, colour=_SOFT, anchor="ra")
    shown = [value for s in strips for value in (*s.values, s.low, s.high) if math.isfinite(value)]
    low = min([0.4, *(math.floor(10 * (value - 0.005)) / 10 for value in shown)])
    axis = _Axis(max(0.0, low), 1.0, _LEFT, _RIGHT)
    _grid(pen, axis, top, below)
    y: float = top
    for height, strip in zip(heights, strips, strict=True):
        _strip(pen, axis, y + height / 2, strip)
        y += height
    pen.text(((_LEFT + _RIGHT) / 2, below + 26), "image AUROC", size=13, colour=_SOFT, anchor="ma")
    legend = (
        "Large dot: mean. Bar: 95 % interval over test images; of hollow dots, lowest to highest order of the files. "
        "Small dots: support draws, or orders."
    )
    pen.text((24, below + 54), legend, size=12, colour=_SOFT)
    if curves:
        _epochs(pen, curves, below + 84 + 46)
    return pen.png()


def _subtitle(audit: Audit) -> str:
    runs = audit.runs
    shots = f"K = {runs.shots}, " if runs.shots else ""
    draws = f"{len(runs.draws)} support draws, " if len(runs.draws) > 1 else ""
    source = runs.source if len(runs.source) < 60 else "..." + runs.source[-57:]
    return f"{source}: {shots}{draws}{len(runs.labels)} test images. Blue can be quoted, the rest shows why not."


def _strips(audit: Audit) -> list[_Strip]:
    strips = []
    for result in audit.results:
        values = result.draws if len(result.draws) > 1 else ()
        colour, scored = _COLOURS[result.protocol], f"{result.scored} of {result.total}"
        low, high = result.interval[1:]
        words = _WORDS[result.protocol]
        strips.append(_Strip(result.protocol, words, colour, values, result.auroc, low, high, scored))
        if result.protocol == ACROSS and (shuffled := audit.runs.shuffled):
            ends = (float(np.mean(shuffled)), min(shuffled), max(shuffled))
            words = f"loader shuffled, {len(shuffled)} orders"
            strips.append(_Strip("", words, colour, shuffled, *ends, scored, hollow=True))
        mean, _, low, high = audit.file_name_range()
        if result.protocol == FIRST and math.isfinite(mean):
            names = [value for value in audit.file_names if math.isfinite(value)]
            words = f"first draw, {len(names)} other file names" if values else f"{len(names)} other file names"
            strips.append(_Strip("", words, colour, names, mean, low, high, scored, hollow=True))
    for habits in audit.as_released:
        told = habits.epoch is not None or len(audit.runs.draws) > 1  # else it is the release's protocol again
        if habits.protocol == audit.release and math.isfinite(habits.first) and told:
            many = len(audit.runs.draws) > 1
            words = ", ".join(["one draw"] * many + ["best epoch on test labels"] * (habits.epoch is not None))
            ends = (habits.first, habits.first, habits.luckiest)
            lucky = f"luckiest {habits.luckiest:.3f}" if many else ""
            strips.append(_Strip("all habits at once", words, _COLOURS[habits.protocol], (), *ends, lucky))
    return strips


def _strip(pen: _Pen, axis: _Axis, y: float, strip: _Strip) -> None:
    pen.text((24, y - 17), strip.name or " ", size=15, colour=strip.colour)
    pen.text((24 if strip.name else 40, y + 2 if strip.name else y - 8), strip.words, size=12, colour=_SOFT)
    if not math.isfinite(strip.mean):
        pen.text((axis.left + 8, y - 8), "not defined: one class only", size=12, colour=_SOFT)
        pen.text((976, y - 9), strip.right, size=13, anchor="ra")
        return
    pale = tuple(round(0.62 * 255 + 0.38 * part) for part in strip.colour)
    spread = np.random.default_rng(0).uniform(-1, 1, len(strip.values))  # sideways, so that equal dots do not hide
    for value, shift in zip(strip.values, spread, strict=True):
        if math.isfinite(value):
            pen.dot((axis.at(value), y + 13 + 4 * shift), 2.3, pale)
    if math.isfinite(strip.low):
        pen.line((axis.at(strip.low), y - 4), (axis.at(strip.high), y - 4), 3.0, strip.colour)
    pen.dot((axis.at(strip.mean), y - 4), 6.5, strip.colour)
    if strip.hollow:
        pen.dot((axis.at(strip.mean), y - 4), 4.2, _PAPER)
    pen.text((842, y - 13), f"{strip.mean:.3f}", size=15, colour=strip.colour, anchor="ra")
    pen.text((976, y - 12), strip.right, size=13, colour=_INK if strip.name else _SOFT, anchor="ra")


def _grid(pen: _Pen, axis: _Axis, top: float, below: float) -> None:
    for tenth in range(round(10 * axis.low), round(10 * axis.high) + 1):
        x = axis.at(tenth / 10)
        chance = tenth == 5
        pen.line((x, top), (x, below), 1.6 if chance else 0.8, (170, 175, 182) if chance else _GRID)
        pen.text((x, below + 6), f"{tenth / 10:.1f}", 12, _SOFT, anchor="ma")
        if chance:
            pen.text((x, top - 18), "chance", 12, _SOFT, anchor="ma")


def _epochs(pen: _Pen, curves: Sequence[EpochChoice], top: float) -> None:
    """The lower panel: AUROC on the test images after every kept epoch."""
    pen.text((24, top - 34), "The same test images after every kept epoch", size=15)
    epochs = list(curves[0].aurocs)
    values = [value for choice in curves for value in choice.aurocs.values()]
    lines = 20 if max(values) - min(values) < 0.3 else 10  # grid lines per unit
    first, last = math.floor(lines * (min(values) - 0.01)), min(lines, math.ceil(lines * (max(values) + 0.01)))
    bottom = top + 210
    across = _Axis(min(epochs), max(max(epochs), min(epochs) + 1), _LEFT, _RIGHT)
    up = _Axis(first / lines, last / lines, bottom, top)
    for value in (number / lines for number in range(first, last + 1)):
        pen.line((_LEFT - 10, up.at(value)), (_RIGHT + 10, up.at(value)), 0.8, _GRID)
        pen.text((_LEFT - 18, up.at(value) - 8), f"{value:.2f}", 12, _SOFT, anchor="ra")
    shown = epochs[:: max(1, math.ceil(len(epochs) / 12))]
    for epoch in shown:
        pen.text((across.at(epoch), bottom + 8), str(epoch), 12, _SOFT, anchor="ma")
    pen.text(((_LEFT + _RIGHT) / 2, bottom + 28), "epoch", size=13, colour=_SOFT, anchor="ma")
    names = {y: choice for choice, y in zip(curves, _apart(curves, up), strict=True)}
    for y, choice in names.items():
        colour = _COLOURS[choice.protocol]
        points = [(across.at(epoch), up.at(value)) for epoch, value in choice.aurocs.items()]
        for start, stop in pairwise(points):
            pen.line(start, stop, 2.0, colour)
        for point in points:
            pen.dot(point, 3.2, colour)
        best = (across.at(choice.best), up.at(choice.aurocs[choice.best]))
        pen.dot(best, 9, colour)
        pen.dot(best, 7, _PAPER)
        if choice.chosen is not None:
            pen.dot((across.at(choice.chosen), up.at(choice.aurocs[choice.chosen])), 5.2, colour)
        pen.text((_RIGHT + 22, y - 9), f"{choice.protocol} {choice.adds:+.3f}", size=13, colour=colour)
    pen.text((24, top + 6), "filled: chosen on pasted lesions", size=12, colour=_SOFT)
    pen.text((24, top + 24), "ring: best on the test labels", size=12, colour=_SOFT)
    pen.text((24, top + 42), "right: what the ring adds", size=12, colour=_SOFT)


def _apart(curves: Sequence[EpochChoice], up: _Axis) -> list[float]:
    """Heights of the curves' names: where they end, but no two on each other."""
    ends = [up.at(choice.aurocs[choice.last]) for choice in curves]
    placed: list[float] = [0.0] * len(ends)
    previous = -math.inf
    for index in sorted(range(len(ends)), key=lambda i: ends[i]):
        placed[index] = previous = max(ends[index], previous + 18)
    return placed


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    left: float
    right: float

    def at(self, value: float) -> float:
        return self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)


class _Pen:
    """Draws in points; the sheet is larger and shrunk at the end, which smooths every edge."""

    def __init__(self, height: float) -> None:
        from PIL import Image, ImageDraw

        self._sheet = Image.new("RGB", (_WIDTH * _SHARP, round(height) * _SHARP), _PAPER)
        self._draw = ImageDraw.Draw(self._sheet)

    def line(self, start: tuple[float, float], stop: tuple[float, float], width: float, colour: Any) -> None:
        self._draw.line([_scaled(start), _scaled(stop)], fill=colour, width=round(width * _SHARP), joint="curve")

    def dot(self, centre: tuple[float, float], radius: float, colour: Any) -> None:
        x, y = centre
        self._draw.ellipse([_scaled((x - radius, y - radius)), _scaled((x + radius, y + radius))], fill=colour)

    def text(
        self, place: tuple[float, float], words: str, size: float = 13, colour: Any = _INK, anchor: str = "la"
    ) -> None:
        from PIL import ImageFont

        plain = words.encode("ascii", errors="replace").decode()  # what the built-in font can write
        font = ImageFont.load_default(size=size * _SHARP)
        self._draw.text(_scaled(place), plain, fill=colour, font=font, anchor=anchor)

    def png(self) -> bytes:
        from PIL import Image

        size = (self._sheet.width * _OUT // _SHARP, self._sheet.height * _OUT // _SHARP)
        return encode_picture(np.asarray(self._sheet.resize(size, Image.Resampling.LANCZOS)), kind="PNG")


def _scaled(place: tuple[float, float]) -> tuple[float, float]:
    return place[0] * _SHARP, place[1] * _SHARP
