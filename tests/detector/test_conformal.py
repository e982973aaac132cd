"""The numbers behind p-values: exact against definitions in fractions, and uniform where they should be."""

import math
from fractions import Fraction

import conformal
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from anatomaly.detector.conformal import (
    exchangeability,
    false_positive_range,
    needed_calls,
    needed_normals,
    p_values,
    rejected_up_to,
    threshold,
)

RATES = ("0.01", "0.02", "0.05", "0.07", "0.1", "0.125", "0.15", "0.2", "0.3", "1/3", "0.5", "0.9")
few = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30)  # many ties
wide = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30)


@given(scores=few | wide, normals=few | wide)
def test_p_values_are_ranks_with_ties_counted_against(scores, normals):
    expected = [float(conformal.p_value(score, normals)) for score in scores]
    assert p_values(scores, normals).tolist() == expected


def test_p_values_keep_the_shape_and_leave_nan_alone():
    found = p_values([[0.5, math.nan], [math.inf, -math.inf]], [1.0, 0.0, 2.0])
    np.testing.assert_array_equal(found, [[0.75, math.nan], [0.25, 1.0]])
    assert found.dtype == np.float64


@pytest.mark.parametrize("normals", [[], [1.0, math.nan], [math.inf, 0.0]])
def test_calibration_scores_are_finite_and_some(normals):
    with pytest.raises(ValueError, match="expected at least one, all finite"):
        p_values([1.0], normals)


def test_the_normals_needed_are_those_everybody_quotes():
    assert [needed_normals(alpha) for alpha in (0.2, 0.1, 0.05, 0.02, 0.01, 0.001)] == [4, 9, 19, 49, 99, 999]


@pytest.mark.parametrize("alpha", RATES)
def test_the_normals_needed_are_exact_and_one_less_is_refused(alpha):
    rate, needed = float(Fraction(alpha)), needed_normals(float(Fraction(alpha)))
    assert needed == conformal.smallest_n(alpha)
    assert threshold(range(needed), rate) == needed - 1
    if needed > 1:
        with pytest.raises(ValueError, match=rf"at least {needed} normal units, got {needed - 1}"):
            threshold(range(needed - 1), rate)


@pytest.mark.parametrize("alpha", RATES)
def test_the_threshold_calls_exactly_the_p_values_up_to_alpha(alpha):
    rate = float(Fraction(alpha))
    for n in range(needed_normals(rate), 130):
        scores = np.random.default_rng(n).integers(0, 40, n).astype(float)
        cut = threshold(scores, rate)
        assert cut == conformal.threshold(scores.tolist(), alpha)
        queries = np.arange(-1.0, 42.0, 0.5)
        np.testing.assert_array_equal(queries > cut, p_values(queries, scores) <= rate)
        assert cut == np.sort(scores)[math.ceil((1 - Fraction(alpha)) * (n + 1)) - 1]


def test_eight_normals_never_give_five_percent():
    with pytest.raises(ValueError, match=r"0\.05 needs at least 19 normal units, got 8: .*0\.111"):
        threshold(range(8), 0.05)
    with pytest.raises(ValueError, match="needs at least 19"):
        false_positive_range(8, 0.05)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan, 5])
def test_a_rate_is_between_0_and_1(alpha):
    for call in (needed_normals, lambda a: threshold(range(99), a), lambda a: rejected_up_to([0.5], a)):
        with pytest.raises(ValueError, match="expected a rate between 0 and 1"):
            call(alpha)
    with pytest.raises(ValueError, match="expected a rate between 0 and 1"):
        needed_calls(9, 5, alpha)


@pytest.mark.parametrize(
    ("n", "alpha", "j"), [(19, 0.05, 1), (50, 0.05, 2), (99, 0.05, 5), (99, 0.01, 1), (30, 0.2, 6)]
)
def test_the_range_of_the_rate_is_that_of_order_statistics(n, alpha, j):
    low, high = false_positive_range(n, alpha)
    assert conformal.rate_below(low, n, j) == pytest.approx(0.05, abs=1e-9)
    assert conformal.rate_below(high, n, j) == pytest.approx(0.95, abs=1e-9)


