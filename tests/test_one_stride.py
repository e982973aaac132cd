"""Every method on a teacher of one stride, from images to scores and back from its folder."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from anatomaly.backbones import build_backbone
from anatomaly.benchmark.grid import Entry, Grid, keys_of
from anatomaly.cli import main
from anatomaly.config import FitConfig, MethodConfig, TeacherConfig, TrainingConfig
from anatomaly.detector.detector import Detector
from anatomaly.errors import ConfigError, NotReadyError, WeightsError
from anatomaly.methods import METHODS
from anatomaly.training.fit import fit
from anatomaly.types import Preprocessing

SMALL = Preprocessing((64, 64))
VIT = TeacherConfig("timm/test_vit", "random", blocks=(0, 1, 3, 4))


def settings(method, teacher=VIT, other=VIT, **choices):
    training = {"shots": 2, "epochs": 1, "batch_size": 4, "validate_every": 1, "device": "cpu", **choices}
    return FitConfig(MethodConfig(method), teacher, other, SMALL, training=TrainingConfig(**training))


def queries(phantom):
    return phantom.select(task="head_ct", split="test").samples[::3]


def scores(detector, phantom):
    if detector.method.needs_support:
        detector.set_support(phantom.select(task="head_ct", split="train").samples[:2], task="head_ct")
    else:
        detector.set_task("head_ct")
    return [each.score for each in detector.predict(queries(phantom))]


@pytest.mark.parametrize("method", METHODS.built_in)
def test_a_method_learns_and_judges_and_comes_back_from_its_folder(method, phantom, tmp_path, monkeypatch):
    monkeypatch.setattr("anatomaly.training.lesion_episodes.STEPS", 2)  # batches an epoch
    config = settings(method)
    detector = fit(phantom, tmp_path / "model", config)
    assert all(teacher.blocks == VIT.blocks for teacher in detector.method.teachers.values())
    found = scores(detector, phantom)
    assert np.std(found) > 0
    again = Detector.load(tmp_path / "model", device="cpu")
    assert [each.blocks for each in again.facts.teachers] == [VIT.blocks] * METHODS[method].teachers
    assert again.model_hash == detector.model_hash
    assert scores(again, phantom) == pytest.approx(found, abs=1e-6)
    fit(phantom, tmp_path / "model", config)  # finished already: the same settings are the same run
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(teacher\.blocks"):
        fit(phantom, tmp_path / "model", replace(config, teacher=replace(VIT, blocks=None)))


@pytest.mark.parametrize("pair", [("efficientnet_lite0", "timm/test_vit"), ("timm/test_vit", "efficientnet_lite0")])
def test_pdd_takes_a_pyramid_and_a_transformer(pair, phantom, tmp_path):
    detector = fit(phantom, tmp_path / "model", settings("pdd", *(TeacherConfig(name, "random") for name in pair)))
    assert np.std(scores(detector, phantom)) > 0
    local = detector.method.teachers["local"]
    shapes = [level.shape[-1] for level in detector.encode([np.zeros((3, 64, 64), np.float32)])[-3:]]
    assert shapes == [64 // stride for stride in local.strides[:3]]


def test_a_pair_is_told_the_sizes_that_fit_both(phantom, tmp_path):
    dino = TeacherConfig("timm/vit_small_patch14_dinov2", "random")
    with pytest.raises(ConfigError) as error:
        fit(phantom, tmp_path / "model", settings("pdd", dino, TeacherConfig("timm/resnet18", "random")))
    assert str(error.value) == (
        "preprocessing: size (64, 64) does not fit teacher timm/vit_small_patch14_dinov2 and global_teacher "
        "timm/resnet18, expected multiples of 224, such as 224x224. Change --preprocessing.size."
    )
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def model(phantom, tmp_path_factory):
    """An untrained model on weights of the user's own, whose file is gone."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(7)
    file = folder / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    words = ["--method.name", "nearest", "--teacher.name", "timm/test_vit", "--teacher.weights", str(file)]
    words += ["--teacher.blocks", "[1, 2, 3, 5]", "--preprocessing.size", "[64,96]", "--data", str(phantom.source)]
    assert main(["fit", *words, "--out", str(folder / "model")]) == 0
    file.unlink()
    return folder / "model"


def edited(model, folder, change):
    shutil.copytree(model, folder)
    facts = json.loads((folder / "config.json").read_text())
    change(facts["teacher"])
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def test_the_command_line_chooses_the_blocks_and_the_bundle_keeps_them(model, phantom, tmp_path):
    detector = Detector.load(model, device="cpu")
    (teacher,) = detector.method.teachers.values()
    assert teacher.blocks == (1, 2, 3, 5)
    assert json.loads((model / "config.json").read_text())["teacher"]["blocks"] == [1, 2, 3, 5]
    other = edited(model, tmp_path / "other", lambda facts: facts.update(blocks=[0, 2, 3, 5]))
    with pytest.raises(WeightsError, match="trained with timm/test_vit weights"):
        Detector.load(other, device="cpu")
    damaged = edited(model, tmp_path / "damaged", lambda facts: facts.update(blocks=[0, 2.5, 3, "x"]))
    with pytest.raises(NotReadyError, match=r"is damaged \(teacher\.blocks: got .*, expected four ascending whole"):
        Detector.load(damaged, device="cpu")


