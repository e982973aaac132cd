"""What stands on disk: bundles and banks come back as they were, and nothing else is taken for one."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anatomaly.backbones import build_backbone
from anatomaly.backbones.weights import state_digest
from anatomaly.config import MethodConfig
from anatomaly.detector.bank_file import load_bank, save_bank
from anatomaly.detector.detector import Detector
from anatomaly.detector.facts import ModelFacts
from anatomaly.errors import NotReadyError, OutputError, WeightsError
from anatomaly.methods import METHODS, build_method
from anatomaly.methods.settings import AttentionSettings
from anatomaly.types import Intensity, Origin, Preprocessing, Scoring, SupportBank

OWN_FILE = "Smith_Jane_teacher.pth"


@pytest.fixture(scope="module")
def own_teacher(tmp_path_factory, lite0):
    """A teacher of the user's own: lite0's weights, one of them changed, in a file with a telling name."""
    file = tmp_path_factory.mktemp("weights") / OWN_FILE
    state = {key: value.clone() for key, value in lite0.body.state_dict().items()}
    next(iter(state.values())).mul_(1.5)
    torch.save(state, file)
    return build_backbone("efficientnet_lite0", weights=str(file))


@pytest.fixture(scope="module")
def own_bundle(tmp_path_factory, make_detector, own_teacher):
    """A bundle that carries its teacher, and the detector it was made from."""
    detector = make_detector(teacher=own_teacher, scoring=Scoring(blur=2.0, pooling="mean"), resize="pad")
    folder = tmp_path_factory.mktemp("own") / "bundle"
    detector.save(folder)
    return folder, detector


@pytest.fixture
def bundle(tmp_path, saved):
    """A private copy of a plain bundle, to be damaged."""
    return shutil.copytree(saved, tmp_path / "bundle")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_detector):
    folder = tmp_path_factory.mktemp("plain") / "bundle"
    make_detector().save(folder)
    return folder


def rows(phantom, split, label=0):
    return phantom.select(task="head_ct", split=split, label=label).samples


def judge(detector, phantom):
    detector.set_support(rows(phantom, "train")[:3], task="head_ct")
    return list(detector.predict(rows(phantom, "test", label=1)))


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["d24fad", "nearest"])
def test_a_loaded_bundle_gives_the_same_maps_scores_and_settings(name, tmp_path, make_detector, phantom):
    detector = make_detector(
        name,
        seed=7,
        scoring=Scoring(blur=1.5, pooling="topk", top_fraction=0.2),
        task_intensity={"head_ct": Intensity("range", 5.0, 250.0), "xray": Intensity("window", 40.0, 80.0)},
        size=(64, 96),
        resize="pad",
        interpolation="bilinear",
    )
    detector.save(tmp_path / "bundle")
    loaded = Detector.load(tmp_path / "bundle", device="cpu")
    for attribute in ("preprocessing", "scoring", "task_intensity", "facts", "model_hash"):
        assert getattr(loaded, attribute) == getattr(detector, attribute), attribute
    for expected, got in zip(judge(detector, phantom), judge(loaded, phantom), strict=True):
        assert got.score == expected.score
        np.testing.assert_array_equal(got.anomaly_map, expected.anomaly_map)


def test_a_bundle_holds_json_and_safetensors_only(own_bundle):
    folder, _ = own_bundle
    files = sorted(folder.rglob("*"))
    assert [file.name for file in files] == ["config.json", "teacher.safetensors", "weights.safetensors"]
    json.loads(files[0].read_text())
    for file in files[1:]:
        size = int.from_bytes(file.read_bytes()[:8], "little")  # safetensors: length of a JSON header, then the header
        assert isinstance(json.loads(file.read_bytes()[8 : 8 + size]), dict)


def test_a_bundle_does_not_name_the_users_teacher_file(own_bundle, own_teacher):
    folder, detector = own_bundle
    assert own_teacher.weights.endswith(OWN_FILE)
    assert json.loads((folder / "config.json").read_text())["teacher"]["weights"] == "file"
    for file in folder.iterdir():
        assert b"Smith" not in file.read_bytes(), file.name
    assert "Smith" not in repr(detector.facts)


def test_a_teacher_from_a_file_is_found_in_the_bundle_without_that_file(own_bundle, own_teacher, tmp_path, phantom):
    folder, detector = own_bundle
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    loaded = Detector.load(moved, device="cpu")
    assert loaded.method.teachers["teacher"].weights_hash == own_teacher.weights_hash
    scores = [[p.score for p in judge(each, phantom)] for each in (detector, loaded)]
    assert scores[0] == scores[1]
    again = tmp_path / "again"
    loaded.save(again)  # a copy of a copy is still complete
    assert (again / "teacher.safetensors").read_bytes() == (folder / "teacher.safetensors").read_bytes()
    assert str(moved).encode() not in (again / "config.json").read_bytes()


def test_a_bundle_saved_over_one_with_a_teacher_does_not_keep_that_teacher(own_bundle, tmp_path, make_detector):
    folder = shutil.copytree(own_bundle[0], tmp_path / "bundle")
    detector = make_detector()
    detector.save(folder)
    assert Detector.load(folder, device="cpu").model_hash == detector.model_hash


def test_another_teacher_is_refused(bundle, own_teacher, lite0):
    with pytest.raises(WeightsError, match=f"{lite0.weights_hash[:12]}.*{own_teacher.weights_hash[:12]}"):
        Detector.load(bundle, teacher_weights=own_teacher.weights)


def test_a_damaged_teacher_in_the_bundle_is_refused(own_bundle, tmp_path):
    folder = shutil.copytree(own_bundle[0], tmp_path / "bundle")
    state = load_file(folder / "teacher.safetensors")
    state["conv_stem.weight"][0] += 1e-3
    save_file(state, folder / "teacher.safetensors")
    with pytest.raises(WeightsError, match="trained with efficientnet_lite0 weights"):
        Detector.load(folder)


def test_weights_of_another_run_are_refused(bundle, tmp_path, make_detector):
    make_detector(seed=1).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "weights.safetensors", bundle)
    with pytest.raises(WeightsError, match="not from the same run"):
        Detector.load(bundle)


def test_weights_that_are_missing_truncated_or_of_another_model_are_refused(bundle, lite0):
    file = bundle / "weights.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="missing or damaged"):
        Detector.load(bundle)
    file.unlink()
    with pytest.raises(WeightsError, match="missing or damaged"):
        Detector.load(bundle)
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match="keys do not fit"):
        Detector.load(bundle)


def test_a_folder_without_a_config_is_not_a_bundle(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(NotReadyError, match="not a model bundle"):
            Detector.load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", '"x"', "{}", '{"format": 1}', "\xff"])
def test_a_damaged_config_is_not_a_bundle(bundle, content):
    (bundle / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(NotReadyError, match="not a model bundle"):
        Detector.load(bundle)


@pytest.mark.parametrize("key", ["method", "teacher", "preprocessing", "task_intensity", "scoring", "weights_hash"])
def test_a_config_that_lacks_a_part_is_not_a_bundle(bundle, key):
    facts = json.loads((bundle / "config.json").read_text())
    del facts[key]
    (bundle / "config.json").write_text(json.dumps(facts))
    with pytest.raises(NotReadyError, match="not a model bundle"):
        Detector.load(bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessing": {}},
        {"preprocessing": 3},
        {"scoring": {"smoothing": 4.0}},
        {"teacher": {"name": "efficientnet_lite0"}},
        {"method": {"name": "d24fad", "d24fad": {"shots": 4}}},
        {"method": {"name": "d24fad", "d24fad": ["flattened"]}},
        {"method": ["d24fad"]},
        {"task_intensity": {"ct": {"rule": "range", "lowest": 0}}},
    ],
    ids=str,
)
def test_a_config_with_a_damaged_part_is_not_a_bundle(bundle, changes):
    edit(bundle, **changes)
    with pytest.raises(NotReadyError, match="not a model bundle"):
        Detector.load(bundle)


def test_a_bundle_of_a_newer_format_asks_for_an_update(bundle):
    edit(bundle, format=2)
    with pytest.raises(NotReadyError, match="format 2, expected 1"):
        Detector.load(bundle)
    (bundle / "config.json").write_text('{"format": 2, "model": "with its parts renamed"}')
    with pytest.raises(NotReadyError, match="format 2, expected 1"):
        Detector.load(bundle)


def test_a_bundle_that_cannot_be_written_is_an_output_error(tmp_path, make_detector):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="taken"):
        make_detector().save(tmp_path / "taken")


def pair(local, far, seed=0):
    """A detector with these two teachers."""
    method = build_method("pdd", [local, far], seed=seed)
    return Detector(
        method,
        preprocessing=Preprocessing((64, 64)),
        scoring=Scoring(),
        facts=ModelFacts.of(MethodConfig("pdd"), method),
        device="cpu",
    )


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory, lite0):
    """A second teacher of the user's own, with other weights."""
    file = tmp_path_factory.mktemp("weights") / OWN_FILE
    state = {key: value.clone() for key, value in lite0.body.state_dict().items()}
    next(iter(state.values())).mul_(0.5)
    torch.save(state, file)
    return build_backbone("efficientnet_lite0", weights=str(file))


