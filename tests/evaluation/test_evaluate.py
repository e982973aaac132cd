"""Evaluation against scores recomputed one draw at a time with `Detector.predict`."""

import csv
import itertools
import json
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from anatomaly.data.transforms import load
from anatomaly.errors import ConfigError, ManifestError
from anatomaly.evaluation import evaluate as evaluation
from anatomaly.evaluation.cells import read_evaluation, write_evaluations
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.evaluation import pooled, table_of, tell_unreadable
from anatomaly.evaluation.metrics import auroc, bootstrap, image_metrics, pool_by_patient
from anatomaly.evaluation.pixel_metrics import pixel_metrics
from anatomaly.types import Intensity, Preprocessing

TASK = "head_ct"
IMAGE, PIXEL = {"auroc", "ap", "f1max", "f1max_floor"}, {"pixel_auroc", "aupro", "dice_max", "dice_floor"}


def changed(manifest, change):
    """The manifest with every row replaced by what `change` returns for it; None drops the row."""
    rows = [change(row) for row in manifest]
    return replace(manifest, samples=tuple(row for row in rows if row is not None))


def judged(manifest):
    return manifest.select(task=TASK, split="test").samples


def by_hand(detector, supports, rows):
    """Predictions of the rows against one draw, through the path a user's single prediction takes."""
    detector.set_support(supports, task=TASK)
    return list(detector.predict(rows, batch_size=1))


