"""Edited models, banks and calibrations: everything they say is checked once, on loading, in one line."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from anatomaly.backbones.weights import state_digest
from anatomaly.detector.bank_file import save_bank
from anatomaly.detector.calibrate import calibrate
from anatomaly.detector.detector import Detector
from anatomaly.errors import AnatomalyError, NotReadyError, WeightsError


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_detector, phantom):
    """A calibrated bundle with its bank."""
    folder = tmp_path_factory.mktemp("made") / "model"
    detector = make_detector("nearest")
    detector.set_support(phantom.select(task="head_ct", split="train").samples[:3], task="head_ct")
    calibrate(detector, phantom.select(task="head_ct", split="test", label=0).samples)
    detector.save(folder)
    detector.save_support(folder / "bank")
    return folder


@pytest.fixture
def model(made, tmp_path):
    """A private copy."""
    return shutil.copytree(made, tmp_path / "model")


def refusal(model, kind=AnatomalyError):
    with pytest.raises(kind) as error:
        Detector.load(model, device="cpu").load_support(model / "bank")
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def edit(file, change):
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))


def edit_bank(model, change, *, forged=True):
    """Change the bank's facts and tensors; a forged one has no digest, as banks of before."""
    content = (model / "bank").read_bytes()
    size = int.from_bytes(content[:8], "little")
    facts = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["bank"])
    tensors = load(content)
    if forged:
        del facts["digest"]
    change(facts, tensors)
    (model / "bank").write_bytes(save(tensors, {"bank": json.dumps(facts)}))


def test_what_was_made_loads(model):
    Detector.load(model, device="cpu").load_support(model / "bank")
    edit_bank(model, lambda facts, tensors: None)
    Detector.load(model, device="cpu").load_support(model / "bank")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["scoring"].update(blur=1e300), "scoring.blur: got 1e+300, expected 0 to 90.5"),
        (lambda c: c["preprocessing"].update(size=[8192, 8192]), "preprocessing.size: got (8192, 8192)"),
        (lambda c: c["preprocessing"].update(size=[64.5, 64]), "preprocessing.size: got (64.5, 64)"),
        (lambda c: c["preprocessing"].update(size=[80, 64]), "got 80 x 64, expected multiples of 32"),
        (lambda c: c["teacher"].update(weights="/dev/zero"), "teacher.weights: got /dev/zero, expected auto, random"),
        (lambda c: c["teacher"].update(name="a\nb"), "teacher.name: got 'a\\nb'"),
        (lambda c: c["teacher"].update(hash=5), "teacher.hash: got 5"),
        (lambda c: c.update(global_teacher=c["teacher"]), "teachers: got 2, expected at most 1 of nearest"),
        (lambda c: c.update(weights_hash=7), "weights_hash: got 7"),
        (lambda c: c.update(map_ranges={"ct": [1, 0]}), "map_ranges.ct: got 1 to 0"),
        (lambda c: c.update(map_ranges={"ct": ["0", "1"]}), "map_ranges.ct: got 0 to 1, expected two numbers"),
        (lambda c: c.update(map_ranges={"ct": [0, 10**400]}), "not a model bundle"),
        (lambda c: c.update(training=[["tasks", 5]]), "training: got [['tasks', 5]]"),
        (lambda c: c.update(training={"tasks": 5}), "training.tasks: got 5, expected names"),
        (lambda c: c.update(training={"best_epoch": "x"}), "training.best_epoch: got x"),
        (lambda c: c.update(task_intensity={"a\nb": {"rule": "range", "low": 2, "high": 1}}), "task_intensity.a b"),
        (lambda c: c.update(format="1\n"), "not a model bundle"),
        (lambda c: c.update(format=True), "not a model bundle"),
    ],
)
def test_an_edited_config_is_refused(model, change, reason):
    edit(model / "config.json", change)
    assert reason in refusal(model)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"format": 1, "training": ' + "[" * 90 + "]" * 90])
@pytest.mark.parametrize("name", ["config.json", "calibration.json"])
def test_json_nested_too_deep_is_refused(model, name, text):
    (model / name).write_text(text)
    assert name in refusal(model, NotReadyError)


