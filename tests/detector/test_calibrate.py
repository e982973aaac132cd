"""Calibrating a detector: what counts as one, what is refused, and that p-values appear only where they hold."""

import csv
import json
from dataclasses import replace

import conformal
import numpy as np
import pytest
from PIL import Image
from scores import read_scores

import anatomaly.detector.bundle
from anatomaly.cli import main
from anatomaly.data.manifest import Manifest, write_csv
from anatomaly.detector.calibrate import calibrate, calibrate_on_support, check
from anatomaly.detector.detector import Detector
from anatomaly.errors import ConfigError, NotReadyError
from anatomaly.results.folder import predict_to_folder
from anatomaly.synthetic.phantom import draw
from anatomaly.types import Intensity, Sample, Scoring


def drawn(folder, seeds, *, slices=1, patients=False, anomalous=False):
    """Rows of head CTs of 64 px, one per patient and slice."""
    folder.mkdir(exist_ok=True)
    rows = []
    for seed in seeds:
        for k in range(slices):
            file = folder / f"{seed}_{k}.png"
            if not file.exists():
                image = draw("head_ct", seed=seed, slice_index=k, size=64, anomalous=anomalous)
                Image.fromarray((255 * image.pixels[0]).astype(np.uint8)).save(file)
            rows.append(Sample(file, "head_ct", label=0, patient_id=f"p{seed}" if patients else None))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrating")


@pytest.fixture(scope="module")
def supports(folder):
    return drawn(folder / "supports", range(3))


@pytest.fixture(scope="module")
def normals(folder):
    return drawn(folder / "normals", range(100, 119))


@pytest.fixture(scope="module")
def queries(folder):
    return drawn(folder / "queries", range(200, 204))


@pytest.fixture
def detector(make_detector, supports):
    return make_detector("nearest").set_support(supports, task="head_ct")


def p_of(detector, rows):
    return [prediction.p_value for prediction in detector.predict(rows)]


@pytest.mark.parametrize("name", ["nearest", "d24fad", "pdd"])
def test_p_values_are_ranks_among_the_normals_for_every_method(name, make_detector, supports, normals, queries):
    detector = make_detector(name)
    if name == "pdd":
        detector.set_task("head_ct")
    else:
        detector.set_support(supports, task="head_ct")
    assert p_of(detector, queries) == [None] * 4
    assert detector.find_calibration() == (None, "")
    calibration, left_out = calibrate(detector, normals, batch_size=5)
    scores = [prediction.score for prediction in detector.predict(normals)]
    assert calibration.scores == pytest.approx(sorted(scores), abs=1e-6)
    assert (calibration.unit, calibration.n, left_out) == ("image", 19, ())
    assert detector.find_calibration()[1] == "p-values: 19 normal images held out; smallest possible 0.05."
    found = list(detector.predict(queries))
    assert [p.p_value for p in found] == [float(conformal.p_value(p.score, calibration.scores)) for p in found]


def test_a_patient_counts_once_with_the_highest_score(detector, folder, queries):
    rows = drawn(folder / "slices", range(300, 304), slices=3, patients=True)[:-1]
    scores = {row.path: p.score for row, p in zip(rows, detector.predict(rows), strict=True)}
    calibration, _ = calibrate(detector, rows)
    expected = sorted(max(scores[r.path] for r in rows if r.patient_id == who) for who in {r.patient_id for r in rows})
    assert calibration.scores == pytest.approx(expected, abs=1e-6)
    assert (calibration.unit, sorted(calibration.images)) == ("patient", [2, 3, 3, 3])
    assert len(calibration.sha256) == 11
    found = list(detector.predict(queries))
    assert [p.p_value for p in found] == [float(conformal.p_value(p.score, calibration.scores)) for p in found]


def test_the_slices_of_a_file_count_as_one(detector, tmp_path):
    for number in range(2):
        drawings = [draw("head_ct", seed=400 + number, slice_index=k, size=64) for k in range(3)]
        pages = [Image.fromarray((255 * each.pixels[0]).astype(np.uint8)) for each in drawings]
        pages[0].save(tmp_path / f"{number}.tif", save_all=True, append_images=pages[1:])
    calibration, _ = calibrate(detector, sorted(tmp_path.iterdir()))
    assert (calibration.unit, calibration.images, len(set(calibration.sha256))) == ("scan", (3, 3), 6)