def lesion(row):
    shape = np.asarray(Image.open(row.path)).shape[:2]
    return np.asarray(Image.open(row.mask)) > 0 if row.mask else np.zeros(shape, bool)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals of what the tests evaluate themselves are not looked at; those of `results` are made before this."""
    for module in ("evaluate", "evaluation"):
        monkeypatch.setattr(f"anatomaly.evaluation.{module}.bootstrap", partial(bootstrap, samples=10))


@pytest.fixture(scope="module")
def results(phantom, make_detector):
    return evaluate(make_detector(), phantom, task=TASK, shots=(3, 1), draws=2, seed=5, batch_size=3)


@pytest.mark.parametrize("method", ["d24fad", "nearest"])
def test_every_draw_holds_the_metrics_of_scores_recomputed_through_predict(method, phantom, make_detector):
    detector = make_detector(method)
    rows = judged(phantom)
    labels = [row.label for row in rows]
    for result in evaluate(detector, phantom, task=TASK, shots=(1, 3), draws=2, seed=5, batch_size=3):
        for supports, scores, metrics in zip(result.supports, result.scores, result.metrics, strict=True):
            predictions = by_hand(detector, supports, rows)
            expected = [prediction.score for prediction in predictions]
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
            figures = image_metrics(expected, labels)
            figures["patient_auroc"] = auroc(*pool_by_patient(expected, labels, [row.patient_id for row in rows]))
            figures |= pixel_metrics([p.anomaly_map for p in predictions], [lesion(row) for row in rows])
            assert metrics == pytest.approx(figures, abs=1e-5)


def test_results_follow_shots_and_draws(results):
    assert [result.shots for result in results] == [3, 1]
    for result in results:
        assert result.task == TASK
        assert [len(supports) for supports in result.supports] == [result.shots] * 2
        assert result.scores.shape == (2, 8)
        assert len(result.metrics) == 2
        assert not np.array_equal(result.scores[0], result.scores[1])
    three, one = results
    assert [supports[:1] for supports in three.supports] == list(one.supports)


def test_supports_are_normal_training_rows_that_share_nothing_with_the_tests(results, phantom):
    tests = judged(phantom)
    for result in results:
        for support in (row for draw in result.supports for row in draw):
            assert (support.task, support.split, support.label) == (TASK, "train", 0)
            assert support.path not in {row.path for row in tests}
            assert support.patient_id not in {row.patient_id for row in tests}


def test_a_patient_in_both_splits_is_refused(phantom, make_detector):
    leaky = changed(phantom, lambda row: replace(row, patient_id="one") if row.task == TASK else row)
    with pytest.raises(ConfigError, match="share image or patient"):
        evaluate(make_detector(), leaky, task=TASK, shots=(2,), draws=1)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_no_image_is_dropped_whatever_the_batch_size(batch_size, results, phantom, make_detector):
    one = evaluate(make_detector(), phantom, task=TASK, shots=(3,), draws=2, seed=5, batch_size=batch_size)[0]
    assert one.samples == judged(phantom)
    assert one.unreadable == ()
    np.testing.assert_allclose(one.scores, results[0].scores, rtol=1e-5, atol=1e-6)


def test_the_interval_is_the_bootstrap_of_the_mean_auroc_over_patients(results):
    for result in results:
        labels, patients = [s.label for s in result.samples], [s.patient_id for s in result.samples]
        assert result.interval == bootstrap(auroc, result.scores, labels, groups=patients)
        assert result.interval.value == pytest.approx(np.mean([draw["auroc"] for draw in result.metrics]))


def test_summary_is_mean_and_sample_deviation_over_the_draws(results):
    first, second = (draw["ap"] for draw in results[0].metrics)
    assert results[0].summary()["ap"] == pytest.approx(((first + second) / 2, abs(first - second) / 2**0.5))


@pytest.mark.parametrize("case", ["none known", "one unknown", "one image each"])
def test_no_patient_auroc_where_patients_say_nothing(case, phantom, make_detector):
    rows = judged(phantom)

    def change(row):
        if case == "none known" or (case == "one unknown" and row == rows[0]):
            return replace(row, patient_id=None)
        return replace(row, patient_id=str(row.path)) if case == "one image each" else row

    result = evaluate(make_detector(), changed(phantom, change), task=TASK, shots=(2,), draws=1)[0]
    assert result.metrics[0].keys() == IMAGE | PIXEL
    assert result.interval.value == pytest.approx(result.metrics[0]["auroc"])


def test_no_pixel_metrics_without_masks(phantom, make_detector):
    bare = changed(phantom, lambda row: replace(row, mask=None))
    result = evaluate(make_detector(), bare, task=TASK, shots=(2,), draws=1)[0]
    assert result.metrics[0].keys() == IMAGE | {"patient_auroc"}


def test_an_anomalous_image_without_mask_counts_for_the_image_metrics_only(phantom, make_detector):
    detector = make_detector("nearest")
    unmasked = next(row for row in judged(phantom) if row.mask is not None)
    some = changed(phantom, lambda row: replace(row, mask=None) if row == unmasked else row)
    result = evaluate(detector, some, task=TASK, shots=(2,), draws=1)[0]
    known = [row for row in judged(phantom) if row != unmasked]
    maps = [p.anomaly_map for p in by_hand(detector, result.supports[0], known)]
    expected = pixel_metrics(maps, [lesion(row) for row in known])
    assert {name: result.metrics[0][name] for name in PIXEL} == pytest.approx(expected, abs=1e-5)
    assert result.scores.shape == (1, 8)


def test_masks_are_taken_at_the_networks_input_size(phantom, make_detector):
    result = evaluate(make_detector(size=(32, 96)), phantom, task=TASK, shots=(2,), draws=1)[0]
    assert result.metrics[0].keys() == IMAGE | PIXEL | {"patient_auroc"}


def test_an_unreadable_test_image_is_reported_and_left_out(results, phantom, make_detector, tmp_path):
    broken, rows = tmp_path / "broken.png", judged(phantom)
    broken.write_bytes(rows[2].path.read_bytes()[:100])
    damaged = changed(phantom, lambda row: replace(row, path=broken) if row == rows[2] else row)
    result = evaluate(make_detector(), damaged, task=TASK, shots=(3,), draws=2, seed=5, batch_size=3)[0]
    [(sample, reason)] = result.unreadable
    assert sample.path == broken
    assert "broken.png" in reason
    assert result.samples == rows[:2] + rows[3:]
    np.testing.assert_allclose(result.scores, np.delete(results[0].scores, 2, axis=1), rtol=1e-5, atol=1e-6)
    assert json.loads(_written([result], tmp_path / "out", "evaluation.json"))[0]["unreadable"] == [
        f"broken.png: {reason}"
    ]


def broken(manifest, folder, *rows):
    """The manifest with these rows unreadable."""
    file = folder / "broken.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n")
    return changed(manifest, lambda row: replace(row, path=file, frame=rows.index(row)) if row in rows else row)


def test_unreadable_test_images_are_counted_in_every_table(phantom, make_detector, tmp_path):
    rows = judged(phantom)
    damaged = broken(phantom, tmp_path, rows[0], rows[5])
    results = evaluate(make_detector("nearest"), damaged, task=TASK, shots=(1, 2), draws=2)
    reason = results[0].unreadable[0][1]
    line = f"2 of 8 test images are unreadable and left out of all figures; the first: {reason}"
    assert tell_unreadable(results) == line, "an image counts once, whatever the number of K"
    assert "2 support draws, 6 test images, 2 unreadable." in table_of([("", result) for result in results]).note
    facts = json.loads(_written(results, tmp_path / "out", "evaluation.json"))
    assert [(len(each["unreadable"]), each["images"]) for each in facts] == [(2, 6)] * 2
    draws = list(csv.DictReader((tmp_path / "out/draws.csv").open(newline="", encoding="utf-8")))
    assert [row["unreadable"] for row in draws] == ["2"] * 4
    write_evaluations(results[:1], tmp_path / "one")
    assert len(read_evaluation(tmp_path / "one").unreadable) == 2


def test_several_tasks_have_a_count_each(phantom, make_detector, tmp_path):
    damaged = broken(phantom, tmp_path, judged(phantom)[0])
    both = [evaluate(make_detector("pdd"), damaged, task=task)[0] for task in (TASK, "brain_mr")]
    table = table_of([("", result) for result in (*both, pooled(both))])
    assert table.columns[-2:] == ["images", "unreadable"]
    assert [row[-2:] for row in table.rows] == [["7", "1"], ["8", "0"], ["15", "1"]]
    assert "test images." not in table.note
    assert tell_unreadable([*both, pooled(both)]).startswith("1 of 16 test images is unreadable")
    sound = table_of([("", each) for each in (both[1], replace(both[1], task="other"))])
    assert sound.columns[-1] == "images"
    assert [row[-1] for row in sound.rows] == ["8", "8"]
    assert tell_unreadable(both[1:]) == ""


def test_losing_a_class_to_unreadable_files_is_one_clear_error(phantom, make_detector, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    lost = changed(phantom, lambda row: replace(row, path=broken) if row.label == 1 else row)
    with pytest.raises(ManifestError, match=r"4 normal, 0 anomalous and 0 unlabelled readable test images"):
        evaluate(make_detector(), lost, task=TASK, shots=(2,), draws=1)


def test_missing_labels_and_classes_are_refused(phantom, make_detector):
    first = judged(phantom)[0]
    cases = {
        "3 normal, 4 anomalous and 1 unlabelled": lambda row: replace(row, label=None) if row == first else row,
        "4 normal, 0 anomalous and 0 unlabelled": lambda row: None if row.label == 1 else row,
        "0 normal, 4 anomalous and 0 unlabelled": lambda row: None if row.label == 0 and row.split == "test" else row,
    }
    for message, change in cases.items():
        with pytest.raises(ManifestError, match=message):
            evaluate(make_detector(), changed(phantom, change), task=TASK, shots=(2,), draws=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": (9,)}, "has 8 normal training images, 9 shots"),
        ({"shots": ()}, "shots is empty"),
        ({"shots": (0,)}, "at least 1"),
        ({"draws": 0}, "at least 1"),
    ],
)
def test_impossible_draws_are_refused(arguments, message, phantom, make_detector):
    with pytest.raises(ConfigError, match=message):
        evaluate(make_detector(), phantom, task=TASK, **arguments)


def nan_free(text):
    """JSON without NaN, which is no JSON."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def only(manifest, normal, anomalous):
    """The manifest with this many test images of either class."""
    rows = judged(manifest)
    kept = {
        row for label, count in enumerate((normal, anomalous)) for row in [r for r in rows if r.label == label][:count]
    }
    return changed(manifest, lambda row: row if row.split != "test" or row in kept else None)


