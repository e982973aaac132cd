"""Figures of rows of captioned pictures, drawn with NumPy and Pillow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from anatomaly.results.pictures import encode_picture, overlay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SIDE = 256  # longest side of a picture, in pixels
_GAP, _LINE = 8, 17
_PAPER, _INK = (255, 255, 255), (30, 34, 40)
_OUTLINE = (64, 255, 160)  # no colour of the maps comes near it


class Panel(NamedTuple):
    """One picture of a figure.

    Attributes:
        pixels: (h, w, 3) RGB, at most `SIDE` high and wide.
        caption: Lines of text below it; what is too wide is cut.
    """

    pixels: NDArray[np.uint8]
    caption: Sequence[str] = ()


def draw(
    image: NDArray[Any],
    *,
    spacing: tuple[float, float] | None,
    heat: NDArray[Any] | None = None,
    scale: tuple[float, float] = (0.0, 1.0),
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """One picture at figure size: the image, the heat map over it, the outline of the lesion over both.

    Args:
        image: (C, H, W) in [0, 1], C in {1, 3}.
        spacing: mm per pixel, (row, column): the picture gets square pixels; None takes them as square.
        heat: (H, W), coloured as in `results.overlay`.
        scale: (low, high) of the heat map.
        mask: (H, W), True = lesion.

    Returns:
        (h, w, 3) RGB, the longest side `SIDE`.
    """
    lengths = np.array(image.shape[1:]) * np.array(spacing or (1.0, 1.0))
    height, width = (max(1, round(float(side))) for side in lengths * SIDE / lengths.max())
    small = np.clip(np.nan_to_num(np.stack([_resize(channel, (height, width)) for channel in image])), 0.0, 1.0)
    if heat is None:
        pixels = np.rint(np.broadcast_to(small, (3, height, width)) * 255).astype(np.uint8).transpose(1, 2, 0).copy()
    else:
        pixels = overlay(small, _resize(heat, (height, width)), scale)
    if mask is not None:
        pixels[outline(_resize(mask, (height, width)) >= 0.5)] = _OUTLINE
    return pixels


def outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a mask that touch its outside or the edge of the picture: (H, W) -> (H, W)."""
    from scipy.ndimage import binary_erosion

    edge: NDArray[np.bool_] = mask & ~binary_erosion(mask)
    return edge


def _resize(plane: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float32]:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR), np.float32)


def compose(rows: Sequence[Sequence[Panel]]) -> bytes:
    """Put rows of panels on one sheet and return it as a PNG file."""
    from PIL import Image, ImageDraw

    tallest = [max(panel.pixels.shape[0] for panel in row) for row in rows]
    lines = [max(len(panel.caption) for panel in row) for row in rows]
    heights = [tall + number * _LINE + _GAP for tall, number in zip(tallest, lines, strict=True)]
    width = max(len(row) for row in rows) * (SIDE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = _GAP
    for row, tall, height in zip(rows, tallest, heights, strict=True):
        for column, (pixels, caption) in enumerate(row):
            left = _GAP + column * (SIDE + _GAP)
            sheet.paste(Image.fromarray(pixels), (left + (SIDE - pixels.shape[1]) // 2, top))
            for number, line in enumerate(caption):
                place = (left, top + tall + 2 + number * _LINE)
                pen.text(place, _fitting(pen, line), fill=_INK, font=_font())
        top += height
    return encode_picture(np.asarray(sheet), kind="PNG")


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=13)


def _fitting(pen: Any, line: str) -> str:
    """A line as the built-in font can write it, cut in the middle to the width of a panel."""
    plain = " ".join(line.encode("ascii", errors="replace").decode().split())
    kept, text = len(plain), plain
    while kept > 8 and pen.textlength(text, font=_font()) > SIDE:
        kept -= 1
        text = f"{plain[: kept // 2]}...{plain[-(kept - kept // 2) :]}"
    return text