def test_facts_of_a_bank_that_are_nested_too_deep_are_refused(model):
    (model / "bank").write_bytes(save({"a": torch.zeros(1)}, {"bank": "[" * 100_000}))
    assert "not a support bank" in refusal(model, NotReadyError)


@pytest.mark.parametrize("name", ["config.json", "calibration.json", "weights.safetensors", "bank"])
@pytest.mark.parametrize("what", ["pipe", "device", "folder", "empty"])
def test_something_else_in_place_of_a_file_is_refused_and_never_opened(model, name, what):
    (model / name).unlink()
    if what == "pipe":
        os.mkfifo(model / name)
    elif what == "device":
        (model / name).symlink_to("/dev/zero")
    elif what == "folder":
        (model / name).mkdir()
    else:
        (model / name).touch()
    refusal(model)


@pytest.mark.parametrize(
    "change",
    [
        {"scores": [10**400]},
        {"scores": ["0.5"]},
        {"scores": [True]},
        {"images": [0]},
        {"kind": "guessed"},
        {"unit": 5},
        {"task": 5},
        {"model_hash": None},
        {"sha256": [5]},
        {"scoring": {"blur": 1e300, "pooling": "max", "top_fraction": 0.01}},
    ],
    ids=str,
)
def test_a_calibration_whose_digest_was_made_to_fit_is_refused(model, change):
    from anatomaly.detector.bundle import digest_of

    facts = json.loads((model / "calibration.json").read_text())
    entry = {key: value for key, value in facts["calibrations"][0].items() if key != "digest"}
    entry |= {"scores": entry["scores"][:1], "images": entry["images"][:1], **change}
    facts["calibrations"] = [{**entry, "digest": digest_of(entry)}]
    (model / "calibration.json").write_text(json.dumps(facts))
    assert "calibration.json: damaged or changed" in refusal(model, NotReadyError)


def spoiled(value):
    def change(facts, tensors):
        tensors["patches_0"].view(-1)[3] = value

    return change


def fewer(facts, tensors):
    tensors["patches_1"] = tensors["patches_1"][:2].contiguous()


def none(facts, tensors):
    facts |= {"names": [], "sha256": []}
    tensors |= {name: tensor[:0] for name, tensor in tensors.items()}


def turned(facts, tensors):
    tensors["patches_1"] = tensors["patches_1"].movedim(1, -1).contiguous()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoiled(float("nan")), "patches_0 holds numbers that are not finite"),
        (fewer, "tensors: got 2 and 3 images, expected 3"),
        (none, "names: got 0 images, expected at least 1"),
        (turned, "patches_1 is (3, 8, 8, 40), expected (3, 40, 8, 8)"),
        (lambda f, t: t.update(patches_0=t["patches_0"].to(torch.int8)), "patches_0 is of type torch.int8"),
        (lambda f, t: t.update(patches_0=t["patches_0"].bfloat16()), "patches_0 is of type torch.bfloat16"),
        (lambda f, t: t.__delitem__("patches_2"), "'patches_0, patches_1', expected patches_0, patches_1, patches_2"),
        (lambda f, t: t.update(more=torch.zeros(3)), "expected patches_0, patches_1, patches_2"),
        (lambda f, t: f.update(names=f["names"][:2]), "digests, expected 2"),
        (lambda f, t: f.update(names=[1, 2, 3]), "names: got other values"),
        (lambda f, t: f.update(sha256=[1, 2, 3]), "sha256: got other values"),
        (lambda f, t: f.update(sha256=f["sha256"][:2]), "sha256: got 2 digests, expected 3"),
        (lambda f, t: f.update(map_range=[1, 0]), "map_range: got 1 to 0"),
        (lambda f, t: f.update(normal_scores=[0.5]), "normal_scores: got 1 values, expected 3 numbers"),
        (lambda f, t: f.update(normal_scores=[0.5, 1.0, None]), "normal_scores: got 3 values, expected 3 numbers"),
        (lambda f, t: f.update(map_range=["0", "1"]), "map_range: got 0 to 1"),
        (lambda f, t: f.update(model_hash=5), "model_hash: got 5"),
        (lambda f, t: f.update(model_hash="a\nb"), "model_hash: got 'a\\nb'"),
        (lambda f, t: f.update(task=None), "task: got None"),
        (lambda f, t: f.update(precision="fp8"), "precision: got fp8"),
        (lambda f, t: f["preprocessing"].update(size=[64.0, 64]), "preprocessing.size"),
        (lambda f, t: f["preprocessing"]["intensity"].update(rule="percentile", high=99), "a fixed rule"),
    ],
)
def test_a_bank_that_does_not_fit_is_refused(model, change, reason):
    edit_bank(model, change)
    assert reason in refusal(model, NotReadyError)