def test_where_every_patient_is_anomalous_there_is_no_patient_auroc(phantom, make_detector, tmp_path):
    """Normal slices of patients who also have lesions."""
    rows = judged(phantom)
    owner = {row: f"p{i % 4}" for label in (0, 1) for i, row in enumerate(r for r in rows if r.label == label)}
    slices = changed(phantom, lambda row: replace(row, patient_id=owner.get(row)) if row.split == "test" else row)
    (result,) = evaluate(make_detector("nearest"), slices, task=TASK, shots=(2,), draws=2)
    assert all(draw.keys() == IMAGE | PIXEL for draw in result.metrics)
    reason = "it needs both classes, all 4 patients are anomalous"
    assert result.undefined == {"patient_auroc": reason}
    assert result.interval.low < result.interval.high, "patients can be resampled"
    table = table_of([("", result)])
    assert table.rows[0][table.columns.index("patient AUROC")] == "–"
    assert f"– stands for what cannot be had: patient AUROC ({reason})." in table.note
    (facts,) = nan_free(_written([result], tmp_path, "evaluation.json"))
    assert facts["metrics"]["patient_auroc"] == {"mean": None, "sd": None}
    assert facts["undefined"] == {"patient_auroc": reason}
    draws = list(csv.DictReader((tmp_path / "draws.csv").open(newline="", encoding="utf-8")))
    assert [row["patient_auroc"] for row in draws] == ["", ""]
    stored = read_evaluation(tmp_path)
    assert (stored.metrics, stored.undefined, stored.unreadable) == (result.metrics, result.undefined, ())


