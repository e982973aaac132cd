"""An overlay as it goes into an archive: with its colour scale, what it must not be used for, and its score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anatomaly.results.pictures import render_map

_SMALLEST = 384  # a side of the shown image, in pixels: text must be readable beside it
_WARNING = "RESEARCH ONLY"
_BAR = 18  # width of the colour bar in pixels of text size 16


def framed_picture(file: Path, *, scale: tuple[float, float], caption: str) -> tuple[NDArray[np.uint8], int]:
    """Put an overlay into a black frame that bears text; no pixel of the overlay is covered.

    Args:
        file: The overlay, a PNG.
        scale: (low, high) in map units, of its colours.
        caption: A line below it.

    Returns:
        (H, W, 3) RGB, and how many of its pixels a side of one pixel of the overlay takes; the overlay begins at the
        left edge, below the line of the warning.
    """
    from PIL import Image, ImageDraw, ImageFont

    with Image.open(file) as opened:
        shown = opened.convert("RGB")
    zoom = max(1, -(-_SMALLEST // min(shown.size)))
    shown = shown.resize((shown.width * zoom, shown.height * zoom), Image.Resampling.NEAREST)
    size = max(16, min(shown.size) // 28)
    font = ImageFont.load_default(size)
    line, bar, gap = 2 * size, _BAR * size // 16, size // 2
    low, high = (f"{value:.3g}" for value in scale)
    margin = bar + 3 * gap + max(int(font.getlength(text)) for text in (low, high))
    whole = Image.new("RGB", (shown.width + margin, shown.height + 2 * line))
    whole.paste(shown, (0, line))
    draw = ImageDraw.Draw(whole)
    draw.text((gap, line // 2), f"{_WARNING} - not for diagnosis", "white", font, anchor="lm")
    draw.text((gap, whole.height - line // 2), caption, "white", font, anchor="lm")
    ramp = np.repeat(np.linspace(scale[1], scale[0], shown.height)[:, None], bar, axis=1)
    left = shown.width + gap
    whole.paste(Image.fromarray(render_map(ramp, scale)), (left, line))
    draw.text((left + bar + gap, line), high, "white", font, anchor="lt")
    draw.text((left + bar + gap, line + shown.height), low, "white", font, anchor="lb")
    return np.asarray(whole), zoom
