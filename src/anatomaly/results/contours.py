"""Lines of equal value on a map, as the path of an SVG: they stay visible where colours wash out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Crossing = tuple[int, int, int]  # row, column and direction (0 right, 1 down) of a grid line the contour crosses

# The corners of a cell above the level, as bits (top left 1, top right 2, bottom right 4, bottom left 8), and the sides
# that the contour leads from and to, the higher side always on the same hand, so that every line can be followed.
_TOP, _RIGHT, _BOTTOM, _LEFT = (0, 0, 0), (0, 1, 1), (1, 0, 0), (0, 0, 1)
_STEPS = {
    1: [(_LEFT, _TOP)], 2: [(_TOP, _RIGHT)], 4: [(_RIGHT, _BOTTOM)], 8: [(_BOTTOM, _LEFT)],
    3: [(_LEFT, _RIGHT)], 6: [(_TOP, _BOTTOM)], 12: [(_RIGHT, _LEFT)], 9: [(_BOTTOM, _TOP)],
    14: [(_TOP, _LEFT)], 13: [(_RIGHT, _TOP)], 11: [(_BOTTOM, _RIGHT)], 7: [(_LEFT, _BOTTOM)],
    5: [(_LEFT, _TOP), (_RIGHT, _BOTTOM)], 10: [(_TOP, _RIGHT), (_BOTTOM, _LEFT)],
}  # fmt: skip


def contour_path(values: NDArray[Any], level: float, size: tuple[int, int]) -> str:
    """The lines between the values above a level and the others ("marching squares").

    Args:
        values: (H, W); what is not finite counts as lowest.
        level: In the unit of the values.
        size: (height, width) of the SVG's view box, which the H x W pixels fill.

    Returns:
        Path data in whole units of the view box, or empty where nothing or everything is above the level.
    """
    known = np.isfinite(values)
    if not known.any():
        return ""
    grid = np.where(known, values, min(values[known].min(), level)).astype(np.float64)
    lines = (np.rint(_points(line, grid, level, size)).astype(int) for line in _lines(grid > level))
    return "".join(_path(points) for points in lines)


def _lines(above: NDArray[np.bool_]) -> Iterator[list[_Crossing]]:
    """Crossings in the order of travel; a closed line ends with its first one."""
    corners = above.astype(np.uint8)
    cells = corners[:-1, :-1] + 2 * corners[:-1, 1:] + 4 * corners[1:, 1:] + 8 * corners[1:, :-1]
    follows: dict[_Crossing, _Crossing] = {}
    for row, column in np.argwhere((cells > 0) & (cells < 15)).tolist():
        for (r0, c0, d0), (r1, c1, d1) in _STEPS[int(cells[row, column])]:
            follows[row + r0, column + c0, d0] = (row + r1, column + c1, d1)
    open_ends = follows.keys() - set(follows.values())
    for start in [*sorted(open_ends), *follows]:
        if start in follows:
            line = [start]
            while line[-1] in follows:
                line.append(follows.pop(line[-1]))
            yield line


def _points(
    line: list[_Crossing], grid: NDArray[np.float64], level: float, size: tuple[int, int]
) -> NDArray[np.float64]:
    """(n, 2) x and y in the view box; between two pixel centres the value is taken as linear."""
    row, column, down = np.array(line).T
    here, there = grid[row, column], grid[row + down, column + 1 - down]
    part = (level - here) / (there - here)
    y, x = row + 0.5 + part * down, column + 0.5 + part * (1 - down)
    return np.stack([x * size[1] / grid.shape[1], y * size[0] / grid.shape[0]], axis=1)


def _path(points: NDArray[Any]) -> str:
    moves = " ".join(f"{x} {y}" for x, y in np.diff(points, axis=0).tolist() if x or y)
    return f"M{points[0, 0]} {points[0, 1]}l{moves}" if moves else ""
