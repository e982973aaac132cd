"""Lines of equal value on a map, as the path of an SVG: they stay visible where colours wash out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def contour_path(values: NDArray[Any], level: float, size: tuple[int, int]) -> str:
    """The lines between the values above a level and the others.

    Args:
        values: (H, W); what is not finite counts as lowest.
        level: In the unit of the values.
        size: (height, width) of the SVG's view box, which the H x W pixels fill.

    Returns:
        Path data in whole units of the view box, or empty where nothing or everything is above the level.
    """
    from contourpy import contour_generator

    known = np.isfinite(values)
    if not known.any() or min(values.shape) < 2:
        return ""
    grid = np.where(known, values, min(values[known].min(), level)).astype(np.float64)
    lines = contour_generator(z=grid).lines(level)  # each (n, 2), x and y of pixel centres
    scale = size[1] / grid.shape[1], size[0] / grid.shape[0]
    return "".join(_path(np.rint((np.asarray(line) + 0.5) * scale).astype(int)) for line in lines)


def _path(points: NDArray[Any]) -> str:
    moves = " ".join(f"{x} {y}" for x, y in np.diff(points, axis=0).tolist() if x or y)
    return f"M{points[0, 0]} {points[0, 1]}l{moves}" if moves else ""
