import math

import metrics_reference as reference
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from anatomaly.evaluation.metrics import (
    Interval,
    auroc,
    bootstrap,
    image_metrics,
    no_interval,
    pool_by_patient,
    summarise_draws,
)

finite = st.floats(-1e6, 1e6, allow_nan=False)
tied = st.integers(-2, 2).map(float)


@st.composite
def scored_images(draw):
    rows = draw(st.lists(st.tuples(st.one_of(finite, tied), st.integers(0, 1)), min_size=2, max_size=40))
    scores = [score for score, _ in rows]
    labels = [label for _, label in rows]
    labels[0], labels[-1] = 0, 1
    return scores, labels


@given(scored_images())
def test_image_metrics_are_sklearns_and_the_reference_ties_included(data):
    scores, labels = data
    measured = image_metrics(scores, labels)
    assert measured["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert measured["auroc"] == pytest.approx(reference.auroc(scores, labels), abs=1e-12)
    assert measured["ap"] == pytest.approx(sklearn_metrics.average_precision_score(labels, scores), abs=1e-12)
    assert measured["ap"] == pytest.approx(reference.average_precision(scores, labels), abs=1e-12)
    assert measured["f1max"] == pytest.approx(reference.f1_max(scores, labels), abs=1e-12)
    assert measured["f1max"] >= measured["f1max_floor"] - 1e-12
    assert auroc(*data) == pytest.approx(measured["auroc"], abs=1e-12)
    assert auroc([scores, -np.asarray(scores)], labels) == pytest.approx(0.5, abs=1e-12)


def test_scores_outside_0_1_are_never_squashed():
    assert auroc([20, 30, 40, 50], [0, 0, 1, 1]) == 1.0  # a sigmoid in float32 makes these ties: 0.5
    assert auroc([-50, -40, 1e30, 2e30], [0, 0, 1, 1]) == 1.0


def test_scores_are_compared_in_float64():
    assert auroc([1.0, 1.0 + 1e-12], [0, 1]) == 1.0


@given(scored_images(), st.floats(0.1, 100), st.floats(-1e3, 1e3))
def test_only_the_order_of_scores_counts(data, factor, offset):
    scores, labels = np.round(data[0], 3), data[1]
    ranks = np.unique(scores, return_inverse=True)[1]
    assert image_metrics(ranks * factor + offset, labels) == image_metrics(scores, labels)


def test_f1max_floor_is_the_f1_of_calling_everything_anomalous():
    labels = [0] * 13 + [1] * 87
    worst = image_metrics([1.0] * 13 + [0.0] * 87, labels)
    assert worst["f1max_floor"] == pytest.approx(2 * 0.87 / 1.87)
    assert worst["f1max"] == worst["f1max_floor"]
    assert worst["auroc"] == 0.0


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0] * 40, [0] * 40, "needs both classes, got 40 normal and 0 anomalous"),
        ([1.0] * 3, [1] * 3, "got 0 normal and 3 anomalous"),
        ([], [], "got 0 normal and 0 anomalous"),
        ([1.0, math.nan], [0, 1], "1 of 2 scores are NaN"),
        ([1.0, math.inf], [0, 1], "1 of 2 scores are NaN or infinite"),
        ([1.0, 2.0], [0, 2], "neither 0"),
        ([1.0, 2.0], [0, None], "neither 0"),
        ([1.0, 2.0], [0, 1, 1], r"scores \(2,\) and labels \(3,\)"),
        ([[1.0, 2.0]], [[0, 1]], r"expected \(N,\)"),
    ],
)
def test_unusable_scores_or_labels_are_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        image_metrics(scores, labels)


def test_auroc_of_one_class_is_refused():
    with pytest.raises(ValueError, match="got 2 normal and 0 anomalous"):
        auroc([1.0, 2.0], [0, 0])


def test_patients_are_pooled_by_maximum():
    scores, labels, ids = [0.5, 0.1, 0.9, 0.3, 0.2], [1, 0, 0, 0, 0], ["b", "a", "b", "a", "c"]
    pooled, pooled_labels = pool_by_patient(scores, labels, ids)
    np.testing.assert_allclose(pooled, [0.3, 0.9, 0.2])
    np.testing.assert_array_equal(pooled_labels, [0, 1, 0])


def test_pooling_refuses_missing_ids():
    with pytest.raises(ValueError, match="got 2 for 2 images, 1 of them missing"):
        pool_by_patient([1.0, 2.0], [0, 1], ["a", None])
    with pytest.raises(ValueError, match="got 1 for 2 images"):
        pool_by_patient([1.0, 2.0], [0, 1], ["a"])


def _gaussian(generator, normal, anomalous, shift=1.0):
    scores = np.concatenate([generator.normal(size=normal), generator.normal(shift, size=anomalous)])
    return scores, np.repeat([0, 1], [normal, anomalous])


def test_bootstrap_is_stratified_and_repeatable():
    scores, labels = _gaussian(np.random.default_rng(0), 12, 5)
    seen = []

    def metric(drawn, classes):
        seen.append((len(drawn), int(classes.sum())))
        assert set(zip(drawn, classes, strict=True)) <= set(zip(scores, labels, strict=True))
        return auroc(drawn, classes)

    first = bootstrap(metric, scores, labels, samples=50, seed=4)
    assert set(seen) == {(17, 5)}
    assert first == bootstrap(auroc, scores, labels, samples=50, seed=4)
    assert first != bootstrap(auroc, scores, labels, samples=50, seed=5)
    assert isinstance(first, Interval)
    assert first.value == auroc(scores, labels)
    assert first.low < first.value < first.high