def test_unreadable_images_and_copies_are_left_out_and_listed(detector, normals, tmp_path):
    broken, copy = tmp_path / "broken.png", tmp_path / "copy.png"
    broken.write_bytes(normals[0].path.read_bytes()[:80])
    copy.write_bytes(normals[1].path.read_bytes())
    calibration, left_out = calibrate(detector, [broken, *[row.path for row in normals[:4]], copy])
    assert calibration.n == 4
    assert [p.sample.path for p in left_out] == [broken, copy]
    assert "the same image as 101_0.png" in left_out[1].error
    with pytest.raises(ConfigError, match=r"none of 1 images can be used.*broken\.png"):
        calibrate(detector, [broken])
    assert detector.calibrations == (calibration,)


def test_what_cannot_be_calibrated_on_is_refused(detector, supports, normals, queries):
    for rows, message in (
        ([], "got no images"),
        ([*normals, replace(normals[0], label=1)], "1 of 20 rows are labelled anomalous"),
        ([*normals, supports[1]], "1_0.png is one of the support images"),
        ([replace(normals[0], patient_id="x"), *normals[1:]], "18 of 19 rows name no patient"),
        ([replace(normals[0], task="other"), *normals[1:]], "rows of 2 tasks"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrate(detector, rows)
    named = [replace(row, patient_id=str(k)) for k, row in enumerate(normals)]
    with pytest.raises(ConfigError, match="1 images are of patients who are in the support too") as refusal:
        calibrate(detector, named, supports=[replace(supports[0], patient_id="7")])
    assert "7" not in str(refusal.value), "patients are not named"
    assert detector.calibrations == ()


def test_leave_one_out_scores_each_support_against_the_others(make_detector, normals, queries):
    for name, guarantee in (("nearest", "conservative"), ("d24fad", "approximate")):
        detector = make_detector(name)
        calibration, _ = calibrate_on_support(detector, normals[:4], task="head_ct")
        expected = []
        for k in range(4):
            other = make_detector(name).set_support(normals[:k] + normals[k + 1 : 4], task="head_ct")
            expected.append(next(other.predict([normals[k]])).score)
        assert calibration.scores == pytest.approx(sorted(expected), abs=1e-5)
        assert (calibration.kind, calibration.guarantee, calibration.n) == ("leave-one-out", guarantee, 4)
        assert set(p_of(detector, queries)) <= {0.2, 0.4, 0.6, 0.8, 1.0}
    rule = Intensity("percentile", 1, 99)
    assert calibrate_on_support(make_detector("nearest"), normals[:3], intensity=rule)[0].guarantee == "approximate"


def test_leave_one_out_leaves_a_patient_out_with_all_slices(make_detector, folder):
    rows = drawn(folder / "slices", range(300, 303), slices=2, patients=True)
    detector = make_detector("nearest")
    calibration, _ = calibrate_on_support(detector, rows, task="head_ct")
    expected = []
    for k in range(3):
        other = make_detector("nearest").set_support(rows[: 2 * k] + rows[2 * k + 2 :], task="head_ct")
        expected.append(max(p.score for p in other.predict(rows[2 * k : 2 * k + 2])))
    assert calibration.scores == pytest.approx(sorted(expected), abs=1e-5)
    with pytest.raises(ConfigError, match="2 images of 1 patient, expected at least 2"):
        calibrate_on_support(detector, rows[:2])


def test_adding_a_support_never_raises_a_nearest_neighbour_score(make_detector, normals, queries):
    """The reason why leave-one-out holds there."""
    few = make_detector("nearest").set_support(normals[:3])
    many = make_detector("nearest").set_support(normals[:4])
    for one, other in zip(few.predict(queries), many.predict(queries), strict=True):
        assert other.score <= one.score + 1e-6


def test_images_the_model_has_seen_get_a_note_and_no_p_value(detector, supports, normals, queries):
    calibrate(detector, normals)
    found = list(detector.predict([supports[0], normals[3], queries[0]]))
    assert [p.p_value is None for p in found] == [True, True, False]
    assert [p.note for p in found] == [
        "one of the support images: compared with itself",
        "one of the calibration images: no p-value",
        None,
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda make, s: make("nearest").set_support(s[:2], task="head_ct"), "another support bank"),
        (lambda make, s: make("nearest").set_support(s, task="other"), "task 'head_ct' instead of 'other'"),
        (lambda make, s: make("nearest", scoring=Scoring(blur=1.0)).set_support(s, task="head_ct"), "another scoring"),
        (lambda make, s: make("nearest", resize="pad").set_support(s, task="head_ct"), "another preprocessing"),
        (lambda make, s: make("d24fad").set_support(s, task="head_ct"), "another model"),
        (
            lambda make, s: make("nearest").set_support(s, task="head_ct", intensity=Intensity("range", 0, 200)),
            "another preprocessing",
        ),
    ],
)
def test_a_calibration_of_another_setting_is_not_used(change, reason, make_detector, supports, queries, normals):
    detector = make_detector("nearest").set_support(supports, task="head_ct")
    calibration, _ = calibrate(detector, normals[:5])
    other = change(make_detector, supports)
    other.calibrations = (calibration,)
    assert p_of(other, queries) == [None] * 4
    assert other.find_calibration() == (
        None,
        f"no p-values: calibrated with {reason}. Run anatomaly calibrate for what is judged here.",
    )