@pytest.mark.parametrize(("normal", "anomalous", "which"), [(4, 1, "anomalous"), (1, 4, "normal"), (1, 1, "normal")])
def test_one_image_of_a_class_has_no_interval(normal, anomalous, which, phantom, make_detector, tmp_path):
    few = only(phantom, normal, anomalous)
    (result,) = evaluate(make_detector("nearest"), few, task=TASK, shots=(2,), draws=1)
    assert 0 <= result.interval.value == result.metrics[0]["auroc"] <= 1
    reason = f"it needs 2 patients of a class, there is 1 {which} one"
    assert result.undefined == {"interval": reason}
    table = table_of([("", result)])
    assert table.rows[0][table.columns.index("95 % interval")] == "–"
    assert f"95 % interval ({reason})" in table.note
    (facts,) = nan_free(_written([result], tmp_path, "evaluation.json"))
    assert facts["auroc_interval"] == [None, None]
    assert facts["undefined"] == {"interval": reason}
    assert "interval" not in (tmp_path / "draws.csv").read_text().splitlines()[0]


def test_over_all_tasks_there_may_be_an_interval_where_a_task_has_none(phantom, make_detector):
    one = only(phantom, 4, 1).select(task=TASK)
    rows = (*one.samples, *phantom.select(task="brain_mr").samples)
    both = replace(phantom, samples=rows)
    results = [evaluate(make_detector("pdd"), both, task=task)[0] for task in (TASK, "brain_mr")]
    whole = pooled(results)
    assert [bool(result.undefined) for result in (*results, whole)] == [True, False, False]
    assert f"{TASK}: 95 % interval (it needs 2 patients" in table_of([("", each) for each in (*results, whole)]).note
    assert pooled(results[:1]).undefined == results[0].undefined


def small_mask(folder):
    Image.new("L", (32, 64), 255).save(folder / "small.png")
    return folder / "small.png"


