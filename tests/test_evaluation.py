"""Evaluation against scores recomputed one draw at a time with `Detector.predict`."""

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anatomaly.errors import ConfigError, ManifestError
from anatomaly.evaluation import evaluate, pooled, table_of, write_evaluations
from anatomaly.metrics import auroc, bootstrap, image_metrics, pixel_metrics, pool_by_patient
from anatomaly.types import Intensity

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
    monkeypatch.setattr("anatomaly.evaluation.bootstrap", partial(bootstrap, samples=10))


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


def test_a_mask_of_another_size_than_its_image_is_refused(phantom, make_detector, tmp_path):
    small = tmp_path / "small.png"
    Image.new("L", (32, 64), 255).save(small)
    wrong = changed(phantom, lambda row: replace(row, mask=small) if row.mask else row)
    with pytest.raises(ManifestError, match=r"small.png: the mask has \(64, 32\) pixels, its image \(64, 64\)"):
        evaluate(make_detector(), wrong, task=TASK, shots=(2,), draws=1)


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
    columns, rows, note = table_of([("", result) for result in results])
    assert columns[:4] == ["task", "K", "image AUROC", "95 % interval"]
    assert [row[:2] for row in rows] == [[TASK, "3"], [TASK, "1"]]
    assert all(len(row) == len(columns) for row in rows)
    assert "2 support draws, 8 test images" in note
    named, cells, _ = table_of([("ours", results[0]), ("theirs", results[1])])
    assert named[:3] == ["task", "method", "K"]
    assert [row[1] for row in cells] == ["ours", "theirs"]


def test_the_table_shows_mean_and_deviation_and_leaves_unmeasured_cells_empty(results):
    bare = replace(results[1], metrics=tuple({name: draw[name] for name in IMAGE} for draw in results[1].metrics))
    columns, rows, _ = table_of([("", results[0]), ("", bare)])
    mean, sd = results[0].summary()["auroc"]
    assert rows[0][columns.index("image AUROC")] == f"{mean:.3f} ± {sd:.3f}"
    assert rows[0][columns.index("AUPRO")] != ""
    assert rows[1][columns.index("AUPRO")] == ""
    only_images = table_of([("", bare)])[0]
    assert "AUPRO" not in only_images
    assert "patient AUROC" not in only_images


def test_a_single_draw_shows_no_deviation(results):
    one = replace(results[0], metrics=results[0].metrics[:1])
    columns, rows, _ = table_of([("", one)])
    assert rows[0][columns.index("image AUROC")] == f"{one.metrics[0]['auroc']:.3f}"


def _written(results, out, name):
    write_evaluations(results, out)
    return (out / name).read_text(encoding="utf-8")


def test_written_files_read_back_as_the_results(results, tmp_path):
    summary = json.loads(_written(results, tmp_path / "out", "evaluation.json"))
    draws = list(csv.DictReader((tmp_path / "out" / "draws.csv").open(newline="", encoding="utf-8")))
    scores = list(csv.DictReader((tmp_path / "out" / "scores.csv").open(newline="", encoding="utf-8")))
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
    with (tmp_path / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["task"] for row in rows] == [sample.task for sample in whole.samples], "every image once"
    assert json.loads((tmp_path / "evaluation.json").read_text())[-1]["task"] == "all tasks"
    columns, cells, note = table_of([("", result) for result in (*results, whole)])
    assert "K" not in columns
    assert [row[0] for row in cells] == [*tasks, "all tasks"]
    assert "support draws" not in note
