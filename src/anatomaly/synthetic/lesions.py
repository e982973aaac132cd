"""Synthetic lesions pasted into any normal image.

Training selects its checkpoint with them: they need no labels and no test data.  They imitate what lesions have in
common (a patch that is brighter, darker, of another texture, displaced, or a group of spots), not any one disease.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from anatomaly.synthetic.shapes import Float, blob, grid, over, smooth_noise, stamp, warp

_MASK_OPACITY = 0.4
_AREA = (0.003, 0.15)  # accepted share of the image
_VISIBLE_CHANGE = 0.03  # change inside the mask below which another lesion is tried
_ATTEMPTS = 10


def paste_lesion(
    image: NDArray[np.float32], *, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Paste one random lesion into a normal image.

    The lesion is an irregular patch whose enclosing ellipse takes 2 to 12 % of the image, centred on the foreground
    (where there is light or texture; anywhere if there is none).

    Args:
        image: (3, H, W) in [0, 1]; not modified.
        rng: Source of randomness; the same state gives the same lesion.

    Returns:
        The image with the lesion, (3, H, W) in [0, 1], equal to `image` beyond a soft margin around the mask; and the
        lesion mask (H, W), never empty.

    Raises:
        ValueError: The image is not (3, H, W) with sides of at least 16 pixels.

    Example:
        >>> lesion, mask = paste_lesion(np.full((3, 64, 64), 0.5, np.float32), rng=np.random.default_rng(0))
        >>> lesion.shape, bool(mask.any())
        ((3, 64, 64), True)
    """
    if image.ndim != 3 or len(image) != 3 or min(image.shape[1:]) < 16:
        raise ValueError(f"paste_lesion: got an image of shape {image.shape}, expected (3, H, W) with H and W >= 16.")
    foreground = _foreground(image)
    for attempt in range(_ATTEMPTS):
        opacity = _patch(rng, foreground)
        # Texture and displacement cannot be seen on a flat image; a change of tone always can.
        kind = KINDS[int(rng.integers(len(KINDS)))] if attempt < _ATTEMPTS - 1 else change_tone
        changed, opacity = kind(image, opacity, rng)
        mask = opacity > _MASK_OPACITY
        pasted = np.where(opacity > 0, np.clip(changed, 0.0, 1.0), image).astype(np.float32)
        if _AREA[0] <= mask.mean() <= _AREA[1] and _visible_change(image, pasted, mask) > _VISIBLE_CHANGE:
            return pasted, mask
    return _fallback(image, rng)


def change_tone(image: Float, opacity: Float, rng: np.random.Generator) -> tuple[Float, Float]:
    """Brighten or darken the patch, unevenly; in a colour image also tint it.

    Args:
        image: (3, H, W) in [0, 1].
        opacity: (H, W), the patch.
        rng: Source of randomness.

    Returns:
        The changed image (3, H, W), maybe out of range, and the opacity of the lesion (H, W).
    """
    strength = rng.uniform(0.12, 0.40)
    local = float(np.average(image.mean(axis=0), weights=opacity)) if opacity.any() else 0.5
    bright = rng.random() < 0.5
    if not strength < local < 1.0 - strength:  # only one direction leaves room
        bright = local < 0.5
    is_gray = bool((image[0] == image[1]).all() and (image[1] == image[2]).all())
    tint = np.ones(3, np.float32) if is_gray else rng.uniform(0.4, 1.2, 3).astype(np.float32)
    height, width = opacity.shape
    uneven = np.clip(1.0 + 0.2 * smooth_noise(rng, max(height, width), 12)[:height, :width], 0.3, 1.7)
    change = (strength if bright else -strength) * tint[:, None, None] * uneven
    return over(image, image + change, opacity), opacity


