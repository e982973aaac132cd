"""Paired tests against loops over all pairs of images, hand cases and simulated methods without a difference."""

import math

import comparison_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from anatomaly.evaluation.comparison import Difference, compare_auroc, holm
from anatomaly.evaluation.metrics import auroc, bootstrap


def judged(generator, *, normal=12, anomalous=9, draws=(2, 3), levels=None, patients=None):
    """Scores of two methods that share some of their errors, labels and patients."""
    labels = generator.permutation(np.repeat([0, 1], [normal, anomalous]))
    common = labels + generator.normal(size=len(labels))
    a, b = (
        common + gain * labels + 0.7 * generator.normal(size=(number, len(labels)))
        for gain, number in zip((0.5, 0.0), draws, strict=True)
    )
    if levels:
        a, b = np.round(a * levels), np.round(b * levels)
    groups = None if patients is None else [f"p{i}" for i in generator.integers(0, patients, len(labels))]
    return a, b, labels, groups


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("draws", [(1, 1), (2, 2), (3, 1)])
def test_without_patients_it_is_delongs_test(draws, levels):
    a, b, labels, _ = judged(np.random.default_rng(0), draws=draws, levels=levels)
    found = compare_auroc(a, b, labels)
    difference = np.mean([roc_auc_score(labels, row) for row in a]) - np.mean([roc_auc_score(labels, row) for row in b])
    variance = reference.delong_variance(a.tolist(), b.tolist(), labels.tolist())
    assert found.difference == pytest.approx(difference, abs=1e-12)
    assert found.p == pytest.approx(reference.two_sided(difference, variance), rel=1e-9)
    assert found.high - found.low == pytest.approx(2 * 1.959963984540054 * math.sqrt(variance), rel=1e-9)
    assert (found.high + found.low) / 2 == pytest.approx(difference, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 3]), st.sampled_from([5, 12, 40]))
def test_with_patients_it_is_obuchowskis(seed, levels, patients):
    a, b, labels, groups = judged(np.random.default_rng(seed), levels=levels, patients=patients)
    variance = reference.obuchowski_variance(a.tolist(), b.tolist(), labels.tolist(), groups)
    found = compare_auroc(a, b, labels, groups=groups)
    assert found.difference == pytest.approx(auroc(a, labels) - auroc(b, labels), abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(1.959963984540054 * math.sqrt(max(variance, 0.0)), abs=1e-9)
    if variance > 1e-12:
        assert found.p == pytest.approx(reference.two_sided(found.difference, variance), rel=1e-6)


def test_one_image_per_patient_is_no_patients_at_all():
    a, b, labels, _ = judged(np.random.default_rng(1))
    assert compare_auroc(a, b, labels, groups=[f"{i}" for i in range(len(labels))]) == pytest.approx(
        compare_auroc(a, b, labels), abs=1e-14
    )


def test_copies_of_images_add_no_certainty_when_grouped():
    a, b, labels, _ = judged(np.random.default_rng(2))
    copies = [np.repeat(item, 5, axis=-1) for item in (a, b, labels)]
    patients = np.repeat([f"p{i}" for i in range(len(labels))], 5)
    assert compare_auroc(*copies, groups=patients) == pytest.approx(compare_auroc(a, b, labels), abs=1e-12)
    assert compare_auroc(*copies).p < compare_auroc(a, b, labels).p


def test_scores_may_come_without_draws_and_on_any_scale():
    a, b, labels, _ = judged(np.random.default_rng(3), draws=(1, 1))
    found = compare_auroc(a[0], b[0], labels)
    assert found == compare_auroc(a, b, labels)
    assert found == compare_auroc(1e6 * a - 5, np.exp(b), labels)
    assert isinstance(found, Difference)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 8]))
def test_the_order_of_images_and_draws_and_the_names_of_patients_do_not_matter(seed, patients):
    generator = np.random.default_rng(seed)
    a, b, labels, groups = judged(generator, patients=patients)
    order = generator.permutation(len(labels))
    names = dict(zip(sorted(set(groups or [])), generator.permutation(len(set(groups or []))), strict=True))
    renamed = None if groups is None else [f"{names[groups[i]]}" for i in order]
    found = compare_auroc(a, b, labels, groups=groups)
    assert compare_auroc(a[::-1, order], b[:, order], labels[order], groups=renamed) == pytest.approx(found, abs=1e-12)
    difference, low, high, p = compare_auroc(b, a, labels, groups=groups)
    assert (-difference, -high, -low, p) == pytest.approx(found, abs=1e-12)
    assert 0.0 <= p <= 1.0


def test_methods_that_rank_alike_do_not_differ():
    a, _, labels, groups = judged(np.random.default_rng(4), draws=(7, 1), patients=6)
    assert compare_auroc(a, np.exp(a), labels, groups=groups) == (0.0, 0.0, 0.0, 1.0)


def test_the_same_draws_in_another_order_are_the_same_method():
    a, _, labels, _ = judged(np.random.default_rng(4), draws=(7, 1))
    assert compare_auroc(a, a[::-1], labels) == (0.0, 0.0, 0.0, 1.0)
    assert compare_auroc(a, np.concatenate([a, a]), labels) == (0.0, 0.0, 0.0, 1.0)