def test_the_interval_leaves_out_equal_tails():
    values = []

    def metric(drawn, classes):
        values.append(drawn.mean())
        return values[-1]

    interval = bootstrap(metric, *_gaussian(np.random.default_rng(0), 9, 9), samples=400, confidence=0.9)
    assert interval.value == values[0]
    assert np.mean(np.array(values[1:]) < interval.low) == pytest.approx(0.05, abs=0.003)
    assert np.mean(np.array(values[1:]) > interval.high) == pytest.approx(0.05, abs=0.003)


def test_a_higher_confidence_gives_a_wider_interval():
    scores, labels = _gaussian(np.random.default_rng(0), 30, 30)
    narrow = bootstrap(auroc, scores, labels, samples=300, confidence=0.5)
    wide = bootstrap(auroc, scores, labels, samples=300, confidence=0.95)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bootstrap_interval_covers_the_true_auroc():
    """Two Gaussians one sd apart have AUROC Phi(1 / sqrt 2) = 0.7602; about 95 % of the intervals should hold it."""
    generator = np.random.default_rng(1)
    truth = 0.5 * (1.0 + math.erf(0.5))
    covered = []
    for seed in range(60):
        interval = bootstrap(auroc, *_gaussian(generator, 40, 40), samples=100, seed=seed)
        covered.append(interval.low <= truth <= interval.high)
    assert 0.88 <= np.mean(covered) < 1.0


def test_copies_of_a_patients_image_add_no_certainty_when_grouped():
    """Each of 40 patients gives the same slice ten times: the grouped interval is the one of the 40 patients."""
    scores, labels = _gaussian(np.random.default_rng(2), 20, 20)
    slices, slice_labels = np.repeat(scores, 10), np.repeat(labels, 10)
    patients = [f"p{index:02d}" for index in np.repeat(np.arange(40), 10)]
    by_patient = bootstrap(auroc, slices, slice_labels, groups=patients, samples=400)
    by_image = bootstrap(auroc, slices, slice_labels, samples=400)
    assert by_patient.high - by_patient.low > 2.5 * (by_image.high - by_image.low)  # sqrt(10) = 3.2
    assert by_patient == pytest.approx(bootstrap(auroc, scores, labels, samples=400))


def test_groups_are_resampled_whole_and_every_resample_has_both_classes():
    """Only patients a and d have normal images: stratified by "any image anomalous" alone, both could go missing."""
    scores, labels = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [0, 1, 1, 1, 1, 0, 1]
    draws = []

    def metric(drawn, classes):
        draws.append(sorted(drawn.tolist()))
        return auroc(drawn, classes)

    bootstrap(metric, scores, labels, groups=["a", "a", "b", "b", "c", "d", "d"], samples=90)
    both, only = [(1, 1, 2, 2), (1, 2, 6, 7), (6, 6, 7, 7)], [(3, 3, 4, 4), (3, 4, 5), (5, 5)]
    assert {tuple(draw) for draw in draws} == {tuple(sorted(one + other)) for one in both for other in only}


@pytest.mark.parametrize(
    ("labels", "groups", "reason"),
    [
        ([0, 0, 0, 1], None, "it needs 2 images of a class, there is 1 anomalous one"),
        ([0, 1, 1, 1], None, "it needs 2 images of a class, there is 1 normal one"),
        ([0, 1, 0, 1], "aabb", None),
        ([0, 1, 0, 0], "aabb", "it needs 2 patients of a class, there is 1 anomalous one"),
        ([0, 0, 1, 1], "aabc", "it needs 2 patients of a class, there is 1 normal one"),
        ([0, 0, 1, 1], "aabb", "it needs 2 patients of a class, there is 1 normal one"),
        (
            [0, 0, 1, 1],
            "abbc",
            "it needs 2 patients alike, there is 1 with normal images only and 1 with images of both",
        ),
        ([0, 0, 1, 1], "abcd", None),
    ],
)
def test_an_interval_that_cannot_be_had_is_nan_with_the_reason(labels, groups, reason):
    value, low, high = bootstrap(auroc, [1.0, 2.0, 3.0, 4.0], labels, groups=groups and list(groups), samples=20)
    assert value == auroc([1.0, 2.0, 3.0, 4.0], labels)
    assert [math.isnan(low), math.isnan(high)] == [reason is not None] * 2
    found = no_interval(labels, groups and list(groups))
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"confidence": 95}, "confidence=95"),
        ({"groups": ["a", "b"]}, "got 2 for 4 images"),
        ({"groups": ["a", "b", None, None]}, "2 of them missing"),
    ],
)
def test_bootstrap_refuses_unusable_options(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(auroc, [1, 2, 3, 4], [0, 0, 1, 1], **options)


def test_bootstrap_needs_both_classes():
    with pytest.raises(ValueError, match="got 2 normal and 0 anomalous"):
        bootstrap(auroc, [1, 2], [0, 0])


def test_draws_are_summarised_by_mean_and_sample_sd():
    mean, sd = summarise_draws([0.9, 0.8, 0.7, 0.6])
    assert mean == pytest.approx(0.75)
    assert sd == pytest.approx(np.sqrt(0.05 / 3))
    assert math.isnan(summarise_draws([0.9])[1])
    with pytest.raises(ValueError, match="no values"):
        summarise_draws([])