def broken_mask(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder / "broken.png"


def missing_mask(folder):
    return folder / "missing.png"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (small_mask, "small.png: the mask has (64, 32) pixels, its image (64, 64); expected the same."),
        (broken_mask, "broken.png"),
        (missing_mask, "missing.png"),
    ],
)
def test_a_row_whose_mask_cannot_be_used_is_listed_and_left_out_of_the_pixel_metrics(
    bad, message, results, phantom, make_detector, tmp_path
):
    row = next(row for row in judged(phantom) if row.mask is not None)
    mask = bad(tmp_path)
    wrong = changed(phantom, lambda other: replace(other, mask=mask) if other == row else other)
    bare = changed(phantom, lambda other: replace(other, mask=None) if other == row else other)
    found, expected = (
        evaluate(make_detector(), data, task=TASK, shots=(3,), draws=2, seed=5, batch_size=3)[0]
        for data in (wrong, bare)
    )
    [(sample, reason)] = found.unusable_masks
    assert sample == replace(row, mask=mask)
    assert message in reason
    assert found.metrics == expected.metrics  # as if the row had no mask
    assert found.metrics != results[0].metrics
    assert expected.unusable_masks == results[0].unusable_masks == ()
    np.testing.assert_array_equal(found.scores, expected.scores)
    facts = json.loads(_written([found, expected], tmp_path / "out", "evaluation.json"))
    assert [fact["unusable_masks"] for fact in facts] == [[f"{row.name}: {reason}"], []]
    assert f"cannot be used: 1; the first: {reason}" in table_of([("", found), ("", found)]).note
    assert "cannot be used" not in table_of([("", expected)]).note


def test_without_any_usable_mask_the_image_metrics_stand(phantom, make_detector, tmp_path):
    wrong = changed(phantom, lambda row: replace(row, mask=broken_mask(tmp_path)) if row.mask else row)
    result = evaluate(make_detector(), wrong, task=TASK, shots=(2,), draws=1)[0]
    assert result.metrics[0].keys() == IMAGE | {"patient_auroc"}
    assert [row for row, _ in result.unusable_masks] == [row for row in judged(wrong) if row.mask is not None]
    assert result.pixel_bounds == ()
    reason = "it needs both classes, there is no lesion pixel in a mask that can be used"
    assert result.undefined == dict.fromkeys(("pixel_auroc", "aupro", "dice_max", "dice_floor"), reason)
    table = table_of([("", result)])
    assert [table.rows[0][table.columns.index(name)] for name in ("pixel AUROC", "AUPRO", "Dice max")] == ["–"] * 3
    assert f"pixel AUROC, AUPRO, Dice max ({reason})" in table.note
    (facts,) = nan_free(_written([result], tmp_path / "out", "evaluation.json"))
    assert facts["metrics"]["aupro"] == {"mean": None, "sd": None}


def test_pixel_metrics_are_within_their_written_bounds(results, phantom, make_detector, tmp_path):
    rows, detector = judged(phantom), make_detector()
    for result in results:
        for supports, metrics, bounds in zip(result.supports, result.metrics, result.pixel_bounds, strict=True):
            maps = [prediction.anomaly_map for prediction in by_hand(detector, supports, rows)]
            exact = pixel_metrics(maps, [lesion(row) for row in rows])
            assert bounds.keys() == PIXEL
            for name in PIXEL:
                assert abs(metrics[name] - exact[name]) <= bounds[name] + 1e-6  # batches round maps differently
                assert bounds[name] < 1e-3
    for facts, result in zip(json.loads(_written(results, tmp_path, "evaluation.json")), results, strict=True):
        first, second = result.pixel_bounds
        assert facts["pixel_bounds"] == pytest.approx({name: (first[name] + second[name]) / 2 for name in PIXEL})


class Bank(NamedTuple):
    preprocessing: Preprocessing
    reference: torch.Tensor


class Darkness:
    """A judge that shares no code with `Detector`: how much brighter pixels are than in the mean support."""

    def __init__(self, preprocessings, *, needs_support=True):
        self.method = SimpleNamespace(needs_support=needs_support)
        self.preprocessings = itertools.cycle(preprocessings)
        self.maps, self.most_alive, self.asked = [], 0, []

    def make_bank(self, images, *, task):
        self.asked.append((task, tuple(images)))
        preprocessing = next(self.preprocessings)
        return Bank(
            preprocessing, torch.stack([torch.from_numpy(load(i, preprocessing).input) for i in images]).mean(0)
        )

    def empty_bank(self, task):
        return Bank(next(self.preprocessings), torch.zeros(3, 1, 1))

    def encode(self, inputs):
        return torch.from_numpy(np.stack(inputs))

    def compare(self, encoded, bank):
        maps = encoded[:, 0] - bank.reference[0]
        self.maps.append(weakref.ref(maps))
        self.most_alive = max(self.most_alive, sum(map_() is not None for map_ in self.maps))
        return SimpleNamespace(maps=maps, scores=maps.amax((1, 2)))


