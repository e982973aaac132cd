"""How much of the network's input range an image uses, and which intensity rule its stored values ask for.

The limits rest on measurements on real images, see docs/studies/intensity.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.windows import spell_intensity
from anatomaly.types import Image, Intensity

#: An image that uses less of [0, 1], or shows fewer of 256 grey levels, has hardly any contrast left.
LEAST_USED, LEAST_LEVELS = 0.1, 10.0
#: Share of the pixels that has to be something else than the commonest level.
LEAST_SHOWN = 0.05
#: What is said of such an image.
NOTE = "hardly any contrast after the intensity rule: blank, saturated, or of another value range"

_PIXELS = 10_000  # of an image that are looked at
_OUTER = 0.5, 99.5  # percentiles between which values count
_AIR = -900.0  # Hounsfield units and less: only CT has such values in plenty
_LOWEST_CT = -4096.0


class Contrast(NamedTuple):
    """What an image after the intensity rule makes of [0, 1].

    Attributes:
        used: Share of [0, 1] between the 0.5th and 99.5th percentile of the pixels.
        levels: Grey levels of 256 that tell the pixels apart: the exponential of the entropy, without the commonest
            level, which in most scans is the background (unless next to nothing but background is there).
        blank: Whether all pixels are equal.
    """

    used: float
    levels: float
    blank: bool

    @property
    def poor(self) -> bool:
        """True where next to nothing can be seen."""
        return self.used < LEAST_USED or self.levels < LEAST_LEVELS


def measure(display: NDArray[np.float32]) -> Contrast:
    """Measure an image after the intensity rule.

    Args:
        display: (C, H, W) in [0, 1]; colours are averaged.

    Example:
        >>> measure(np.full((1, 9, 9), 0.5, np.float32))
        Contrast(used=0.0, levels=1.0, blank=True)
    """
    grey = _thinned(display).mean(axis=0)
    counts = np.bincount((grey * 255 + 0.5).astype(np.intp).ravel(), minlength=256)
    low, high = (int(np.searchsorted(np.cumsum(counts), share / 100 * grey.size)) for share in _OUTER)
    others = np.delete(counts, counts.argmax())
    counted = others if others.sum() >= LEAST_SHOWN * grey.size else counts
    shares = counted[counted > 0] / counted.sum()
    levels = float(np.exp(-(shares * np.log(shares)).sum()))
    return Contrast((high - low) / 255, levels, bool(display.min() == display.max()))


def suggest(images: Sequence[Image]) -> Intensity | None:
    """The rule that the images' own values ask for.

    Args:
        images: Read with `apply_voi=False`.

    Returns:
        The brain window for CT in Hounsfield units; the smallest bit depth that holds whole numbers from 0 and is used;
        else the range between the outer percentiles.  None where all values are equal.
    """
    values = np.concatenate([_thinned(image.pixels).ravel() for image in images])
    low, high = (float(value) for value in np.percentile(values, _OUTER))
    if not low < high:
        return None
    if _hounsfield(images, low):
        return Intensity("window", 40.0, 80.0)
    most = float(values.max())
    top = float(2 ** max(1, int(min(most, 2.0**31))).bit_length() - 1)
    whole = bool((values == np.rint(values)).all())
    if whole and values.min() >= 0 and high >= top / 2:
        return Intensity("range", 0.0, top)
    low, high = (float(f"{value:.2g}") for value in (low, high))
    return Intensity("range", low, high) if low < high else None


def spell_suggestion(image: Image) -> str:
    """The rule that one image asks for, as it is typed; one resolved on the supports where it says nothing."""
    return spell_intensity(suggest([image]) or Intensity("percentile", *_OUTER))


def _hounsfield(images: Sequence[Image], low: float) -> bool:
    """Whether the values are CT numbers: the files say so, or they reach down to air and no further."""
    if any(image.modality == "CT" for image in images):
        return low < 0
    other = any(image.modality not in (None, "OT", "SC") for image in images)
    return not other and _LOWEST_CT <= low <= _AIR


def _thinned(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """A fixed grid of at most `_PIXELS` pixels."""
    step = max(1, ceil(sqrt(pixels.shape[1] * pixels.shape[2] / _PIXELS)))
    return pixels[:, ::step, ::step]