def swap_texture(image: Float, opacity: Float, rng: np.random.Generator) -> tuple[Float, Float]:
    """Fill the patch with another place of the same image, with its contrast changed.

    Of four random places it takes the one most like the patch in tone, so that texture gives the lesion away.

    Args:
        image: (3, H, W) in [0, 1].
        opacity: (H, W), the patch.
        rng: Source of randomness.

    Returns:
        The changed image (3, H, W), maybe out of range, and the opacity of the lesion (H, W).
    """
    _, height, width = image.shape
    gray, total = image.mean(axis=0), float(opacity.sum()) or 1.0
    shifts = [
        (int(rng.integers(height // 5, height - height // 5)), int(rng.integers(width // 5, width - width // 5)))
        for _ in range(4)
    ]
    unlike = [abs(float(((np.roll(gray, shift, axis=(0, 1)) - gray) * opacity).sum())) / total for shift in shifts]
    other = np.roll(image, shifts[int(np.argmin(unlike))], axis=(1, 2))
    mean = other.mean(axis=(1, 2), keepdims=True)
    return over(image, mean + rng.uniform(0.7, 1.5) * (other - mean), opacity), opacity


def displace(image: Float, opacity: Float, rng: np.random.Generator) -> tuple[Float, Float]:
    """Swell or shrink the patch and twist it, without changing any tone.

    Args:
        image: (3, H, W) in [0, 1].
        opacity: (H, W), the patch.
        rng: Source of randomness.

    Returns:
        The changed image (3, H, W) and the opacity of the lesion (H, W).
    """
    _, height, width = image.shape
    lines = grid(max(height, width))
    y, x = lines[0][:height], lines[1][:, :width]
    total = float(opacity.sum()) or 1.0
    dy, dx = y - float((opacity * y).sum()) / total, x - float((opacity * x).sum()) / total
    swell, twist = rng.uniform(0.35, 0.6) * rng.choice([-1.0, 1.0]), rng.uniform(-0.6, 0.6)
    return warp(image, opacity * (swell * dy + twist * dx), opacity * (swell * dx - twist * dy)), opacity


def sow_spots(image: Float, opacity: Float, rng: np.random.Generator) -> tuple[Float, Float]:
    """Scatter 4 to 16 small spots of one tone over the patch.

    Args:
        image: (3, H, W) in [0, 1].
        opacity: (H, W), the patch.
        rng: Source of randomness.

    Returns:
        The changed image (3, H, W), maybe out of range, and the opacity of the spots (H, W).
    """
    _, height, width = image.shape
    side, count = max(height, width), int(rng.integers(4, 17))
    inside = np.argwhere(opacity > 0.5)
    if len(inside) == 0:
        return image, np.zeros_like(opacity)
    places = (inside[rng.integers(len(inside), size=count)] + 0.5) * (2.0 / side) - 1.0
    radii = rng.uniform(0.03, 0.07, (count, 1)) * rng.uniform(0.75, 1.33, (count, 2))
    spots = stamp(side, places, radii, rng.uniform(0, np.pi, count), rng.uniform(0.7, 1.0, count))
    return change_tone(image, spots[:height, :width] * (opacity > 0), rng)


#: The kinds of lesions, drawn with equal chance.
KINDS: tuple[Callable[[Float, Float, np.random.Generator], tuple[Float, Float]], ...] = (
    change_tone,
    swap_texture,
    displace,
    sow_spots,
)


def _visible_change(image: Float, pasted: Float, mask: NDArray[np.bool_]) -> float:
    """Mean change inside the mask after a slight blur: one patch of stroma in the place of another is no lesion."""
    from scipy import ndimage

    change = (pasted - image).mean(axis=0)
    return float(np.abs(ndimage.uniform_filter(change, max(3, max(mask.shape) // 24)))[mask].mean())


def _foreground(image: Float) -> Float:
    """Where there is light or texture, (H, W) with soft borders; everywhere if that is less than 5 % of the image."""
    from scipy import ndimage

    gray = image.mean(axis=0)
    mean = ndimage.uniform_filter(gray, 7)
    spread = np.sqrt(np.clip(ndimage.uniform_filter(gray**2, 7) - mean**2, 0.0, None))
    inside = (mean > 0.12) | (spread > 0.08)
    if inside.mean() < 0.05:
        inside[:] = True
    softened: Float = 2.0 * ndimage.uniform_filter(inside.astype(np.float32), 5) - 1.0
    return np.clip(softened, 0.0, 1.0)


def _patch(rng: np.random.Generator, foreground: Float) -> Float:
    """Opacity of an irregular patch centred on the foreground, (H, W)."""
    height, width = foreground.shape
    side = max(height, width)
    inside = np.flatnonzero(foreground > 0.5)
    index = int(inside[rng.integers(len(inside))]) if len(inside) else int(rng.integers(height * width))
    row, column = divmod(index, width)
    centre = ((row + 0.5) * 2.0 / side - 1.0, (column + 0.5) * 2.0 / side - 1.0)
    share = float(np.exp(rng.uniform(np.log(0.02), np.log(0.12))))
    radius = float(np.sqrt(share * 4.0 * height * width / side**2 / np.pi))
    patch = blob(rng, side, centre, radius, ragged=rng.uniform(0.1, 0.3), soft=rng.uniform(0.2, 0.6))
    within: Float = patch[:height, :width] * foreground
    return within


def _fallback(image: Float, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A plain round patch in the middle, for images on which no random lesion could be seen."""
    _, height, width = image.shape
    side = max(height, width)
    centre = (height / side - 1.0, width / side - 1.0)
    opacity = blob(rng, side, centre, 0.3 * min(height, width) / side, ragged=0.0)[:height, :width]
    local = float(np.average(image.mean(axis=0), weights=opacity))
    pasted = over(image, 0.0 if local > 0.5 else 1.0, 0.5 * opacity)
    return np.clip(pasted, 0.0, 1.0).astype(np.float32), opacity > _MASK_OPACITY