def test_a_calibration_of_another_precision_is_not_used(detector, normals, queries):
    calibrate(detector, normals)
    detector.precision = "bf16"
    assert p_of(detector, queries[:1]) == [None]
    assert "fp32 instead of bf16" in detector.find_calibration()[1]


def test_the_order_of_the_supports_does_not_matter_and_calibrating_again_replaces(detector, supports, normals):
    calibrate(detector, normals[:5])
    calibrate(detector, normals)
    assert [c.n for c in detector.calibrations] == [19]
    detector.set_support(supports[::-1], task="head_ct")
    assert detector.find_calibration()[0].n == 19


def test_a_better_calibration_stays_in_use_and_the_other_is_kept_beside_it(make_detector, normals, tmp_path):
    detector, supports = make_detector("nearest"), normals[:4]
    held_out, _ = calibrate(detector.set_support(supports, task="head_ct"), normals[4:])
    own, _ = calibrate_on_support(detector, supports, task="head_ct")
    fewer, _ = calibrate(detector, normals[4:9])
    assert set(detector.calibrations) == {held_out, own, fewer}
    assert detector.find_calibration()[0] is held_out
    detector.save(tmp_path / "model")
    loaded = type(detector).load(tmp_path / "model", device="cpu").set_support(supports, task="head_ct")
    assert loaded.find_calibration()[0] == held_out
    assert calibrate(detector, normals[4:])[0] is detector.find_calibration()[0]
    assert len(detector.calibrations) == 2, "as many of the same kind take the place of both"


def test_held_out_normals_come_before_more_supports_judged_by_one_another(make_detector, normals):
    detector = make_detector("nearest").set_support(normals[:4], task="head_ct")
    held_out, _ = calibrate(detector, normals[4:7])
    assert calibrate_on_support(detector, normals[:4], task="head_ct").calibration.n == 4
    assert detector.find_calibration()[0] is held_out


@pytest.mark.parametrize("kind", ["held-out", "leave-one-out"])
def test_a_worse_calibration_takes_the_place_of_a_better_one_where_it_is_asked_to(make_detector, normals, kind):
    detector, supports = make_detector("nearest"), normals[:4]
    calibrate(detector.set_support(supports, task="head_ct"), normals[4:])
    if kind == "held-out":
        calibrate(detector, normals[4:9], replace_all=True)
    else:
        calibrate_on_support(detector, supports, task="head_ct", replace_all=True)
    assert [(each.kind, each.n) for each in detector.calibrations] == [(kind, 5 if kind == "held-out" else 4)]


