"""Supports judged by one another: a foreign one stands out, twins are told, normal spread is not."""

import math

import numpy as np
import pytest

from anatomaly.detector.screening import screen


def odd(scores):
    return [one.odd for one in screen(scores)]


def test_one_that_is_far_from_the_others_stands_out():
    assert odd([0.2, 0.22, 0.18, 0.5]) == [False, False, False, True]
    one = screen([0.2, 0.2, 0.2, 0.4])[3]
    assert one.score == 0.4
    assert one.ratio == pytest.approx(2.0)
    assert one.p_value < 0.01


def test_no_verdict_depends_on_the_unit_of_the_scores():
    scores = np.array([0.2, 0.22, 0.18, 0.26, 0.21])
    for one, other in zip(screen(scores), screen(1000 * scores), strict=True):
        assert one.p_value == pytest.approx(other.p_value)
        assert one.ratio == pytest.approx(other.ratio)


@pytest.mark.parametrize("shots", [4, 8, 16])
def test_supports_that_belong_are_flagged_as_often_as_stated(shots):
    draws = np.exp(0.1 * np.random.default_rng(shots).standard_normal((2000, shots)))
    share = np.mean([any(odd(scores)) for scores in draws])
    assert 0.005 < share < 0.06


def test_a_wide_spread_of_all_hides_the_same_distance():
    assert odd([0.2, 0.2, 0.2, 0.32, 0.2])[3]
    assert not any(odd([0.2, 0.3, 0.15, 0.32, 0.13]))


def test_low_scores_are_no_alarm_but_twins_are_told():
    screened = screen([0.2, 0.22, 1e-6, 2e-6, 0.19])
    assert [one.twin for one in screened] == [False, False, True, True, False]
    assert not any(one.odd for one in screened)
    assert screen([0.2, 0.22, 1e-6, 2e-6, 0.19, 0.6])[5].odd


def test_of_too_few_images_none_is_the_odd_one():
    assert screen([0.1, 0.1, 0.9]) == screen([0.1, 0.9]) == screen([0.1]) == screen([]) == ()


def test_equal_and_zero_scores_are_no_alarm():
    assert not any(odd([0.0] * 4))
    assert not any(odd([0.3] * 4))


def test_two_images_of_a_patient_are_not_compared_with_each_other():
    screened = screen([0.2, 0.21, 0.4, 0.41, 0.19], [0, 1, 2, 2, 3])  # a patient of two images hides itself no more
    assert [one.odd for one in screened] == [False, False, True, True, False]
    assert not any(odd([0.2, 0.21, 0.4, 0.41, 0.19]))
    assert screened[2].ratio == pytest.approx(0.4 / (0.2 * 0.21 * 0.19) ** (1 / 3))
    assert not any(one.odd for one in screen([0.2, 0.21, 0.22, 0.2], [0, 0, 1, 1]))
    assert screen([0.2, 0.3, 0.4, 0.6], [0, 0, 1, 1])[3].ratio == pytest.approx(0.6 / math.sqrt(0.06))