def test_two_teachers_from_files_are_found_in_the_bundle(own_teacher, other_teacher, tmp_path, phantom):
    detector = pair(own_teacher, other_teacher)
    detector.save(tmp_path / "bundle")
    names = ["config.json", "global_teacher.safetensors", "teacher.safetensors", "weights.safetensors"]
    assert sorted(file.name for file in (tmp_path / "bundle").iterdir()) == names
    assert all(b"Smith" not in file.read_bytes() for file in (tmp_path / "bundle").iterdir())
    moved = shutil.move(tmp_path / "bundle", tmp_path / "elsewhere")
    loaded = Detector.load(moved, device="cpu")
    hashes = {role: teacher.weights_hash for role, teacher in loaded.method.teachers.items()}
    assert hashes == {"local": own_teacher.weights_hash, "global": other_teacher.weights_hash}
    assert loaded.model_hash == detector.model_hash
    images = rows(phantom, "test", label=1)
    scores = [[one.score for one in each.predict(images)] for each in (detector, loaded)]
    assert scores[0] == scores[1]
    loaded.save(tmp_path / "again")
    for name in names[1:3]:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "elsewhere" / name).read_bytes()


def test_only_the_teacher_from_a_file_goes_into_the_bundle(lite0, other_teacher, own_teacher, tmp_path):
    pair(own_teacher, other_teacher).save(tmp_path)
    pair(lite0, other_teacher).save(tmp_path)  # over it
    assert not (tmp_path / "teacher.safetensors").exists()
    pair(own_teacher, lite0).save(tmp_path)
    assert not (tmp_path / "global_teacher.safetensors").exists()
    loaded = Detector.load(tmp_path, device="cpu").method.teachers
    assert [teacher.weights_hash for teacher in loaded.values()] == [own_teacher.weights_hash, lite0.weights_hash]