@pytest.mark.usefixtures("supports", "normals", "queries")
def test_calibrate_says_which_calibration_is_in_use(run, model, folder):
    words = ("calibrate", "--model", model, "--support", folder / "supports", "--task", "head_ct")
    assert "In use: this calibration; predict --model" in run(*words, "--normals", folder / "normals")[1]
    out = run(*words)[1]
    assert "In use: still the better one of before, 19 normal images held out; smallest possible 0.05. With --re" in out
    assert "In use: this calibration; predict --model" in run(*words, "--replace")[1]
    images = ("--images", folder / "queries", "--out", model.parent / "out")
    out = run("predict", *map(str, words[1:]), *images)[1]
    assert out.startswith("p-values: 3 normal images of the support")


def test_a_calibration_stays_with_bundle_and_bank(detector, supports, normals, queries, tmp_path):
    detector.save(tmp_path / "model")
    calibrate(detector, normals)
    detector.save_calibrations(tmp_path / "model")
    detector.save_support(tmp_path / "bank")
    first = (tmp_path / "model/calibration.json").read_bytes()
    loaded = Detector.load(tmp_path / "model", device="cpu").load_support(tmp_path / "bank")
    assert loaded.calibrations == detector.calibrations
    assert p_of(loaded, queries) == p_of(detector, queries)
    loaded.save(tmp_path / "copy")
    assert (tmp_path / "copy/calibration.json").read_bytes() == first
    assert b"p100" not in first
    assert b".png" not in first, "no file names"
    loaded.calibrations = ()
    loaded.save(tmp_path / "copy")
    assert not (tmp_path / "copy/calibration.json").exists(), "of an older bundle"


@pytest.mark.parametrize(
    "damage",
    [
        lambda facts: facts["calibrations"][0]["scores"].__setitem__(0, 0.0),
        lambda facts: facts["calibrations"][0].update(task="other"),
        lambda facts: facts["calibrations"][0].pop("unit"),
        lambda facts: facts.update(calibrations=[3]),
        lambda facts: facts.pop("format"),
    ],
)
def test_a_changed_calibration_is_refused(damage, detector, normals, tmp_path):
    detector.save(tmp_path)
    calibrate(detector, normals[:3])
    detector.save_calibrations(tmp_path)
    facts = json.loads((tmp_path / "calibration.json").read_text())
    damage(facts)
    (tmp_path / "calibration.json").write_text(json.dumps(facts))
    with pytest.raises(NotReadyError, match=r"calibration\.json: damaged or changed"):
        Detector.load(tmp_path)


def test_a_calibration_of_a_newer_format_asks_for_an_update(detector, normals, tmp_path, monkeypatch):
    calibrate(detector, normals[:3])
    monkeypatch.setattr(anatomaly.detector.bundle, "FORMAT", 2)
    detector.save_calibrations(tmp_path)
    monkeypatch.undo()
    with pytest.raises(NotReadyError, match=r"calibration format 2, expected 1\. Update"):
        anatomaly.detector.bundle.load_calibrations(tmp_path)


def test_supports_judged_by_one_another_are_nothing_to_check_against(make_detector, normals, queries):
    detector = make_detector("nearest")
    calibrate_on_support(detector, normals[:4], task="head_ct")
    with pytest.raises(ConfigError, match=r"check: the supports were judged by one another.*--normals"):
        check(detector, queries)


def test_new_normals_can_be_checked(detector, normals, queries, tmp_path):
    with pytest.raises(NotReadyError, match="Run anatomaly calibrate first"):
        check(detector, queries)
    calibrate(detector, normals)
    tests, n = check(detector, [*queries, normals[0]])
    assert n == 4, "one calibrated on does not count"
    assert min(tests.rank, tests.shape) > 0.01
    other = []
    for row in normals:  # another scanner: noise
        pixels = np.asarray(Image.open(row.path)) // 2 + np.random.default_rng(0).integers(0, 120, (64, 64))
        other.append(tmp_path / row.path.name)
        Image.fromarray(pixels.astype(np.uint8)).save(other[-1])
    assert max(check(detector, other)[0][:2]) < 0.001
    with pytest.raises(ConfigError, match="no image is left"):
        check(detector, normals)
    with pytest.raises(ConfigError, match="the units are patients, those of the calibration images"):
        check(detector, [replace(row, patient_id=str(k)) for k, row in enumerate(queries)])


