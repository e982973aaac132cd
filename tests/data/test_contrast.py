"""How much of the input range an image uses, and the rule its values ask for."""

from pathlib import Path

import numpy as np
import pytest

from anatomaly.data.contrast import measure, suggest
from anatomaly.types import Image, Intensity

RNG = np.random.default_rng(5)
SCAN = RNG.uniform(0, 1, (1, 64, 64)).astype(np.float32)


def image(pixels, **facts):
    return Image(np.asarray(pixels, np.float32), None, Path("x"), "0" * 64, **facts)


def test_grey_levels_are_counted_without_the_commonest():
    pixels = np.zeros((1, 20, 20), np.float32)
    pixels[0, 10:].flat[:200] = np.repeat([0.2, 0.4, 0.6, 0.8], 50)  # half is background
    assert measure(pixels).levels == pytest.approx(4)
    assert measure(pixels).used == pytest.approx(0.8)
    assert measure(np.moveaxis(np.repeat(pixels, 3, 0), 0, 0)) == measure(pixels), "colours are averaged"


def test_the_used_range_leaves_out_single_pixels():
    pixels = SCAN * np.float32(0.05)
    pixels[0, 0, :2] = 1
    assert measure(pixels).used < 0.06


def test_images_of_real_contrast_are_not_poor_and_shrunk_or_saturated_ones_are():
    black = np.zeros((1, 64, 64), np.float32)
    black[0, 24:40, 24:40] = SCAN[0, :16, :16]  # a small head in much air
    for fine in (SCAN, 1 - SCAN, 0.2 * SCAN, black):
        assert not measure(fine).poor
    for poor in (SCAN / 16, 0.5 + SCAN / 64, np.minimum(SCAN * 64, 1), np.round(SCAN), np.ones_like(SCAN)):
        assert measure(poor.astype(np.float32)).poor


def test_a_constant_is_blank_and_one_dot_is_not():
    dot = np.zeros((1, 500, 500), np.float32)
    assert measure(dot).blank
    dot[0, 1, 1] = 1  # beside the grid that is looked at
    assert not measure(dot).blank


@pytest.mark.parametrize(
    ("images", "expected"),
    {
        "12 bits": ([image(np.round(SCAN * 4000))], Intensity("range", 0, 4095)),
        "of several": ([image(np.round(SCAN * 90)), image(np.round(SCAN * 1000))], Intensity("range", 0, 1023)),
        "few outliers": ([image(np.where(SCAN > 0.999, 60000, np.round(SCAN * 100)))], Intensity("range", 0.5, 100)),
        "fractions": ([image(SCAN * 0.01)], None),
        "declared CT": ([image(SCAN * 2000 - 500, modality="CT")], Intensity("window", 40, 80)),
        "CT stored without offset": ([image(np.round(SCAN * 2000), modality="CT")], Intensity("range", 0, 2047)),
        "down to air": ([image(SCAN * 2000 - 1000)], Intensity("window", 40, 80)),
        "MR down to as low": ([image(SCAN * 2000 - 1000, modality="MR")], Intensity("range", -990, 990)),
        "constant": ([image(np.ones((1, 9, 9)))], "nothing"),
    }.values(),
)
def test_the_rule_that_values_ask_for(images, expected):
    found = suggest(images)
    if expected == "nothing":
        assert found is None
    elif expected is None:
        assert (found.rule, found.low < found.high) == ("range", True)
        assert found.high == pytest.approx(0.01, rel=0.02)
    else:
        assert found.rule == expected.rule
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.02, abs=1)