def test_a_bank_of_other_blocks_is_refused(model, phantom, tmp_path):
    detector = Detector.load(model, device="cpu")
    detector.set_support(phantom.select(task="head_ct", split="train").samples[:2]).save_support(tmp_path / "bank")
    (teacher,) = detector.method.teachers.values()
    weights = str(model / "teacher.safetensors")
    other = build_backbone("timm/test_vit", weights=weights, blocks=(0, 2, 3, 5))
    config = replace(settings("nearest"), preprocessing=Preprocessing((64, 96)))
    second = fit(phantom, tmp_path / "second", config, teachers=[other])
    assert second.method.teachers["teacher"].body.state_dict().keys() == teacher.body.state_dict().keys()
    with pytest.raises(NotReadyError, match="made with model"):
        second.load_support(tmp_path / "bank")


def test_bundles_and_runs_of_before_say_nothing_of_blocks(make_detector, phantom, tmp_path):
    detector = make_detector("nearest")
    detector.save(tmp_path / "model")
    old = edited(tmp_path / "model", tmp_path / "old", lambda facts: facts.pop("blocks"))
    assert Detector.load(old, device="cpu").model_hash == detector.model_hash


def test_yaml_chooses_the_blocks(phantom, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(
        "method: {name: nearest}\nteacher: {name: timm/test_vit, weights: random, blocks: [0, 1, 2, 3]}\n"
        "preprocessing: {size: [64, 64]}\n"
    )
    words = ["fit", "--config", str(file), "--data", str(phantom.source), "--out", str(tmp_path / "model")]
    assert main(words) == 0
    assert Detector.load(tmp_path / "model", device="cpu").facts.teachers[0].blocks == (0, 1, 2, 3)
    capsys.readouterr()
    assert main([*words, "--teacher.name", "efficientnet_lite0"]) == 2
    assert capsys.readouterr().err.endswith(
        "efficientnet_lite0 has a pyramid, whose levels are its own. Leave it out.\n"
    )
    for blocks in ("[0,1,2]", "[3,2,4,5]", "[-1,2,3,4]", "[0,1,2,9]"):
        assert main([*words, "--teacher.blocks", blocks]) == 2
        assert "ascending" in capsys.readouterr().err


def test_cells_of_other_blocks_are_other_cells(phantom):
    entries = [
        Entry(name, settings("nearest"), teacher=replace(VIT, blocks=blocks))
        for name, blocks in (("one", (0, 1, 2, 3)), ("two", (0, 1, 2, 4)))
    ]
    grid = Grid(phantom, "one_class", entries, (), tasks=("head_ct",), seeds=(0,))
    one, two = (key["settings"]["teacher"] for key in keys_of(grid, {}).values())
    assert (one.pop("blocks"), two.pop("blocks")) == ([0, 1, 2, 3], [0, 1, 2, 4])
    assert one == two


def test_teachers_of_one_stride_are_explained_by_eigen_cam(vit, lite0, phantom, tmp_path):
    from anatomaly.backbones import BACKBONES
    from anatomaly.backbones.timm_features import TimmSpec
    from anatomaly.explain.classifiers import classifier_of
    from anatomaly.explain.teachers import explain_teachers

    pair = (classifier_of(vit, TimmSpec("test_vit")), classifier_of(lite0, BACKBONES["efficientnet_lite0"]))
    assert (pair[0].kind, pair[0].why) == ("eigen-cam", "its head does not read a grid of features")
    rows = explain_teachers(pair, queries(phantom)[:1], tmp_path, preprocessing=SMALL)
    assert [(row["status"], row["method"]) for row in rows] == [("ok", "eigen-cam"), ("ok", "grad-cam")]
    with pytest.raises(
        ConfigError, match="got 80 80, expected multiples of 32, such as 64x64 or 96x96 and no side below"
    ):
        explain_teachers(pair, queries(phantom), tmp_path / "x", preprocessing=Preprocessing((80, 80)))


def test_an_own_network_of_one_stride_is_a_teacher(phantom, tmp_path):
    from anatomaly.backbones.teacher import Teacher

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.levels = torch.nn.ModuleList(torch.nn.Conv2d(3, 8, 16, stride=16) for _ in range(4))

        def forward(self, images):
            return [level(images) for level in self.levels]

    torch.manual_seed(0)
    own = Teacher.of_module("mine", Own(), size=(64, 64))
    detector = fit(phantom, tmp_path / "model", settings("d24fad"), teachers=[own])
    found = scores(detector, phantom)
    again = Detector.load(tmp_path / "model", device="cpu", teachers=[own])
    assert scores(again, phantom) == pytest.approx(found, abs=1e-6)


def test_export_and_explain_take_the_blocks_too(phantom, tmp_path, capsys):
    import onnx

    words = ["--teacher.name", "timm/test_vit", "--teacher.weights", "random", "--teacher.blocks", "[0,1,2,4]"]
    assert main(["export", *words, "--size", "64", "64", "--out", str(tmp_path / "teacher.onnx")]) == 0
    facts = {each.key: each.value for each in onnx.load(tmp_path / "teacher.onnx").metadata_props}
    assert facts["weights_hash"] == build_backbone("timm/test_vit", weights="random", blocks=(0, 1, 2, 4)).weights_hash
    words += ["--images", str(queries(phantom)[0].path), "--size", "64", "64", "--out", str(tmp_path / "looks")]
    words += ["--global_teacher.name", "timm/test_vit", "--global_teacher.weights", "random"]
    capsys.readouterr()
    assert main(["explain", "teachers", *words, "--global_teacher.blocks", "[0,1,2,6]"]) == 2
    assert "got [0, 1, 2, 6], expected 4 ascending numbers from 0 to 5" in capsys.readouterr().err
    assert main(["explain", "teachers", *words, "--global_teacher.blocks", "[0,1,2,3]"]) == 0
    assert "timm/test_vit: Eigen-CAM instead of Grad-CAM" in capsys.readouterr().out