def test_rates_are_called_in_report_and_summary(detector, folder, normals, queries, tmp_path):
    calibrate(detector, normals)
    sick = [replace(row, label=1) for row in drawn(folder / "sick", range(500, 508), anomalous=True)]
    summary = predict_to_folder(detector, [*queries, *sick], tmp_path / "out", alpha=0.05, fdr=0.25)
    known = [p.p_value for p in summary.predictions]
    assert [row["p_value"] for row in read_scores(tmp_path / "out/scores.csv")] == known
    assert [json.loads(line)["p_value"] for line in (tmp_path / "out/scores.jsonl").open()] == known
    rate, discovery = summary.calls
    assert [p <= 0.05 for p in known] == [p.score > rate.score for p in summary.predictions]
    assert {i for i, p in enumerate(known) if p <= discovery.p} == conformal.rejected(known, "0.25")
    html = summary.report.read_text()
    assert html.count('class="call">called at 5 % false-positive rate') == sum(p <= 0.05 for p in known) > 0
    assert f"{sum(p <= 0.05 for p in known)} of 12" in html
    assert html.count('<p class="score">score <b>') == html.count(" p <b>") == 12


def test_a_rate_that_cannot_be_asserted_is_refused_before_anything_is_written(detector, normals, queries, tmp_path):
    with pytest.raises(ConfigError, match="alpha: the model is not calibrated"):
        predict_to_folder(detector, queries, tmp_path / "out", alpha=0.5)
    calibrate(detector, normals[:8])
    for option in ("alpha", "fdr"):
        with pytest.raises(ConfigError, match=rf"{option}: 0\.05 needs .* 19 or more normal images, got 8.*0\.111"):
            predict_to_folder(detector, queries, tmp_path / "out", **{option: 0.05})
        with pytest.raises(ConfigError, match="expected a rate between 0 and 1"):
            predict_to_folder(detector, queries, tmp_path / "out", **{option: 5.0})
    detector.set_support(normals[:2])
    with pytest.raises(ConfigError, match="alpha: no p-values: calibrated with"):
        predict_to_folder(detector, queries, tmp_path / "out", alpha=0.2)
    assert not (tmp_path / "out").exists()


def test_patients_with_more_images_than_calibrated_ones_are_pointed_out(detector, folder, normals, tmp_path):
    calibrate(detector, [replace(row, patient_id=str(k)) for k, row in enumerate(normals)])
    rows = drawn(folder / "slices", range(300, 302), slices=3, patients=True)
    summary = predict_to_folder(detector, rows, tmp_path / "out", fdr=0.1, maps=False, overlays=False)
    assert any("2 patients or files have more images than the 1" in line for line in summary.remarks)
    one = predict_to_folder(detector, rows[:1], tmp_path / "one", maps=False, overlays=False)
    assert len(one.remarks) == 1


# The command


@pytest.fixture
def run(capsys):
    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def model(make_detector, tmp_path):
    make_detector("nearest").save(tmp_path / "model")
    return tmp_path / "model"


def test_eight_supports_say_what_they_cannot_say(run, model, folder, normals, tmp_path):
    command = ("--model", model, "--support", folder / "normals", "--shots", 8, "--task", "head_ct")
    code, out, _ = run("calibrate", *command)
    assert code == 0
    assert "Calibrated on 8 normal images of the support, each judged by the others; smallest possible 0.111." in out
    assert "5% false positives: cannot be asserted with 8; needs 19." in out
    assert "1% false positives: cannot be asserted with 8; needs 99." in out
    assert "20% false positives: score above" in out
    images = ("--images", folder / "queries", "--out", tmp_path / "out")
    code, _, err = run("predict", *command, *images, "--alpha", 0.05)
    assert (code, err.count("\n")) == (2, 1)
    assert "needs a calibration on 19 or more normal images, got 8" in err
    code, out, _ = run("predict", *command, *images, "--alpha", 0.2)
    assert code == 0
    assert "of 4 images called at 20 % false-positive rate (p <= 0.2)" in out


