"""The protocols of the releases against loops, and what sets them apart from the sound one."""

from pathlib import Path

import numpy as np
import published_reference as reference
import pytest
from scipy.ndimage import gaussian_filter

from anatomaly.audit.published import (
    PROTOCOLS,
    RELEASED,
    MapScores,
    RunScores,
    auroc_of,
    blur_across,
    file_order,
    first_of_batches,
    judge,
    other_file_names,
    shuffled_loader,
)
from anatomaly.types import Sample, Scoring


def world(normal=25, anomalous=28, size=(20, 24), seed=0, lift=0.35):
    """Rough maps, a little brighter in one spot of most anomalous images; normals first."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], [normal, anomalous])
    maps = rng.gamma(2.0, 0.5, (len(labels), *size)).astype(np.float32)
    maps[labels == 1, 5:12, 6:14] += lift * rng.random((anomalous, 1, 1), np.float32)
    return maps, labels


def score_maps(protocol, maps, labels, **scoring):
    scores = MapScores(**scoring)
    for one in maps:
        scores.add(np.asarray(one, np.float32)[None])
    return judge(protocol, scores.finish(), labels)


@pytest.fixture(scope="module")
def maps_and_labels():
    return world()


def test_sound_scores_are_those_of_the_loops(maps_and_labels):
    maps, labels = maps_and_labels
    judged = score_maps("sound", maps, labels)
    np.testing.assert_allclose(judged.scores, reference.sound(maps), rtol=1e-5)
    assert judged.labels.tolist() == labels.tolist()
    assert judged.positions.tolist() == list(range(53))


def test_published_d24fad_is_a_three_dimensional_blur_of_whole_batches(maps_and_labels):
    maps, labels = maps_and_labels
    judged = score_maps("published-d24fad", maps, labels)
    assert (len(judged.scores), judged.total) == (48, 53)
    np.testing.assert_allclose(judged.scores, reference.published_d24fad(maps), rtol=1e-5)
    literally = [gaussian_filter(maps[i : i + 16], sigma=4).max(axis=(1, 2)) for i in (0, 16, 32)]
    np.testing.assert_allclose(judged.scores, np.concatenate(literally), rtol=1e-5)
    assert auroc_of(judged) == pytest.approx(reference.auroc(judged.scores, labels[:48]))


def test_published_pdd_is_the_first_image_and_the_largest_label_of_ten(maps_and_labels):
    maps, labels = maps_and_labels
    judged = score_maps("published-pdd", maps, labels)
    scores, classes = reference.published_pdd(maps, labels.tolist())
    np.testing.assert_allclose(judged.scores, scores, rtol=1e-5)
    assert judged.labels.tolist() == classes == [0, 0, 1, 1, 1, 1]
    assert judged.positions.tolist() == [0, 10, 20, 30, 40, 50]
    assert labels[20] == 0, "the batch with both classes starts with a normal image"


@pytest.mark.parametrize(("images", "d24fad", "pdd"), [(192, 192, 20), (244, 240, 25), (624, 624, 63), (147, 144, 15)])
def test_how_many_images_are_really_scored(images, d24fad, pdd):
    labels = np.arange(images) >= images // 2
    maps = np.zeros((images, 2, 2), np.float32)
    counts = [len(score_maps(name, maps, labels.astype(np.int64)).scores) for name in PROTOCOLS]
    assert counts == [images, d24fad, pdd]


def test_chunks_change_nothing(maps_and_labels):
    maps, _ = maps_and_labels
    whole, pieces = MapScores(), MapScores()
    whole.add(maps)
    for start in range(0, len(maps), 7):
        pieces.add(maps[start : start + 7])
    for one, other in zip(whole.finish(), pieces.finish(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_sound_scores_know_no_neighbours_and_the_published_ones_do(maps_and_labels):
    maps, labels = maps_and_labels
    loud = maps.copy()
    loud[3] += 5
    before, after = ({p: score_maps(p, m, labels).scores for p in PROTOCOLS} for m in (maps, loud))
    changed = {p: np.flatnonzero(before[p] != after[p]).tolist() for p in PROTOCOLS}
    assert changed["sound"] == [3]
    assert changed["published-d24fad"] == list(range(16)), "every image of the batch"
    assert changed["published-pdd"] == [], "image 3 is never looked at"


def test_the_image_itself_counts_a_tenth_to_a_fifth():
    own = np.diag(blur_across(np.eye(16, dtype=np.float32)[:, :, None])[:, :, 0])
    assert own.min() == pytest.approx(0.10, abs=0.005)
    assert own.max() == pytest.approx(0.20, abs=0.005)


def test_sorted_by_class_the_blur_lifts_weak_maps_and_shuffled_it_sinks_them():
    maps, labels = world(160, 160, (16, 16), lift=0.6)
    sound, d24fad = (auroc_of(score_maps(name, maps, labels)) for name in PROTOCOLS[:2])
    scores = MapScores()
    blurred = scores.add(maps)
    shuffled = shuffled_loader(blurred, labels, orders=5, seed=1)
    assert 0.55 < sound < 0.8
    assert d24fad > sound + 0.1
    assert shuffled.mean() < sound - 0.05
    assert len(set(shuffled.tolist())) == 5


def test_a_shuffled_order_is_the_same_protocol_on_permuted_images(maps_and_labels):
    maps, labels = maps_and_labels
    blurred = MapScores().add(maps)
    (found,) = shuffled_loader(blurred, labels, orders=1, seed=4)
    order = np.random.default_rng(4).permutation(53)
    scores = reference.published_d24fad(maps[order])
    assert found == pytest.approx(reference.auroc(scores, labels[order][:48]))


def test_other_file_names_keep_the_classes_apart():
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], [47, 100])
    scores = rng.normal(labels, 1.5)
    found = other_file_names(scores, labels, orders=300, seed=0)
    assert np.isfinite(found).all()
    assert found.std() > 0.05
    assert found.mean() == pytest.approx(reference.auroc(scores, labels), abs=0.05), "no bias beyond the mixed batch"
    np.testing.assert_array_equal(found, other_file_names(scores, labels, orders=300, seed=0))


def test_under_other_file_names_normals_still_come_first():
    labels = np.repeat([0, 1], [12, 8])  # the second batch counts as anomalous, but its first image is normal
    np.testing.assert_array_equal(other_file_names(labels.astype(float), labels, orders=5), 0.5)


def test_one_class_leaves_the_auroc_undefined():
    labels = np.array([0, 1, 1, 1])
    judged = first_of_batches(np.arange(4.0), labels)
    assert judged.labels.tolist() == [1]
    assert np.isnan(auroc_of(judged))


def test_the_models_own_scoring_is_the_sound_one():
    maps, labels = world(9, 9, (12, 12))
    own = Scoring(blur=2.0, pooling="mean")
    found = score_maps("sound", maps, labels, sound=own)
    np.testing.assert_allclose(found.scores, reference.sound(maps, 2.0, np.mean), rtol=1e-5)
    released = score_maps("published-pdd", maps, labels, sound=own)
    np.testing.assert_allclose(released.scores, reference.sound(maps)[::10], rtol=1e-5)


def test_maps_that_are_blurred_already_are_blurred_along_the_batch_only(maps_and_labels):
    maps, labels = maps_and_labels
    none = Scoring(blur=0.0)
    found = score_maps("published-d24fad", maps, labels, released=none, sound=none).scores
    np.testing.assert_allclose(found[:16], gaussian_filter(maps[:16], sigma=(4, 0, 0)).max(axis=(1, 2)), rtol=1e-5)


def test_without_maps_there_is_no_blur_across(maps_and_labels):
    labels = np.array([0] * 10 + [1] * 10)
    scores = RunScores(np.arange(20.0), np.arange(20.0), None)
    assert judge("published-d24fad", scores, labels) is None
    assert judge("published-pdd", scores, labels).scores.tolist() == [0, 10]
    with pytest.raises(ValueError, match="20 scores and 2 labels"):
        judge("sound", scores, np.array([0, 1]))


def test_files_are_ordered_by_class_then_path_then_frame():
    rows = [("z/a.png", 1, None), ("z/b.png", 0, None), ("a/c.nii", 1, 2), ("a/c.nii", 1, 1), ("m/a.png", 0, None)]
    samples = [Sample(Path(path), "t", label=label, frame=frame) for path, label, frame in rows]
    assert file_order(samples, [row[1] for row in rows]) == [4, 1, 3, 2, 0]


def test_maps_of_another_size_are_refused():
    scores = MapScores()
    scores.add(np.zeros((1, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"got maps of shape \(1, 5, 4\), expected \(4, 4\)"):
        scores.add(np.zeros((1, 5, 4), np.float32))


def test_the_releases_blur_and_pooling():
    assert (RELEASED.blur, RELEASED.pooling) == (4.0, "max")
