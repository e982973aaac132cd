"""The detector: supports and their banks, files in and predictions out, and official checkpoints."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_io import Golden, uniform
from PIL import Image as Pillow

from anatomaly.data.manifest import Manifest
from anatomaly.data.origin import MISLEAD
from anatomaly.detector.bundle import BUILT_IN
from anatomaly.detector.detector import Detector
from anatomaly.detector.official import import_checkpoint
from anatomaly.errors import ConfigError, NotReadyError, ReadError, WeightsError
from anatomaly.methods import METHODS
from anatomaly.presets import load_preset
from anatomaly.scoring import compare_tensor, encode_tensor, leave_one_out, predict_tensor, scale_from_normals
from anatomaly.training.fit import fit
from anatomaly.types import Intensity, Preprocessing, Sample, Scoring

GOLDEN = Path(__file__).parents[1] / "golden"

FEW_SHOT = [name for name, method in METHODS.items() if method.few_shot]
#: Comparisons of a query by methods that say what each support counted.
WEIGHTED = {"attention": 7, "d24fad": 3, "nearest": 3}


@pytest.fixture
def detector(make_detector):
    return make_detector()


@pytest.fixture(scope="module")
def supports(phantom):
    return phantom.select(task="head_ct", split="train").samples[:4]


@pytest.fixture(scope="module")
def tests(phantom):
    return phantom.select(task="head_ct", split="test").samples


def write_grey(path, pixels):
    Pillow.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width))


def scores(detector, items, **options):
    return [prediction.score for prediction in detector.predict(items, **options)]


# Supports


def test_predict_needs_a_support(detector, tests):
    with pytest.raises(NotReadyError, match="set_support"):
        next(detector.predict(tests))
    with pytest.raises(NotReadyError, match="set_support"):
        detector.save_support("never written")


def test_a_support_needs_an_image(detector):
    with pytest.raises(ConfigError, match="got no images, expected at least 1"):
        detector.set_support([])
    assert detector.bank is None


def test_the_same_image_twice_is_refused_whatever_the_file_is_called(detector, supports, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(supports[0].path.read_bytes())
    for twice in ([supports[0], supports[1], supports[0]], [supports[0].path, copy]):
        with pytest.raises(ConfigError, match="is given twice"):
            detector.set_support(twice)


def test_supports_that_show_nothing_are_told_or_refused(make_detector, tmp_path, caplog):
    deep = [noise(seed, 40, 40).astype(np.uint16) * 16 for seed in range(3)]
    for number, pixels in enumerate(deep):
        Pillow.fromarray(pixels).save(tmp_path / f"{number}.png")
    supports, query = [tmp_path / f"{number}.png" for number in range(2)], tmp_path / "2.png"
    detector = make_detector("nearest").set_support(supports, task="twelve bits in sixteen")
    assert "Give --intensity range:0..4095," in caplog.text
    assert "hardly any contrast" in next(detector.predict([query])).note
    caplog.clear()
    detector.set_support(supports, task="twelve bits in sixteen", intensity=Intensity("range", 0, 4095))
    assert caplog.text == ""
    assert next(detector.predict([query])).note is None
    eight = write_grey(tmp_path / "eight.png", noise(5, 40, 40))
    assert "another value range" in next(detector.predict([eight])).note
    blank = [write_grey(tmp_path / f"blank{grey}.png", np.full((9, 9), grey)) for grey in (3, 4)]
    with pytest.raises(ConfigError, match="one value for all pixels of all 2 images"):
        detector.set_support(blank)


def test_a_query_from_elsewhere_carries_a_note_with_a_saved_bank_too(make_detector, supports, tests, tmp_path):
    detector = make_detector("nearest").set_support(supports)
    colour = tmp_path / "colour.png"
    Pillow.fromarray(noise(0, 40, 120).astype(np.uint8).reshape(40, 40, 3)).save(colour)
    told = [each.note for each in detector.predict([tests[0], colour])]
    assert told == [None, f"in colour where the support images are grey, {MISLEAD}"]
    detector.save_support(tmp_path / "bank")
    detector.load_support(tmp_path / "bank")
    assert [each.note for each in detector.predict([tests[0], colour])] == told
    detector.bank = replace(detector.bank, origins=())  # a bank of before
    assert next(detector.predict([colour])).note is None


def test_an_unreadable_support_is_refused(detector, supports, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(supports[0].path.read_bytes()[:200])
    with pytest.raises(ReadError, match=r"broken\.png"):
        detector.set_support([supports[1], broken])


def test_a_refused_support_leaves_the_one_before_in_place(detector, supports):
    bank = detector.set_support(supports).bank
    with pytest.raises(ConfigError):
        detector.set_support([])
    assert detector.bank is bank


@pytest.mark.parametrize("name", FEW_SHOT)
def test_one_support_is_enough(name, make_detector, supports, tests):
    detector = make_detector(name).set_support(supports[:1], task="head_ct")
    assert detector.bank.shots == 1
    low, high = detector.bank.map_range
    assert low < high
    for prediction in detector.predict(tests):
        assert np.isfinite(prediction.score)
        if prediction.support_weights is not None:
            np.testing.assert_allclose(prediction.support_weights, 1.0, atol=1e-6)


@pytest.mark.parametrize("name", WEIGHTED)
def test_support_weights_sum_to_one_at_every_level(name, make_detector, supports, tests):
    for prediction in make_detector(name).set_support(supports).predict(tests):
        assert prediction.support_weights.shape == (WEIGHTED[name], 4)
        assert prediction.support_weights.min() >= 0
        np.testing.assert_allclose(prediction.support_weights.sum(axis=1), 1.0, atol=1e-6)


def test_a_support_asked_about_itself_finds_itself(make_detector, supports):
    detector = make_detector("nearest").set_support(supports)
    for k, prediction in enumerate(detector.predict(supports)):
        np.testing.assert_allclose(prediction.anomaly_map, 0.0, atol=1e-5)
        assert prediction.support_weights.mean(axis=0).argmax() == k


@pytest.mark.parametrize("name", FEW_SHOT)
def test_leave_one_out_judges_each_support_by_the_others(name, make_detector, supports):
    detector = make_detector(name).set_support(supports)
    method, scoring = detector.method, Scoring(blur=1.0)
    inputs = torch.rand(4, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        encoded = encode_tensor(method, inputs)
        support = method.embed_support(method.extract(inputs))
        maps, judged, _ = leave_one_out(method, encoded, support, size=(64, 96), scoring=scoring)
        assert maps.shape == (4, 64, 96)
        assert judged.shape == (4,)
        for k in range(4):
            others = method.embed_support(method.extract(inputs[[i for i in range(4) if i != k]]))
            expected = predict_tensor(method, inputs[k : k + 1], others, scoring=scoring)
            torch.testing.assert_close(maps[k], expected.maps[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(judged[k], expected.scores[0], rtol=0, atol=1e-5)


def test_colour_scale_and_yardstick_come_from_the_supports_judged_by_each_other(detector, supports):
    supports = [replace(row, patient_id=str(k)) for k, row in enumerate(supports)]
    bank = detector.set_support(supports).bank
    maps, judged = [], []
    for k in range(4):
        others = detector.make_bank(supports[:k] + supports[k + 1 :])
        detector.bank = others
        prediction = next(detector.predict(supports[k : k + 1]))
        maps.append(prediction.anomaly_map)
        judged.append(prediction.score)
    np.testing.assert_allclose(bank.map_range, scale_from_normals(maps), rtol=1e-4)
    np.testing.assert_allclose(bank.normal_scores, judged, rtol=1e-5)


def test_supports_are_judged_by_those_of_other_patients(make_detector, supports):
    detector = make_detector("nearest")
    rows = [replace(row, patient_id=patient) for row, patient in zip(supports, "abba", strict=True)]
    bank = detector.make_bank(rows)
    assert bank.patients == (0, 1, 1, 0)
    weights = np.zeros((4, 4))
    for k, others in enumerate(((1, 2), (0, 3), (0, 3), (1, 2))):
        detector.set_support([rows[i] for i in others])
        prediction = next(detector.predict(rows[k : k + 1]))
        assert bank.normal_scores[k] == pytest.approx(prediction.score, rel=1e-5)
        weights[k, others] = prediction.support_weights.mean(axis=0)
    assert bank.attention_shares == pytest.approx(weights.mean(axis=0), abs=1e-5)
    assert sum(bank.attention_shares) == pytest.approx(1)


def test_a_lone_support_has_no_yardstick(detector, supports):
    assert detector.set_support(supports[:1]).bank.normal_scores == ()


def test_a_folder_stands_for_its_images(detector, supports, tmp_path):
    for k, sample in enumerate(supports):
        (tmp_path / f"{k}.png").write_bytes(sample.path.read_bytes())
    (tmp_path / "notes.txt").write_text("no image")
    detector.set_support(tmp_path)
    assert detector.bank.names == ("0.png", "1.png", "2.png", "3.png")
    assert [each.sample.name for each in detector.predict(str(tmp_path))] == list(detector.bank.names)


# The built-in model


def test_the_built_in_model_is_the_default_preset_untrained(supports, tmp_path):
    built_in = Detector.default(device="cpu")
    config = load_preset()
    assert built_in.facts.method == config.method
    assert not METHODS[config.method.name].trained
    assert (built_in.preprocessing, built_in.scoring) == (config.preprocessing, config.scoring)
    assert (built_in.facts.training, built_in.calibrations, built_in.task_intensity) == ({}, (), {})
    manifest = Manifest(tuple(supports), tmp_path)
    fitted = fit(manifest, tmp_path / "model")
    assert fitted.model_hash == built_in.model_hash
    made, shipped = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "model", BUILT_IN))
    assert made.pop("versions").keys() == shipped.pop("versions").keys()
    assert made == shipped


def test_the_built_in_model_is_small_and_tells_what_it_is():
    assert sum(file.stat().st_size for file in BUILT_IN.iterdir()) < 10_000
    card = (BUILT_IN / "README.md").read_text()
    assert {"Learned from", "Made by", "Teacher"} <= set(re.findall(r"\*\*(.*?):\*\*", card))


# Banks


def test_a_saved_bank_gives_the_same_scores(detector, make_detector, supports, tests, tmp_path):
    expected = scores(detector.set_support(supports, task="head_ct"), tests)
    detector.save_support(tmp_path / "bank.safetensors")
    other = make_detector().load_support(tmp_path / "bank.safetensors")
    assert scores(other, tests) == expected
    assert other.bank.task == "head_ct"
    assert other.bank.names == tuple(sample.name for sample in supports)
    assert other.bank.map_range == detector.bank.map_range


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"seed": 1}, "made with model"),
        ({"name": "nearest"}, "made with model"),
        ({"size": (64, 96)}, r"made at \(64, 64\)"),
        ({"resize": "pad"}, r"\(squash\), this model works at \(64, 64\) \(pad\)"),
        ({"interpolation": "bilinear"}, "Encode the supports again"),
    ],
    ids=str,
)
def test_a_bank_of_another_model_or_geometry_is_refused(detector, make_detector, supports, tmp_path, other, reason):
    detector.set_support(supports).save_support(tmp_path / "bank.safetensors")
    stranger = make_detector(**other)
    with pytest.raises(NotReadyError, match=reason):
        stranger.load_support(tmp_path / "bank.safetensors")
    assert stranger.bank is None


def test_a_bank_of_another_teacher_is_refused(detector, make_detector, supports):
    from anatomaly.backbones import build_backbone

    bank = detector.make_bank(supports[:1])
    for changes in ({"weights": "random"}, {"normalise": False}):
        with pytest.raises(NotReadyError, match="made with model"):
            make_detector("d24fad", teacher=build_backbone("efficientnet_lite0", **changes)).accept(bank)


def test_a_bank_of_another_intensity_rule_is_accepted_and_its_rule_is_used(detector, make_detector, supports, tests):
    bank = detector.make_bank(supports, intensity=Intensity("range", 0.0, 128.0))
    other = make_detector(intensity=Intensity("window", 100.0, 50.0))
    other.bank = other.accept(bank)
    prediction = next(other.predict(tests))
    stored = np.asarray(Pillow.open(tests[0].path), np.float32)
    np.testing.assert_allclose(prediction.image[0], np.minimum(stored / 128, 1.0), atol=1e-6)


def test_a_percentile_rule_is_fixed_on_the_supports_and_kept_in_the_bank(make_detector, supports, tests, tmp_path):
    detector = make_detector(intensity=Intensity("percentile", 1.0, 90.0))
    rule = detector.set_support(supports).bank.preprocessing.intensity
    pixels = np.concatenate([np.asarray(Pillow.open(sample.path)).ravel() for sample in supports])
    assert (rule.rule, rule.low, rule.high) == ("range", *np.percentile(pixels.astype(np.float32), [1, 90]))
    assert detector.preprocessing.intensity.rule == "percentile", "the model's own rule stays as it is"
    expected = scores(detector, tests)
    assert scores(detector, tests[::-1]) == pytest.approx(expected[::-1], abs=1e-6)  # queries do not move the rule
    detector.save_support(tmp_path / "bank.safetensors")
    loaded = make_detector(intensity=Intensity("percentile", 1.0, 90.0)).load_support(tmp_path / "bank.safetensors")
    assert loaded.bank.preprocessing.intensity == rule
    assert scores(loaded, tests) == expected


def test_a_task_brings_its_own_intensity_rule_unless_one_is_given(make_detector, supports):
    own = Intensity("range", 0.0, 200.0)
    detector = make_detector(task_intensity={"head_ct": own})
    assert detector.make_bank(supports[:1], task="head_ct").preprocessing.intensity == own
    assert detector.make_bank(supports[:1], task="unknown").preprocessing.intensity == Intensity()
    given = Intensity("window", 50.0, 80.0)
    assert detector.make_bank(supports[:1], task="head_ct", intensity=given).preprocessing.intensity == given


def test_a_method_without_support_says_so_when_given_a_bank(detector, make_detector, supports, tmp_path):
    detector.set_support(supports[:1]).save_support(tmp_path / "bank.safetensors")
    with pytest.raises(ConfigError, match="pdd learned what is normal in training and compares with no support"):
        make_detector("pdd").load_support(tmp_path / "bank.safetensors")


# Files in, predictions out


def test_a_corrupt_file_among_good_ones_has_its_own_row_in_its_place(detector, supports, tests, tmp_path):
    detector.set_support(supports)
    broken, missing, text = tmp_path / "broken.png", tmp_path / "missing.png", tmp_path / "text.dcm"
    broken.write_bytes(tests[0].path.read_bytes()[:100])
    text.write_text("no image")
    items = [tests[0].path, broken, tests[1].path, missing, tests[2].path, text]
    for batch_size in (1, 2, 16):
        predictions = list(detector.predict(items, batch_size=batch_size))
        assert [prediction.sample.path for prediction in predictions] == items
        for bad, prediction in zip([False, True] * 3, predictions, strict=True):
            assert (prediction.error is not None) == np.isnan(prediction.score) == bad
            assert (prediction.anomaly_map is None) == (prediction.image is None) == bad
        for path, prediction in zip(items[1::2], predictions[1::2], strict=True):
            assert path.name in prediction.error
            assert "\n" not in prediction.error
        good = [prediction.score for prediction in predictions[::2]]
        assert good == pytest.approx(scores(detector, tests[:3]), abs=1e-6)


def test_a_run_of_unreadable_files_only_ends_well(detector, supports, tmp_path):
    detector.set_support(supports[:1])
    predictions = list(detector.predict([tmp_path / f"{n}.png" for n in range(5)], batch_size=2))
    assert len(predictions) == 5
    assert all(prediction.error for prediction in predictions)
    assert list(detector.predict([])) == []


def test_a_query_that_is_a_support_is_scored_and_marked(detector, supports, tests):
    first, second = detector.set_support(supports).predict([supports[1], tests[0]])
    assert first.note == "one of the support images: compared with itself"
    assert np.isfinite(first.score)
    assert second.note is None
    assert first.sha256 == detector.bank.sha256[1]


def test_what_the_reader_did_to_an_image_is_noted_with_its_verdict(detector, supports, tmp_path):
    import tifffile

    pixels = noise(3, 40, 40).astype(np.float32)
    pixels[:5] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    detector.set_support([tmp_path / "a.tif", supports[0]], intensity=Intensity("range", 0, 255))
    whole, holed = detector.predict([supports[1], tmp_path / "a.tif"])
    assert whole.note is None
    assert holed.note == (
        "its NaN pixels were taken as the lowest value, infinite ones as the nearest; "
        "one of the support images: compared with itself"
    )
    assert np.isfinite(holed.score)


def test_rows_keep_what_the_manifest_says_and_paths_get_the_task(detector, supports, tests):
    detector.set_support(supports[:1])
    assert [prediction.sample for prediction in detector.predict(tests)] == list(tests)
    (prediction,) = detector.predict([str(tests[0].path)], task="mine")
    assert prediction.sample == Sample(tests[0].path, "mine")


def test_each_page_of_a_file_is_an_image(detector, supports, tmp_path):
    pages = [Pillow.fromarray(noise(seed, 30, 40).astype(np.uint8)) for seed in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    predictions = list(detector.set_support(supports[:1]).predict([tmp_path / "stack.tif"]))
    assert [prediction.sample.frame for prediction in predictions] == [0, 1, 2]
    for page, prediction in zip(pages, predictions, strict=True):
        np.testing.assert_allclose(prediction.image[0], np.asarray(page) / 255, atol=1e-6)
    bank = detector.make_bank([tmp_path / "stack.tif"])
    assert bank.names == ("stack.tif#0", "stack.tif#1", "stack.tif#2")


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("size", [(40, 100), (150, 64), (9, 200)])
def test_a_map_has_the_size_of_its_source(make_detector, supports, tmp_path, resize, size):
    detector = make_detector(size=(64, 96), resize=resize).set_support(supports[:2])
    (prediction,) = detector.predict([write_grey(tmp_path / "wide.png", noise(1, *size))])
    assert prediction.anomaly_map.shape == size
    assert prediction.anomaly_map.dtype == np.float32
    assert prediction.image.shape == (1, *size)


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_a_map_points_at_the_place_in_the_source(make_detector, tmp_path, resize):
    plain = np.full((60, 160), 90) + noise(2, 60, 160) // 16
    marked = plain.copy()
    marked[36:52, 20:44] = 255 * (np.indices((16, 24)).sum(axis=0) // 4 % 2)
    detector = make_detector("nearest", size=(64, 160), resize=resize, scoring=Scoring(blur=2.0))
    detector.set_support([write_grey(tmp_path / "plain.png", plain)])
    (prediction,) = detector.predict([write_grey(tmp_path / "marked.png", marked)])
    row, column = np.unravel_index(prediction.anomaly_map.argmax(), (60, 160))
    assert 28 <= row <= 59
    assert 12 <= column <= 52


def test_seconds_are_those_of_the_images_share(detector, supports, tests):
    predictions = list(detector.set_support(supports[:1]).predict(tests, batch_size=4))
    assert all(prediction.seconds > 0 for prediction in predictions)
    assert len({prediction.seconds for prediction in predictions[:4]}) == 1


def test_bf16_stays_close_and_still_gives_float32(detector, make_detector, supports, tests):
    expected = scores(detector.set_support(supports[:2]), tests)
    half = make_detector()
    half.precision = "bf16"
    predictions = list(half.set_support(supports[:2]).predict(tests))
    got = [prediction.score for prediction in predictions]
    assert got != expected
    inputs = [np.zeros((3, 64, 64), np.float32)]
    assert {level.dtype for level in half.encode(inputs)} == {torch.bfloat16}
    assert {level.dtype for level in detector.encode(inputs)} == {torch.float32}
    assert got == pytest.approx(expected, rel=0.2)
    assert all(prediction.anomaly_map.dtype == np.float32 for prediction in predictions)


def test_the_tensors_of_a_call_do_not_change(detector):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        bank = detector.method.embed_support(detector.method.extract(images))
        encoded = encode_tensor(detector.method, images)
    before = [images.clone(), *(tensor.clone() for tensor in (*bank.values(), *encoded))]
    compare_tensor(detector.method, encoded, bank, size=(64, 64), scoring=Scoring())
    predict_tensor(detector.method, images, bank, scoring=Scoring())
    for was, now in zip(before, [images, *bank.values(), *encoded], strict=True):
        assert torch.equal(was, now)


# Official checkpoints


@pytest.fixture(scope="module")
def imported(golden_files, tmp_path_factory):
    """The golden checkpoint imported, and the same once more from the bundle it was saved to."""
    detector = import_checkpoint(
        golden_files["eval"], "d24fad", teacher_weights=str(golden_files["teacher"]), device="cpu"
    )
    folder = tmp_path_factory.mktemp("imported") / "bundle"
    detector.save(folder)
    return detector, Detector.load(folder, device="cpu"), folder


def test_an_imported_checkpoint_has_the_settings_of_the_release(imported):
    for detector in imported[:2]:
        assert detector.preprocessing == Preprocessing((128, 128), "squash", "lanczos", Intensity("auto"))
        assert detector.scoring == Scoring(blur=4.0, pooling="max")
        assert detector.method.teachers["teacher"].normalise is False
        assert not detector.method.training


def test_an_imported_checkpoint_gives_the_releases_numbers_also_from_its_bundle(imported):
    queries = torch.from_numpy(uniform("d24fad.query", (2, 3, 128, 128)))
    supports = torch.from_numpy(uniform("d24fad.support", (3, 3, 128, 128)))
    golden = Golden(f"{GOLDEN}/d24fad_eval.npz")
    found = []
    for detector in imported[:2]:
        with torch.inference_mode():
            bank = detector.method.embed_support(detector.method.extract(supports))
        found.append(predict_tensor(detector.method, queries, bank, scoring=detector.scoring))
    assert golden.compare("map_gauss_per_image", found[0].maps)["rel_l2"] <= 1e-3
    assert golden.compare("score_gauss_max", found[0].scores)["rel_l2"] <= 1e-3
    assert torch.equal(found[0].maps, found[1].maps)
    assert torch.equal(found[0].scores, found[1].scores)


def test_the_bank_of_an_imported_checkpoint_fits_its_bundle(imported, supports, tmp_path):
    detector, loaded, _ = imported
    detector.set_support(supports[:1]).save_support(tmp_path / "bank.safetensors")
    loaded.load_support(tmp_path / "bank.safetensors")


def test_the_bundle_of_an_imported_checkpoint_names_no_file_of_the_user(imported, golden_files):
    _, _, folder = imported
    text = (folder / "config.json").read_text()
    assert str(golden_files["teacher"].parent) not in text
    assert golden_files["eval"].name not in text


def test_what_is_no_checkpoint_is_refused(golden_files, tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        import_checkpoint(tmp_path / "none.pth", "d24fad")
    with pytest.raises(WeightsError, match="expected a state dict under 'decoder'"):
        import_checkpoint(golden_files["teacher"], "d24fad", teacher_weights="random")