@pytest.mark.parametrize(
    "change",
    [
        spoiled(0.5),
        lambda f, t: f["preprocessing"]["intensity"].update(rule="range", low=0.0, high=99.0),
        lambda f, t: f.update(sha256=f["sha256"][::-1]),
        lambda f, t: f.update(map_range=[0.0, 9.0]),
        lambda f, t: f.update(normal_scores=[0.0, 9.0, 9.0]),
        lambda f, t: f.update(digest=5),
    ],
)
def test_a_bank_whose_content_was_changed_is_refused(model, change):
    edit_bank(model, change, forged=False)
    assert "was changed (digest: got" in refusal(model, NotReadyError)


def test_a_bank_of_bf16_loads(make_detector, phantom, tmp_path):
    for name in ("nearest", "d24fad", "attention"):
        detector = make_detector(name)
        detector.precision = "bf16"
        detector.set_support(phantom.select(task="head_ct", split="train").samples[:2]).save_support(tmp_path / "bank")
        make_detector(name).load_support(tmp_path / "bank")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_weights_that_give_no_numbers_are_refused(make_detector, tmp_path, value):
    """Though config.json names their digest."""
    make_detector("d24fad").save(tmp_path)
    state = load((tmp_path / "weights.safetensors").read_bytes())
    for name, tensor in state.items():
        if name.endswith(("bn3.bias", "conv3.weight")):
            tensor.fill_(value)
    (tmp_path / "weights.safetensors").write_bytes(save(state))
    edit(tmp_path / "config.json", lambda facts: facts.update(weights_hash=state_digest(state)))
    with pytest.raises(WeightsError, match=r"hold NaN or infinity|maps that are not finite"):
        Detector.load(tmp_path, device="cpu")


def test_a_bank_is_as_it_was_after_a_round_trip(made, tmp_path):
    detector = Detector.load(made, device="cpu").load_support(made / "bank")
    save_bank(detector.bank, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (made / "bank").read_bytes()


# A short run of benchmarks/fuzz_models.py


@pytest.fixture
def fuzz_models(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "fuzz_models", raising=False)
    import fuzz_models

    return fuzz_models


def test_forty_edits_are_refused_or_change_nothing(fuzz_models, tmp_path):
    world = fuzz_models.make_world(tmp_path, names=("nearest", "d24fad"))
    results = {}
    for number in range(40):
        edit_ = fuzz_models.make_edit(world, 0, number)
        results[number] = (*fuzz_models.outcome(world, edit_), edit_["what"])
    assert not [each for each in results.values() if each[0] in fuzz_models.FAILURES]
    found = [each[0] for each in results.values()]
    assert found.count("refused") > 25
    assert "same" in found


def test_the_fuzzer_notices_tracebacks_and_scores_that_change(fuzz_models, tmp_path, monkeypatch):
    world = fuzz_models.make_world(tmp_path, names=("nearest",))
    edit_ = {"folder": tmp_path / "nearest", "method": "nearest", "may_change": False, "what": "nothing"}
    assert fuzz_models.outcome(world, edit_)[0] == "same"
    world["expected"]["nearest"] = [(score + 1e-3, p) for score, p in world["expected"]["nearest"]]
    assert fuzz_models.outcome(world, edit_)[0] == "silent"
    monkeypatch.setattr(fuzz_models, "judge", lambda *given: 1 / 0)
    assert fuzz_models.outcome(world, edit_)[0] == "traceback"