@pytest.mark.parametrize(("n", "alpha"), [(8, 0.2), (19, 0.05), (50, 0.1)])
def test_normals_are_called_at_the_stated_rate_and_calibrations_differ_as_stated(n, alpha):
    """One query per calibration: calls are independent, so their number is binomial; 1e-4 on either side."""
    rng, repeats = np.random.default_rng(n), 4000
    calls, rates = 0, []
    for _ in range(repeats):
        normals = rng.exponential(size=n)
        calls += p_values(rng.exponential(), normals) <= alpha
        rates.append(math.exp(-threshold(normals, alpha)))  # the true rate of this calibration
    exact = math.floor(alpha * (n + 1) + 1e-9) / (n + 1)
    low, high = binom.ppf([1e-4, 1 - 1e-4], repeats, exact)
    assert low <= calls <= high
    inside = np.mean([bounds[0] <= r <= bounds[1] for bounds in [false_positive_range(n, alpha)] for r in rates])
    low, high = binom.ppf([1e-4, 1 - 1e-4], repeats, 0.9) / repeats
    assert low <= inside <= high


def test_the_smallest_p_value_of_a_patient_holds_for_the_patient():
    """Patients' maxima calibrate; slices of a patient share most of their score."""
    rng, repeats, n = np.random.default_rng(0), 4000, 19
    calls = {"patients": 0, "slices": 0}
    for _ in range(repeats):
        scores = rng.normal(size=(n + 1, 1)) + 0.4 * rng.normal(size=(n + 1, 5))
        calls["patients"] += p_values(scores[-1], scores[:-1].max(axis=1)).min() <= 0.05
        calls["slices"] += p_values(scores[-1], scores[:-1].ravel()).min() <= 0.05
    low, high = binom.ppf([1e-4, 1 - 1e-4], repeats, 0.05)
    assert low <= calls["patients"] <= high
    assert calls["slices"] > high, "counting slices as patients was expected to fail"


ranks = st.lists(st.integers(1, 21) | st.integers(1, 4), min_size=1, max_size=25)  # enough of them small


@given(ranks=ranks, q=st.sampled_from(["0.01", "0.05", "0.1", "0.2", "0.5"]), dependent=st.booleans())
def test_false_discovery_control_rejects_what_the_step_up_procedure_rejects(ranks, q, dependent):
    exact = [Fraction(rank, 21) for rank in ranks]
    cut = rejected_up_to([float(p) for p in exact], float(Fraction(q)), dependent=dependent)
    assert {i for i, p in enumerate(exact) if float(p) <= cut} == conformal.rejected(exact, q, dependent)


def test_false_discovery_control_under_any_dependence_calls_fewer():
    found = [0.01, 0.02, 0.03, 0.9]
    assert rejected_up_to(found, 0.05) == 0.03
    assert rejected_up_to(found, 0.05, dependent=True) == 0
    assert rejected_up_to(found, 0.1, dependent=True) == 0.03


def test_false_discovery_control_leaves_out_nan_and_may_call_none():
    assert rejected_up_to([0.01, math.nan], 0.05) == 0.01
    assert rejected_up_to([0.01, *[0.9] * 9], 0.05) == rejected_up_to([], 0.1) == rejected_up_to([math.nan], 0.1) == 0


@given(n=st.integers(1, 60), m=st.integers(1, 40), q=st.sampled_from([0.05, 0.1, 0.2]), dependent=st.booleans())
def test_the_calls_needed_are_those_that_make_the_procedure_reject(n, m, q, dependent):
    smallest = 1 / (n + 1)
    enough = [
        r for r in range(1, m + 1) if rejected_up_to([smallest] * r + [1.0] * (m - r), q, dependent=dependent) > 0
    ]
    needed = needed_calls(n, m, q, dependent=dependent)
    assert needed == enough[0] if enough else needed > m


def test_new_normals_are_compared_with_old_ones():
    rng = np.random.default_rng(1)
    old = rng.normal(size=60)
    shifted, wider = exchangeability(old, rng.normal(size=40) + 1.5), exchangeability(old, 4 * rng.normal(size=40))
    assert shifted.rank < 1e-6
    assert shifted.higher > 0.75
    assert wider.shape < 0.01
    assert 0.3 < wider.higher < 0.7
    with pytest.raises(ValueError, match="finite"):
        exchangeability(old, [])


def test_the_comparison_rejects_sound_calibrations_as_rarely_as_it_says():
    """A test of the p-values against the uniform distribution would not: they share one calibration."""
    rng, repeats = np.random.default_rng(2), 1500
    tests = [exchangeability(rng.normal(size=20), rng.normal(size=30)) for _ in range(repeats)]
    for kind in ("rank", "shape"):
        assert sum(getattr(t, kind) <= 0.05 for t in tests) <= binom.ppf(1 - 1e-4, repeats, 0.05)