def test_which_of_two_teachers_is_another_is_said(lite0, own_teacher, tmp_path):
    pair(lite0, lite0).save(tmp_path)
    file = own_teacher.weights
    with pytest.raises(WeightsError, match=r"Pass the same weights with --global_teacher\.weights FILE\.$"):
        Detector.load(tmp_path, global_teacher_weights=file)
    with pytest.raises(WeightsError, match=r"Pass the same weights with --teacher\.weights FILE\.$"):
        Detector.load(tmp_path, teacher_weights=file)
    pair(lite0, own_teacher).save(tmp_path)
    (tmp_path / "global_teacher.safetensors").unlink()
    with pytest.raises(WeightsError):
        Detector.load(tmp_path)
    assert Detector.load(tmp_path, device="cpu", global_teacher_weights=file).method.teachers["global"].weights == file


def test_teachers_that_change_places_are_another_model(lite0, own_teacher):
    assert pair(lite0, own_teacher).model_hash != pair(own_teacher, lite0).model_hash


def test_a_bundle_that_lost_its_second_teacher_is_refused(lite0, tmp_path):
    pair(lite0, lite0).save(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    del facts["global_teacher"]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(WeightsError, match=r"keys do not fit"):
        Detector.load(tmp_path)


def test_a_bundle_that_lost_a_teachers_file_names_the_file(lite0, own_teacher, tmp_path):
    pair(lite0, own_teacher).save(tmp_path)
    (tmp_path / "global_teacher.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"global_teacher\.safetensors: missing; .*--global_teacher\.weights FILE"):
        Detector.load(tmp_path)


def test_a_bundle_older_than_some_settings_still_loads(bundle, make_detector, phantom):
    former = {"name": "d24fad", "distance": "flattened", "softmax_scale": "channels", "tsd_weight": 0.1}
    edit(bundle, method=former)
    loaded, detector = Detector.load(bundle, device="cpu"), make_detector()
    assert loaded.model_hash == detector.model_hash
    assert [one.score for one in judge(loaded, phantom)] == [one.score for one in judge(detector, phantom)]
    loaded.save(bundle)  # with all settings
    assert Detector.load(bundle, device="cpu").model_hash == detector.model_hash


#: What the first bundles said of every method beside its name: the settings of all of them.
FORMER = {
    "distance": "flattened",
    "softmax_scale": "channels",
    "tsd_weight": 0.1,
    "self_distillation": True,
    "learn_to_weight": True,
    "pdd": {
        "shared_students": False,
        "cosine_sign": "paper",
        "detach_targets": False,
        "mpa": True,
        "two_students": True,
        "reconstruction_weight": 0.02,
        "cosine_weight": 0.05,
        "diversity_weight": 0.5,
        "relation": "diverse",
        "tau_low": 0.75,
        "tau_high": 0.3,
        "low_levels": 1,
    },
    "attention": {
        "mirrored": True,
        "resized": True,
        "surroundings": True,
        "teacher_levels": 3,
        "deepest": 2.0,
    },
}


def former_hash(spelled, method):
    """A model's digest as it was computed when bundles spelled the settings of all methods."""
    others = {"pdd", "attention"} - {spelled["name"]}
    told = [(each.name, each.normalise, each.weights_hash) for each in method.teachers.values()]
    own = {key: value for key, value in spelled.items() if key not in others}
    choices = repr((own, *(fact for each in told for fact in each)))
    return hashlib.sha256((choices + state_digest(method.state_dict())).encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("attention", {}),
        ("attention", {"mirrored": False, "deepest": 1.0}),
        ("d24fad", {}),
        ("d24fad", {"distance": "positionwise", "tsd_weight": 0.3, "learn_to_weight": False}),
        ("nearest", {}),
        ("pdd", {}),
        ("pdd", {"shared_students": True, "cosine_sign": "release", "low_levels": 2}),
    ],
    ids=str,
)
def test_a_bundle_of_the_former_spelling_is_the_same_model(name, changes, lite0, tmp_path):
    config = MethodConfig(name, METHODS[name].settings(**changes))
    method = build_method(name, [lite0, lite0], config.settings)
    detector = Detector(
        method,
        preprocessing=Preprocessing((64, 64)),
        scoring=Scoring(),
        facts=ModelFacts.of(config, method),
        device="cpu",
    )
    detector.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["method"] == {"name": name, name: asdict(config.settings)}
    now = Detector.load(tmp_path, device="cpu")
    own = {name: FORMER[name] | changes} if name in ("attention", "pdd") else changes
    spelled = {"name": name, **FORMER, **own}
    edit(tmp_path, method=spelled)
    former = Detector.load(tmp_path, device="cpu")
    assert former.facts == now.facts == detector.facts
    assert former.model_hash == now.model_hash == detector.model_hash == former_hash(spelled, method)


def test_a_setting_nobody_knows_is_refused_in_either_spelling(bundle):
    whole = json.loads((bundle / "config.json").read_text())["method"]
    for spelled in ({"name": "d24fad", "shots": 4}, {**whole, "shots": 4}):
        edit(bundle, method=spelled)
        with pytest.raises(
            NotReadyError, match=r"is damaged \(method: unknown setting 'shots', expected name and d24f"
        ):
            Detector.load(bundle)


def attentive(teacher, **parts):
    """A detector of patch attention with some parts left out."""
    config = MethodConfig("attention", AttentionSettings(**parts))
    method = build_method(config.name, teacher, config.settings)
    return Detector(
        method,
        preprocessing=Preprocessing((64, 64)),
        scoring=Scoring(),
        facts=ModelFacts.of(config, method),
        device="cpu",
    )


@pytest.mark.parametrize(
    "parts",
    [{}, {"mirrored": False}, {"resized": False}, {"surroundings": False}, {"teacher_levels": 1}, {"deepest": 1.0}],
)
def test_a_bundle_remembers_what_was_left_out(parts, lite0, tmp_path, phantom):
    detector = attentive(lite0, **parts)
    detector.save(tmp_path)
    loaded = Detector.load(tmp_path, device="cpu")
    assert loaded.model_hash == detector.model_hash
    assert (loaded.model_hash == attentive(lite0).model_hash) == (not parts)
    scores = [[one.score for one in judge(each, phantom)] for each in (detector, loaded, attentive(lite0))]
    assert scores[0] == scores[1]
    assert (scores[0] == scores[2]) == (not parts)


def test_a_bundle_with_impossible_parts_is_refused(lite0, tmp_path):
    attentive(lite0).save(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["method"]["attention"]["teacher_levels"] = 9
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(NotReadyError, match=r"is damaged \(method\.attention\.teacher_levels: got 9, expected 0 to 4"):
        Detector.load(tmp_path)


def a_bank():
    return SupportBank(
        tensors={"value_0": torch.arange(6.0).reshape(2, 3).T, "key_0": torch.ones(3, 1).bfloat16()},
        task="Kopf CT – Ü",
        names=("a.png", "volume.nii#3", "c.png"),
        sha256=("aa#0", "bb#3", "cc#0"),
        preprocessing=Preprocessing((64, 96), "pad", "bilinear", Intensity("range", -1000.0, 400.5)),
        model_hash="0123abcd",
        map_range=(0.1, 1 / 3),
        precision="bf16",
        normal_scores=(0.5, 1 / 3, 0.25),
        patients=(0, 1, 1),
        attention_shares=(0.5, 0.3, 0.2),
        origins=(Origin("DICOM", 512, False, "CT", "0a", 0.5, 3.0), *[Origin("picture", 99, None)] * 2),
    )


def test_a_bank_comes_back_as_it_was(tmp_path):
    bank = a_bank()
    save_bank(bank, tmp_path / "bank.safetensors")
    loaded = load_bank(tmp_path / "bank.safetensors")
    for attribute in (
        "task",
        "names",
        "sha256",
        "preprocessing",
        "model_hash",
        "map_range",
        "shots",
        "digest",
        "normal_scores",
        "patients",
        "attention_shares",
        "origins",
    ):
        assert getattr(loaded, attribute) == getattr(bank, attribute), attribute
    assert loaded.tensors.keys() == bank.tensors.keys()
    for name, tensor in bank.tensors.items():
        torch.testing.assert_close(loaded.tensors[name], tensor, rtol=0, atol=0)


def test_a_banks_digest_is_that_of_its_images_and_precision():
    bank = a_bank()
    shuffled = replace(bank, sha256=bank.sha256[::-1], names=bank.names[::-1], map_range=(0.0, 1.0))
    assert shuffled.digest == bank.digest
    assert len({bank.digest, replace(bank, sha256=bank.sha256[:2]).digest, replace(bank, precision=None).digest}) == 3


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"bank": "not json"},
        {"bank": "[]"},
        {"bank": '{"task": "ct"}'},
        {"bank": {"map_range": []}},
        {"bank": {"preprocessing": {"size": [64]}}},
    ],
    ids=str,
)
def test_a_safetensors_file_without_a_banks_facts_is_not_a_bank(tmp_path, metadata):
    file = tmp_path / "bank.safetensors"
    if metadata and isinstance(metadata["bank"], dict):  # a real bank with one part damaged
        save_bank(a_bank(), file)
        size = int.from_bytes(file.read_bytes()[:8], "little")
        facts = json.loads(json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"]["bank"])
        metadata = {"bank": json.dumps(facts | metadata["bank"])}
    save_file({"value_0": torch.zeros(1)}, file, metadata)
    with pytest.raises(NotReadyError, match="not a support bank"):
        load_bank(file)


def test_a_bank_of_a_newer_format_asks_for_an_update(tmp_path, monkeypatch):
    monkeypatch.setattr("anatomaly.detector.bank_file.FORMAT", 2)
    save_bank(a_bank(), tmp_path / "bank.safetensors")
    monkeypatch.undo()
    with pytest.raises(NotReadyError, match="format 2, expected 1"):
        load_bank(tmp_path / "bank.safetensors")


def test_a_file_of_another_kind_is_not_a_bank(tmp_path, saved):
    (tmp_path / "text").write_text("hello")
    torch.save({"value_0": torch.zeros(1)}, tmp_path / "pickled.pth")
    for file in (tmp_path / "text", tmp_path / "pickled.pth", saved / "weights.safetensors", tmp_path / "no", tmp_path):
        with pytest.raises(NotReadyError, match="not a support bank"):
            load_bank(file)
