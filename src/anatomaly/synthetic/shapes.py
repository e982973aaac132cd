"""Drawing primitives shared by the phantom's anatomies and pathologies and by the pasted lesions.

Coordinates run from -1 to 1 along both axes, y down and x right, whatever the size in pixels: the same generator draws
the same picture at 64 and at 256 pixels.  Every function returns new arrays.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.floating]  # float32 where speed matters; `phantom.draw` promises float32 to its callers


@lru_cache(maxsize=16)
def grid(size: int) -> tuple[Float, Float]:
    """Coordinates of the pixel centres.

    Args:
        size: Side of the image in pixels.

    Returns:
        y as (size, 1) and x as (1, size), read-only; they broadcast to (size, size).
    """
    line = ((np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    line.flags.writeable = False
    return line[:, None], line[None, :]


@lru_cache(maxsize=128)
def _noise_basis(size: int, cells: int) -> Float:
    """Gaussian bumps, one per noise cell, (size, cells + 4); rows have unit length, so noise has unit variance."""
    centres = (np.arange(cells + 4) - 1.5) * (2.0 / cells) - 1.0
    distance = (grid(size)[0].astype(np.float64) - centres) * (cells / 2.0)
    bumps = np.exp(-0.5 * (distance / 0.7) ** 2)
    return np.asarray(bumps / np.linalg.norm(bumps, axis=1, keepdims=True), dtype=np.float32)


def smooth_noise(rng: np.random.Generator, size: int, cells: int | tuple[int, int]) -> Float:
    """Gaussian random field with zero mean and unit variance.

    Args:
        rng: Source of randomness.
        size: Side of the image in pixels.
        cells: Bumps that fit along each side, (rows, columns) or one number for both: few = slow, many = fine texture.

    Returns:
        (size, size) float32.
    """
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    weights = rng.standard_normal((rows + 4, columns + 4), dtype=np.float32)
    field: Float = _noise_basis(size, rows) @ weights @ _noise_basis(size, columns).T
    return field


def ramp(distance: Float, width: float) -> Float:
    """Soft step: 0 below -width / 2, 1 above width / 2, a straight line between.

    Args:
        distance: Signed distance to the edge, positive inside, any shape.
        width: Width of the edge, > 0, in the unit of `distance`.

    Returns:
        Same shape, in [0, 1].
    """
    step: Float = distance / width + 0.5
    return np.clip(step, 0.0, 1.0)


def over(canvas: Float, value: ArrayLike, alpha: Float) -> Float:
    """Paint a value over a canvas.

    Args:
        canvas: (H, W) or (C, H, W).
        value: Broadcasts to `canvas`.
        alpha: Opacity in [0, 1], (H, W).

    Returns:
        Shape of `canvas`.
    """
    return canvas + alpha * (np.asarray(value, dtype=np.float32) - canvas)


def radius_from(
    y: Float, x: Float, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0
) -> Float:
    """Elliptic radius: 0 at the centre, 1 on the ellipse.

    Args:
        y: Vertical coordinate, broadcasts with `x`.
        x: Horizontal coordinate.
        centre: (y, x) of the ellipse.
        radii: Half axes (along y, along x) before the rotation, > 0.
        angle: Rotation in radians.

    Returns:
        Broadcast shape of y and x.
    """
    dy, dx = y - np.float32(centre[0]), x - np.float32(centre[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return np.hypot((cos * dy - sin * dx) / np.float32(radii[0]), (sin * dy + cos * dx) / np.float32(radii[1]))


def blob(
    rng: np.random.Generator,
    size: int,
    centre: tuple[float, float],
    radius: float,
    *,
    ragged: float = 0.25,
    soft: float = 0.25,
) -> Float:
    """Irregular round patch with a soft edge: an ellipse whose outline is pushed in and out by noise.

    Args:
        rng: Source of randomness.
        size: Side of the image in pixels.
        centre: (y, x) of the patch.
        radius: Mean radius.
        ragged: Standard deviation of the outline relative to the radius.
        soft: Width of the edge relative to the radius, > 0.

    Returns:
        Opacity, (size, size), in [0, 1].
    """
    y, x = grid(size)
    stretch = float(rng.uniform(0.75, 1.33))
    distance = radius_from(y, x, centre, (radius * stretch, radius / stretch), float(rng.uniform(0, np.pi)))
    outline = smooth_noise(rng, size, max(2, round(2.0 / radius)))
    return ramp(1.0 + np.float32(ragged) * outline - distance, soft)


def stamp(
    size: int, centres: NDArray[np.floating], radii: NDArray[np.floating], angles: ArrayLike, strength: ArrayLike = 1.0
) -> Float:
    """Draw many small filled ellipses with antialiased edges; where two overlap the stronger one shows.

    Args:
        size: Side of the image in pixels.
        centres: (N, 2), (y, x); those outside the image are cut off.
        radii: (N, 2) half axes.
        angles: (N,) rotations in radians, or one for all.
        strength: (N,) opacity in [0, 1] of each ellipse, or one for all.

    Returns:
        (size, size), in [0, 1].
    """
    count = len(centres)
    if count == 0:
        return np.zeros((size, size), dtype=np.float32)
    pixel = np.clip((np.asarray(centres, dtype=np.float32) + 1.0) * (size / 2.0) - 0.5, -1.0, size)
    half_axes = np.maximum(np.asarray(radii, dtype=np.float32) * (size / 2.0), 0.5)  # (N, 2)
    reach = int(np.ceil(half_axes.max())) + 1
    corner = np.rint(pixel).astype(np.intp)
    steps = np.arange(-reach, reach + 1)
    rows, columns = corner[:, 0, None] + steps, corner[:, 1, None] + steps  # (N, S)
    dy = (rows - pixel[:, 0, None]).astype(np.float32)[:, :, None]
    dx = (columns - pixel[:, 1, None]).astype(np.float32)[:, None, :]
    turn = np.broadcast_to(np.asarray(angles, dtype=np.float32), (count,))[:, None, None]
    along, across = half_axes[:, 0, None, None], half_axes[:, 1, None, None]
    cos, sin = np.cos(turn), np.sin(turn)
    distance = np.hypot((cos * dy - sin * dx) / along, (sin * dy + cos * dx) / across)  # (N, S, S)
    alpha = np.clip((1.0 - distance) * np.minimum(along, across) + 0.5, 0.0, 1.0)
    alpha *= np.broadcast_to(np.asarray(strength, dtype=np.float32), (count,))[:, None, None]
    pad = reach + 2
    canvas = np.zeros((size + 2 * pad, size + 2 * pad), dtype=np.float32)
    np.maximum.at(canvas, (rows[:, :, None] + pad, columns[:, None, :] + pad), alpha)
    return canvas[pad : pad + size, pad : pad + size].copy()


def strokes(size: int, points: NDArray[np.floating], widths: NDArray[np.floating], step: float) -> Float:
    """Draw lines given as dense points, each with its own width.

    Args:
        size: Side of the image in pixels.
        points: (N, 2), (y, x); points outside the image are left out.
        widths: (N,) full width of the line at each point.
        step: Distance between neighbouring points of one line.

    Returns:
        Opacity, (size, size), in [0, 1].
    """
    from scipy import ndimage

    pixel = (points + 1.0) * (size / 2.0) - 0.5
    sigmas = np.maximum(widths * size / 8.0, 0.35)
    inside = ((pixel >= 0) & (pixel < size - 1)).all(axis=1)
    levels = np.rint(np.log2(sigmas) * 2.0)
    canvas = np.zeros((size, size), dtype=np.float32)
    for level in np.unique(levels[inside]):
        chosen = pixel[inside & (levels == level)]
        corner = np.floor(chosen).astype(np.intp)
        fy, fx = (chosen - corner).T
        index = corner[:, 0] * size + corner[:, 1]
        density = np.zeros(size * size)
        shares = {0: (1 - fy) * (1 - fx), 1: (1 - fy) * fx, size: fy * (1 - fx), size + 1: fy * fx}
        for offset, share in shares.items():
            density += np.bincount(index + offset, share, size * size)
        sigma = 2.0 ** (level / 2.0)
        lines = ndimage.gaussian_filter(density.reshape(size, size).astype(np.float32), sigma, truncate=3.0)
        # A straight line of unit density has peak 1 / (sqrt(2 pi) sigma) after the filter; scale that peak to 1.
        canvas = np.maximum(canvas, lines * np.float32(np.sqrt(2.0 * np.pi) * sigma * step * size / 2.0))
    return np.clip(canvas, 0.0, 1.0)


def warp(image: Float, dy: Float, dx: Float) -> Float:
    """Pull every pixel from a displaced place, bilinear; pixels with zero displacement stay as they are.

    Args:
        image: (C, H, W).
        dy: Vertical displacement of the place read from, (H, W), in coordinates (2 = the longer side).
        dx: Horizontal displacement, (H, W).

    Returns:
        (C, H, W).
    """
    from scipy import ndimage

    _, height, width = image.shape
    scale = np.float32(max(height, width) / 2.0)
    moving = (dy != 0) | (dx != 0)
    result = image.copy()
    if not moving.any():
        return result
    top, bottom = np.flatnonzero(moving.any(axis=1))[[0, -1]]
    left, right = np.flatnonzero(moving.any(axis=0))[[0, -1]]
    box = (slice(top, bottom + 1), slice(left, right + 1))  # only what moves is worth the time
    rows, columns = np.mgrid[box].astype(np.float32)
    rows = np.clip(rows + (dy * scale)[box], 0, height - 1)  # beyond the border its pixels go on
    columns = np.clip(columns + (dx * scale)[box], 0, width - 1)
    place = np.stack([rows, columns])
    for channel, moved in zip(image, result, strict=True):
        moved[box] = ndimage.map_coordinates(channel, place, order=1)
    return result


def pick(rng: np.random.Generator, region: Float) -> tuple[float, float]:
    """Choose a random place inside a region.

    Args:
        rng: Source of randomness.
        region: (size, size), inside where > 0.5; an empty region stands for the whole image.

    Returns:
        (y, x) of a pixel centre.
    """
    size = region.shape[-1]
    inside = np.flatnonzero(region > 0.5)
    index = int(inside[rng.integers(len(inside))]) if len(inside) else int(rng.integers(size * size))
    row, column = divmod(index, size)
    return (row + 0.5) * 2.0 / size - 1.0, (column + 0.5) * 2.0 / size - 1.0