PREPARED = Preprocessing(size=(64, 64))


def test_anything_with_the_right_members_can_be_judged(phantom):
    judge, rows = Darkness([PREPARED]), judged(phantom)
    results = evaluate(judge, phantom, task=TASK, shots=(1, 2), draws=2, seed=5, batch_size=3)
    assert judge.asked == [(TASK, supports) for result in results for supports in result.supports]
    masks, inputs = [lesion(row) for row in rows], [load(row, PREPARED).input for row in rows]
    for result in results:
        drawn = zip(result.supports, result.scores, result.metrics, result.pixel_bounds, strict=True)
        for supports, scores, metrics, bounds in drawn:
            reference = np.mean([load(row, PREPARED).input for row in supports], axis=0)
            maps = [image[0] - reference[0] for image in inputs]
            np.testing.assert_allclose(scores, [m.max() for m in maps], rtol=1e-5, atol=1e-6)
            for name, exact in pixel_metrics(maps, masks).items():
                assert abs(metrics[name] - exact) <= bounds[name] + 1e-12


def test_a_judge_without_support_is_asked_once(phantom):
    judge = Darkness([PREPARED], needs_support=False)
    supports = [judged(phantom)[:1]] * 3  # not looked at
    (result,) = evaluate(judge, phantom, task=TASK, shots=(2, 4), draws=3, supports=supports)
    assert (result.shots, result.supports, result.scores.shape) == (0, ((),), (1, 8))
    assert judge.asked == []


def test_maps_are_forgotten_and_masks_read_once(phantom, monkeypatch):
    """Two ways to prepare images, several blocks of rows: every mask once, one batch of maps at a time."""
    read = []
    original = evaluation.read_mask_of
    monkeypatch.setattr(evaluation, "read_mask_of", lambda row: read.append(row) or original(row))
    ways = [PREPARED, replace(PREPARED, intensity=Intensity("range", 0, 200))]
    whole = evaluate(Darkness(ways), phantom, task=TASK, shots=(2,), draws=4, batch_size=2)[0]
    masked = [row for row in judged(phantom) if row.label == 1]
    assert read == masked
    monkeypatch.setattr(evaluation, "_BLOCK", 5)
    read.clear()
    judge = Darkness(ways)
    in_blocks = evaluate(judge, phantom, task=TASK, shots=(2,), draws=4, batch_size=2)[0]
    assert read == masked
    assert len(judge.maps) == 4 * 4  # banks, batches
    assert judge.most_alive <= 2
    assert in_blocks.samples == whole.samples == judged(phantom)
    np.testing.assert_array_equal(in_blocks.scores, whole.scores)
    assert in_blocks.metrics == whole.metrics
    assert not np.array_equal(whole.scores[0], whole.scores[1])


def test_an_image_that_one_bank_cannot_read_counts_for_none(phantom, tmp_path):
    """ "auto" refuses a floating-point TIFF, a range does not."""
    row = judged(phantom)[4]
    tifffile.imwrite(tmp_path / "float.tif", np.asarray(Image.open(row.path).convert("L"), np.float32))
    mixed = changed(phantom, lambda other: replace(other, path=tmp_path / "float.tif") if other == row else other)
    ways = [replace(PREPARED, intensity=Intensity("range", 0, 255)), PREPARED]
    result = evaluate(Darkness(ways), mixed, task=TASK, shots=(2,), draws=2, batch_size=3)[0]
    assert [sample.path.name for sample, _ in result.unreadable] == ["float.tif"]
    assert result.samples == judged(phantom)[:4] + judged(phantom)[5:]
    assert np.isfinite(result.scores).all()
    assert result.scores.shape == (2, 7)


