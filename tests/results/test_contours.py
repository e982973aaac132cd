import re

import numpy as np
import pytest

from anatomaly.results.contours import contour_path


def points(path):
    """(n, 2) x and y of every line of a path."""
    lines = []
    for x, y, moves in re.findall(r"M(\d+) (\d+)l([^M]*)", path):
        steps = np.array(moves.split(), dtype=int).reshape(-1, 2)
        lines.append(np.vstack([[int(x), int(y)], steps]).cumsum(axis=0))
    return lines


def cone(height, width, y, x):
    rows, columns = np.mgrid[:height, :width]
    return -np.hypot(rows - y, columns - x)


def test_the_line_around_a_cone_is_a_circle():
    (circle,) = points(contour_path(cone(40, 60, 19.5, 30.5), -10.0, (400, 600)))
    np.testing.assert_allclose(np.hypot(*(circle - (310, 200)).T), 100, atol=1)  # the pixel's centre is half a pixel in
    np.testing.assert_array_equal(circle[0], circle[-1])
    assert len(circle) > 50


def test_a_line_to_the_border_is_open():
    (line,) = points(contour_path(np.tile([[0.0], [1.0]], (1, 5)), 0.25, (20, 50)))
    np.testing.assert_array_equal(line[:, 1], 8)  # a quarter of the way from 5 to 15, rounded
    assert {line[0, 0], line[-1, 0]} == {5, 45}


def test_two_spots_have_two_lines_and_a_hole_has_one():
    both = np.maximum(cone(40, 40, 10, 10), cone(40, 40, 30, 30))
    assert len(points(contour_path(both, -5.0, (400, 400)))) == 2
    ring = -np.abs(cone(40, 40, 20, 20) + 10)
    assert len(points(contour_path(ring, -3.0, (400, 400)))) == 2


def test_two_pixels_that_touch_at_a_corner_are_two_spots():
    values = np.zeros((4, 4))
    values[1, 1] = values[2, 2] = 1
    for each in (values, values[:, ::-1]):
        assert len(points(contour_path(each, 0.5, (400, 400)))) == 2


@pytest.mark.parametrize("values", [np.zeros((5, 5)), np.full((5, 5), np.nan), np.ones((1, 1)), np.ones((1, 9))])
def test_where_nothing_is_higher_there_is_no_line(values):
    assert contour_path(values, 0.0, (50, 50)) == ""


def test_values_that_are_missing_count_as_lowest():
    values = np.full((9, 9), np.nan)
    values[3:6, 3:6] = 1.0
    (line,) = points(contour_path(values, 0.5, (90, 90)))
    assert (line.min(), line.max()) == (25, 65)  # the centres of the nearest pixels without a value