def test_a_difference_that_every_image_shows_has_no_variance():
    labels = [0, 0, 0, 1, 1, 1, 1]
    assert compare_auroc(labels, [2] * 7, labels) == (0.5, 0.5, 0.5, 0.0)
    assert compare_auroc([labels] * 3, [[2] * 7, labels, labels], labels) == (1 / 6, 1 / 6, 1 / 6, 0.0)


@pytest.mark.parametrize("patients", [None, 50])
def test_the_interval_is_much_that_of_the_bootstrap_of_both_methods_at_once(patients):
    a, b, labels, groups = judged(np.random.default_rng(6), normal=90, anomalous=70, patients=patients)
    found = compare_auroc(a, b, labels, groups=groups)
    resampled = bootstrap(
        lambda scores, classes: auroc(scores[:2], classes) - auroc(scores[2:], classes),
        np.concatenate([a, b]),
        labels,
        groups=groups,
        samples=600,
    )
    assert resampled.value == pytest.approx(found.difference, abs=1e-12)
    width = found.high - found.low
    assert (resampled.low, resampled.high) == pytest.approx((found.low, found.high), abs=0.12 * width)


def test_pairing_makes_the_difference_surer_than_two_intervals():
    a, b, labels, _ = judged(np.random.default_rng(7), normal=60, anomalous=60, draws=(1, 1))
    shuffled = b.copy()  # the same AUROC, its errors in other images
    for label in (0, 1):
        shuffled[:, labels == label] = np.random.default_rng(0).permutation(b[0, labels == label])
    paired, unpaired = compare_auroc(a, b, labels), compare_auroc(a, shuffled, labels)
    assert paired.difference == pytest.approx(unpaired.difference, abs=1e-12)
    assert paired.high - paired.low < 0.8 * (unpaired.high - unpaired.low)


def false_findings(runs, simulate, **options):
    return np.mean([compare_auroc(*simulate(seed), **options).p < 0.05 for seed in range(runs)])


def test_methods_alike_are_found_different_one_time_in_twenty():
    """400 runs: 0.05 +- 3.3 standard deviations of a binomial share."""

    def simulate(seed):
        generator = np.random.default_rng(seed)
        labels = np.repeat([0, 1], 40)
        common = labels + generator.normal(size=80)
        return *(common + 0.8 * generator.normal(size=(2, 80)) for _ in range(2)), labels

    assert abs(false_findings(400, simulate) - 0.05) < 3.3 * math.sqrt(0.05 * 0.95 / 400)


def test_slices_of_one_patient_are_no_independent_evidence():
    def simulate(seed):
        generator = np.random.default_rng(seed)
        labels = np.repeat([0, 1], 120)  # 6 slices of each of 40 patients
        per_patient = [np.repeat(generator.normal(size=40), 6) for _ in range(2)]
        return *(labels + p + 0.2 * generator.normal(size=240) for p in per_patient), labels

    patients = [f"p{i:02d}" for i in np.repeat(np.arange(40), 6)]
    assert abs(false_findings(300, simulate, groups=patients) - 0.05) < 3.3 * math.sqrt(0.05 * 0.95 / 300)
    assert false_findings(100, simulate) > 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores_a": [1.0, 2.0, 3.0]}, r"got scores \(3,\) and labels \(4,\)"),
        ({"scores_b": [1.0, 2.0, 3.0, math.nan]}, "1 of 4 scores are NaN"),
        ({"scores_b": np.zeros((0, 4))}, "got no draws"),
        ({"labels": [0, 0, 1, 2]}, "neither 0"),
        ({"labels": [0, 0, 0, 1]}, "got 1 images that are anomalous, expected 2"),
        ({"labels": [1, 1, 1, 1]}, "got 0 images that are normal"),
        ({"groups": ["a", "a", "b", "c"]}, "got 1 patients with images that are normal"),
        ({"groups": ["a", "b", "c", None]}, "1 of them missing"),
    ],
)
def test_unusable_input_is_refused(change, message):
    given = {"scores_a": [1.0, 2.0, 3.0, 4.0], "scores_b": [1.0, 3.0, 2.0, 4.0], "labels": [0, 0, 1, 1]} | change
    with pytest.raises(ValueError, match=message):
        compare_auroc(**given)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.2], [0.2]),
        ([0.5, 0.9, 0.4], [1.0, 1.0, 1.0]),
        ([0.0, 1.0], [0.0, 1.0]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values, adjusted):
    assert holm(p_values).tolist() == pytest.approx(adjusted, abs=1e-12)


@given(st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.01, 0.02, 0.5])), min_size=1, max_size=8))
def test_holm_is_the_step_down_procedure(p_values):
    found = holm(p_values)
    assert found.tolist() == pytest.approx(reference.holm(p_values), abs=1e-12)
    assert (found >= p_values).all()
    assert (found <= np.minimum(1, len(p_values) * np.asarray(p_values))).all()  # never worse than Bonferroni
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(found[order]) >= 0).all()


@pytest.mark.parametrize("p_values", [[0.1, math.nan], [1.1], [-0.1], [[0.1]]])
def test_holm_refuses_what_is_no_p_value(p_values):
    with pytest.raises(ValueError, match="holm: a p-value is missing or not between 0 and 1"):
        holm(p_values)