def test_given_supports_are_used_in_their_order(phantom):
    normals = phantom.select(task=TASK, split="train", label=0).samples
    supports = [normals[5:2:-1], normals[:4]]
    judge = Darkness([PREPARED])
    results = evaluate(judge, phantom, task=TASK, shots=(3, 1), draws=7, supports=supports)
    assert [result.supports for result in results] == [
        (normals[5:2:-1], normals[:3]),
        (normals[5:4:-1], normals[:1]),
    ]
    assert [images for _, images in judge.asked] == [draw for result in results for draw in result.supports]
    assert [result.scores.shape for result in results] == [(2, 8), (2, 8)]


def test_given_supports_that_are_too_few_or_leak_are_refused(phantom):
    normals = phantom.select(task=TASK, split="train", label=0).samples
    cases = [
        ([normals[:3], normals[:2]], (3,), "3 shots asked, the shortest of 2 given supports has 2 images"),
        ([normals[:3]], (0,), "0 shots asked"),
        ([], (1,), "the shortest of 0 given supports has 0 images"),
        ([judged(phantom)[:1]], (1,), "share image or patient"),
    ]
    for supports, shots, message in cases:
        with pytest.raises(ConfigError, match=message):
            evaluate(Darkness([PREPARED]), phantom, task=TASK, shots=shots, supports=supports)


def test_a_percentile_rule_is_resolved_on_the_supports_of_each_draw(phantom, make_detector):
    detector = make_detector("nearest", intensity=Intensity("percentile", 5, 90))
    rows = judged(phantom)
    results = evaluate(detector, phantom, task=TASK, shots=(1, 2), draws=2, seed=1, batch_size=3)
    rules = set()
    for result in results:
        for supports, scores, metrics in zip(result.supports, result.scores, result.metrics, strict=True):
            predictions = by_hand(detector, supports, rows)
            rules.add(detector.ready().preprocessing.intensity)
            np.testing.assert_allclose(scores, [p.score for p in predictions], rtol=1e-5, atol=1e-6)
            expected = pixel_metrics([p.anomaly_map for p in predictions], [lesion(row) for row in rows])
            assert {name: metrics[name] for name in PIXEL} == pytest.approx(expected, abs=1e-5)
        assert result.samples == rows
    assert len(rules) > 1  # otherwise one pass would have done and nothing was tested


def test_the_table_names_methods_only_where_there_are_several(results):
    table = table_of([("", result) for result in results])
    assert table.columns[:4] == ["task", "K", "image AUROC", "95 % interval"]
    assert [row[:2] for row in table.rows] == [[TASK, "3"], [TASK, "1"]]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert "2 support draws, 8 test images" in table.note
    named = table_of([("ours", results[0]), ("theirs", results[1])])
    assert named.columns[:3] == ["task", "method", "K"]
    assert [row[1] for row in named.rows] == ["ours", "theirs"]


def test_the_table_shows_mean_and_deviation_and_leaves_unmeasured_cells_empty(results):
    bare = replace(results[1], metrics=tuple({name: draw[name] for name in IMAGE} for draw in results[1].metrics))
    table = table_of([("", results[0]), ("", bare)])
    mean, sd = results[0].summary()["auroc"]
    assert table.rows[0][table.columns.index("image AUROC")] == f"{mean:.3f} ± {sd:.3f}"
    assert table.rows[0][table.columns.index("AUPRO")] != ""
    assert table.rows[1][table.columns.index("AUPRO")] == ""
    only_images = table_of([("", bare)]).columns
    assert "AUPRO" not in only_images
    assert "patient AUROC" not in only_images


def test_a_single_draw_shows_no_deviation(results):
    one = replace(results[0], metrics=results[0].metrics[:1], supports=results[0].supports[:1])
    table = table_of([("", one)])
    assert table.rows[0][table.columns.index("image AUROC")] == f"{one.metrics[0]['auroc']:.3f}"
    assert "One support draw, no deviation, 8 test images." in table.note


def _written(results, out, name):
    write_evaluations(results, out)
    return (out / name).read_text(encoding="utf-8")