def test_calibrate_then_predict_from_a_saved_bank(run, model, folder, supports, normals, queries, tmp_path):
    (tmp_path / "more").mkdir()
    for row in normals:
        (tmp_path / "more" / row.path.name).write_bytes(row.path.read_bytes())
    (tmp_path / "more/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    bank = tmp_path / "bank.safetensors"
    words = ("--model", model, "--task", "head_ct")
    code, out, _ = run(
        "calibrate", *words, "--support", folder / "supports", "--normals", tmp_path / "more", "--save_bank", bank
    )
    assert code == 0
    assert out.count("left out: ") == 1
    assert "Calibrated on 19 normal images held out; smallest possible 0.05." in out
    assert "5% false positives: score above" in out
    assert "rate: 0.3% to 14.6%" in out
    code, out, _ = run("predict", *words, "--bank", bank, "--images", folder / "queries", "--out", tmp_path / "a")
    assert code == 0
    assert out.startswith("p-values: 19 normal images held out")
    with (tmp_path / "a/scores.csv").open() as file:
        assert all(0 < float(row["p_value"]) <= 1 for row in csv.DictReader(file))
    wrong = ("--support", folder / "queries", "--images", folder / "normals", "--out", tmp_path / "b")
    code, out, _ = run("predict", *words, *wrong)
    assert code == 0
    assert out.startswith("no p-values: calibrated with another support bank.")
    code, out, _ = run("calibrate", "--model", model, "--bank", bank, "--check", folder / "queries")
    assert code == 0
    assert out.startswith("4 new normals: ")
    assert "No difference found" in out


def test_of_a_data_set_the_validation_rows_count_and_training_rows_do_not(run, model, supports, normals, tmp_path):
    rows = [replace(row, split="val" if k < 6 else "train", label=0) for k, row in enumerate(normals)]
    write_csv(Manifest(tuple(rows), tmp_path), tmp_path / "all.csv")
    write_csv(Manifest(tuple(rows[6:]), tmp_path), tmp_path / "train.csv")
    words = ("--model", model, "--support", supports[0].path.parent, "--task", "head_ct", "--normals")
    assert "Calibrated on 6 normal images" in run("calibrate", *words, tmp_path / "all.csv")[1]
    assert "Calibrated on 13 normal images" in run("calibrate", *words, tmp_path / "train.csv")[1]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"training": {"tasks": ["head_ct"]}}))
    code, _, err = run("calibrate", *words, tmp_path / "train.csv")
    assert code == 2
    assert "rows of split train only, and the model learned this task" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--support a --bank b", "either --support (normal images) or --bank"),
        ("--bank b", "a bank holds no images to judge by one another"),
        ("--bank b --normals n --shots 3", "--bank has its own shots"),
        ("--support a --normals n --check n", "either --normals (to calibrate on) or --check"),
        ("", "nearest needs normal images to compare with"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(words, message, run, model):
    code, _, err = run("calibrate", "--model", model, *words.split())
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_method_without_support_needs_normals(run, make_detector, folder, normals, queries, tmp_path):
    make_detector("pdd").save(tmp_path / "model")
    words = ("calibrate", "--model", tmp_path / "model", "--task", "head_ct")
    assert "pdd has no support to calibrate on. Give --normals" in run(*words)[2]
    assert "compares with no support images" in run(*words, "--support", folder / "supports")[2]
    code, out, _ = run(*words, "--normals", folder / "normals")
    assert code == 0
    assert "Calibrated on 19 normal images held out" in out
    images = ("--images", folder / "queries", "--out", tmp_path / "out", "--task", "head_ct")
    assert run("predict", "--model", tmp_path / "model", *images)[1].startswith("p-values: 19 normal images")


def test_false_discovery_control_counts_a_patient_by_the_smallest_p_value(detector, folder, normals):
    from anatomaly.results.folder import _calls

    calibration, _ = calibrate(detector, [replace(row, patient_id=str(k)) for k, row in enumerate(normals)])
    rows = drawn(folder / "slices", range(300, 302), slices=2, patients=True)
    known = zip(detector.predict(rows), [0.05, 0.9, 0.1, 0.8], strict=True)
    found = [replace(prediction, p_value=p) for prediction, p in known]
    (call,) = _calls(found, calibration, None, 0.1, False)
    assert call.p == 0.1  # of two patients, with 0.05 and 0.1