def test_written_files_read_back_as_the_results(results, tmp_path):
    summary = json.loads(_written(results, tmp_path / "out", "evaluation.json"))
    draws = list(csv.DictReader((tmp_path / "out" / "draws.csv").open(newline="", encoding="utf-8")))
    scores = list(csv.DictReader((tmp_path / "out" / "test_scores.csv").open(newline="", encoding="utf-8")))
    for facts, result in zip(summary, results, strict=True):
        assert (facts["task"], facts["shots"], facts["draws"], facts["images"]) == (TASK, result.shots, 2, 8)
        assert facts["auroc_interval"] == list(result.interval[1:])
        assert {name: (m["mean"], m["sd"]) for name, m in facts["metrics"].items()} == result.summary()
    by_draw = [(result, number) for result in results for number in range(2)]
    for row, (result, number) in zip(draws, by_draw, strict=True):
        assert (int(row["shots"]), int(row["draw"])) == (result.shots, number)
        assert row["supports"].split(";") == [sample.name for sample in result.supports[number]]
        assert {name: float(row[name]) for name in result.metrics[number]} == result.metrics[number]
    stored = iter(scores)
    for result, number in by_draw:
        for sample, score in zip(result.samples, result.scores[number], strict=True):
            row = next(stored)
            assert (Path(row["path"]), int(row["label"]), float(row["score"])) == (sample.path, sample.label, score)
            assert (int(row["shots"]), int(row["draw"]), row["frame"]) == (result.shots, number, "")
    assert next(stored, None) is None


def test_a_written_evaluation_is_read_back(results, tmp_path):
    write_evaluations(results[:1], tmp_path)
    found, result = read_evaluation(tmp_path), results[0]
    assert found.images == tuple((str(sample.path), "") for sample in result.samples)
    np.testing.assert_array_equal(found.scores, result.scores)
    assert found.labels.tolist() == [sample.label for sample in result.samples]
    assert found.groups == tuple(sample.patient_id for sample in result.samples)
    assert found.metrics == result.metrics


def test_json_of_a_single_draw_holds_no_nan(results, tmp_path):
    one = replace(results[0], metrics=results[0].metrics[:1], supports=results[0].supports[:1])
    text = _written([one], tmp_path, "evaluation.json")

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(text, parse_constant=refuse)


def test_a_multi_class_model_is_also_judged_over_all_tasks(phantom, make_detector, tmp_path):
    detector = make_detector("pdd")
    tasks = phantom.tasks[:2]
    results = [evaluate(detector, phantom, task=task)[0] for task in tasks]
    whole = pooled(results)
    scores = np.concatenate([result.scores[0] for result in results])
    labels = np.concatenate([[sample.label for sample in result.samples] for result in results])
    assert whole.metrics == (image_metrics(scores, labels),)
    patients = [f"{sample.task}/{sample.patient_id}" for sample in whole.samples]
    assert whole.interval == bootstrap(auroc, scores[None], labels, groups=patients, samples=10)
    write_evaluations([*results, whole], tmp_path)
    with (tmp_path / "test_scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["task"] for row in rows] == [sample.task for sample in whole.samples], "every image once"
    assert json.loads((tmp_path / "evaluation.json").read_text())[-1]["task"] == "all tasks"
    table = table_of([("", result) for result in (*results, whole)])
    assert "K" not in table.columns
    assert [row[0] for row in table.rows] == [*tasks, "all tasks"]
    assert "support draws" not in table.note


@pytest.mark.parametrize("rule", ["range", "percentile"])
def test_every_test_row_is_told_once_when_it_is_done(rule, phantom, make_detector):
    detector, told = make_detector("nearest", intensity=Intensity(rule, 50, 99)), []
    train = phantom.select(task="head_ct", split="train").samples
    draws = [train[:2], train[2:4]]
    ways = {detector.make_bank(draw, task="head_ct").preprocessing for draw in draws}
    assert len(ways) == (2 if rule == "percentile" else 1)
    evaluate(detector, phantom, task="head_ct", shots=[2], supports=draws, batch_size=3, on_progress=told.append)
    assert told == list(phantom.select(task="head_ct", split="test").samples)
