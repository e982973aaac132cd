"""PDD from images to report: one class or several, two teachers or one, and no support anywhere."""

import csv
import json
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scores import read_scores
from torchvision.models import wide_resnet50_2

from anatomaly.backbones import build_backbone
from anatomaly.cli import main
from anatomaly.config import FitConfig, MethodConfig, TeacherConfig, TrainingConfig
from anatomaly.data.transforms import load
from anatomaly.detector.detector import Detector
from anatomaly.errors import ConfigError
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.evaluation import table_of
from anatomaly.evaluation.metrics import bootstrap
from anatomaly.evaluation.protocols import samples_to_test, split_normals
from anatomaly.methods.settings import PDDSettings
from anatomaly.scoring import predict_tensor, scale_from_normals
from anatomaly.training.fit import fit
from anatomaly.types import Intensity, Preprocessing

GOLDEN = Path(__file__).parent / "golden"
SMALL = Preprocessing((64, 64))
DARK = Intensity("range", 0, 400)


def settings(*, far="timm/resnet18", pdd=None, **choices):
    training = {"epochs": 1, "batch_size": 5, "learning_rate": 2e-3, "validate_every": 1, "device": "cpu"}
    return FitConfig(
        global_teacher=TeacherConfig(far, "random"),
        method=MethodConfig("pdd", pdd or PDDSettings()),
        preprocessing=SMALL,
        training=TrainingConfig(**training),
        **choices,
    )


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Intervals of 20 samples, which nobody looks at; a teacher, which is frozen, is built once."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("evaluate", "evaluation"):
            patch.setattr(f"anatomaly.evaluation.{module}.bootstrap", partial(bootstrap, samples=20))
        build = cache(build_backbone)
        for module in ("anatomaly.training.fit", "anatomaly.detector.bundle"):
            patch.setattr(f"{module}.build_backbone", build)
        yield


@pytest.fixture(scope="module")
def several(phantom, tmp_path_factory):
    """One model of two tasks, one of which has an intensity rule of its own: (folder, detector)."""
    out = tmp_path_factory.mktemp("several") / "model"
    return out, fit(phantom, out, settings(task_intensity={"head_ct": DARK}))


@pytest.fixture(scope="module")
def one(phantom, tmp_path_factory):
    """A model of one task: (folder, detector)."""
    out = tmp_path_factory.mktemp("one") / "model"
    return out, fit(phantom.select(task="head_ct"), out, settings())


@pytest.fixture
def refused(capsys):
    """Run a command that must be told in one line with exit code 2; returns the line."""

    def call(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith("anatomaly: ")
        return err

    return call


def judged(phantom, task="head_ct"):
    return samples_to_test(phantom, task)


def inputs_of(samples, intensity):
    preprocessing = replace(SMALL, intensity=intensity)
    return torch.stack([torch.from_numpy(load(sample, preprocessing).input) for sample in samples])


def scores_of(detector, samples, intensity):
    return predict_tensor(detector.method, inputs_of(samples, intensity), {}, scoring=detector.scoring).scores.numpy()


def check_close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


# --- fit and load ---


def test_one_class_is_trained_with_every_part_of_the_loss(one):
    folder, detector = one
    facts = json.loads((folder / "config.json").read_text())
    assert facts["teacher"]["name"] == "efficientnet_lite0"
    assert facts["global_teacher"]["name"] == "timm/resnet18"
    assert facts["training"]["tasks"] == ["head_ct"]
    assert set(facts["map_ranges"]) == {"head_ct"}
    assert list(detector.method.teachers) == ["local", "global"]
    (line,) = [json.loads(line) for line in (folder / "training/progress.jsonl").read_text().splitlines()]
    pdd = detector.method.settings
    parts = pdd.reconstruction_weight * (line["plain_mse"] + line["prior_mse"])
    parts += pdd.cosine_weight * line["prior_cosine"] + pdd.diversity_weight * line["relation"]
    assert line["total"] == pytest.approx(parts, rel=1e-5)
    assert 0 <= line["val_auroc/head_ct"] == line["val_auroc"] <= 1


@pytest.mark.parametrize("which", ["one", "several"])
def test_a_loaded_model_gives_the_same_scores_and_settings(which, phantom, request):
    folder, detector = request.getfixturevalue(which)
    loaded = Detector.load(folder, device="cpu")
    assert loaded.model_hash == detector.model_hash
    assert loaded.task_intensity == detector.task_intensity
    samples = judged(phantom)
    found = [list(each.set_task("head_ct").predict(samples)) for each in (detector, loaded)]
    assert [p.score for p in found[0]] == [p.score for p in found[1]]
    assert len({p.score for p in found[0]}) == len(samples)
    assert loaded.bank.map_range == detector.bank.map_range
    assert all(p.support_weights is None and p.error is None for p in found[1])


def test_a_finished_run_is_not_trained_again(several, phantom, monkeypatch):
    monkeypatch.setattr("anatomaly.training.student.train_student", lambda *_: pytest.fail("trained again"))
    folder, detector = several
    again = fit(phantom, folder, settings(task_intensity={"head_ct": DARK}))
    assert again.model_hash == detector.model_hash


def test_plain_reverse_distillation_has_one_teacher(phantom, tmp_path):
    pdd = PDDSettings(mpa=False, two_students=False)
    detector = fit(phantom.select(task="head_ct"), tmp_path, settings(far="none", pdd=pdd))
    assert "global_teacher" not in json.loads((tmp_path / "config.json").read_text())
    loaded = Detector.load(tmp_path, device="cpu")
    assert list(loaded.method.teachers) == ["local"]
    assert loaded.model_hash == detector.model_hash
    assert [p.score for p in loaded.predict(judged(phantom))] == [p.score for p in detector.predict(judged(phantom))]


# --- tasks ---


def test_every_task_has_its_own_rule(several, phantom):
    detector = Detector.load(several[0], device="cpu")
    samples = judged(phantom)
    expected = {"head_ct": scores_of(detector, samples, DARK), "brain_mr": scores_of(detector, samples, Intensity())}
    assert np.abs(expected["head_ct"] - expected["brain_mr"]).max() > 1e-2
    for task, scores in expected.items():
        assert detector.set_task(task) is detector
        check_close([p.score for p in detector.predict(samples)], scores)
        assert (detector.bank.task, detector.bank.shots, dict(detector.bank.tensors)) == (task, 0, {})
    detector.set_task("brain_mr", intensity=DARK)
    check_close([p.score for p in detector.predict(samples)], expected["head_ct"])
    detector.set_task("xray")  # nobody trained on it: the rule of all others
    check_close([p.score for p in detector.predict(samples)], expected["brain_mr"])


def test_the_colour_scale_comes_from_normals_that_were_not_trained_on(several, phantom):
    detector = Detector.load(several[0], device="cpu")
    _, held_out = split_normals(
        replace(phantom, samples=tuple(s for s in phantom if s.split != "test")), validation=0.1, seed=111
    )
    ranges = {}
    for task, intensity in (("head_ct", DARK), ("brain_mr", Intensity())):
        rows = held_out.select(task=task).samples
        assert len(rows) == 1
        maps = predict_tensor(detector.method, inputs_of(rows, intensity), {}, scoring=detector.scoring).maps
        ranges[task] = scale_from_normals(list(maps.numpy()))
        assert detector.empty_bank(task).map_range == pytest.approx(ranges[task], abs=1e-4)
    assert ranges["head_ct"] != pytest.approx(ranges["brain_mr"], abs=1e-3)


def test_support_is_refused_where_there_is_none_and_needed_where_there_is(several, make_detector, phantom):
    normals = phantom.select(task="head_ct", split="train").samples
    with pytest.raises(ConfigError, match=r"^support: pdd learned what is normal in training .*Leave out --support"):
        several[1].set_support(normals[:2], task="head_ct")
    with pytest.raises(ConfigError, match=r"^support: d24fad needs normal images to compare with\. Give"):
        make_detector().set_task("head_ct")


# --- evaluate ---


@pytest.mark.parametrize("task", ["head_ct", "brain_mr"])
def test_evaluation_is_once_and_of_the_tasks_own_rule(task, several, phantom):
    detector = several[1]
    (found,) = evaluate(detector, phantom, task=task, shots=[2, 4], draws=5)
    assert (found.shots, found.supports, found.scores.shape) == (0, ((),), (1, 8))
    samples = judged(phantom, task)
    assert found.samples == samples
    check_close(found.scores[0], scores_of(detector, samples, DARK if task == "head_ct" else Intensity()))
    table = table_of([("", found)])
    assert table.columns[:2] == ["task", "image AUROC"]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert table.note.startswith("No support")
    table = table_of([("pdd", found), ("d24fad", replace(found, shots=4))])
    assert table.columns[:3] == ["task", "method", "K"]
    assert [row[2] for row in table.rows] == ["0", "4"]


def test_evaluate_on_the_command_line(several, phantom, tmp_path, capsys):
    words = ["evaluate", "--model", str(several[0]), "--data", str(phantom.source), "--out", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "support draws" not in printed
    assert " K " not in printed
    facts = json.loads((tmp_path / "evaluation.json").read_text())
    tasks = [*phantom.tasks, "all tasks"]
    assert [(each["task"], each["shots"], each["draws"]) for each in facts] == [(task, 0, 1) for task in tasks]
    (expected,) = evaluate(several[1], phantom, task="head_ct")
    rows = [row for row in csv.DictReader((tmp_path / "test_scores.csv").open()) if row["task"] == "head_ct"]
    check_close([float(row["score"]) for row in rows], expected.scores[0])


# --- predict ---


def predict(several, out, *words):
    return ("predict", "--model", several[0], "--out", out, "--device=cpu", *words)


@pytest.mark.parametrize(("task", "intensity"), [("head_ct", DARK), ("brain_mr", Intensity())])
def test_predict_needs_no_support(task, intensity, several, phantom, tmp_path, capsys):
    folder = phantom.select(task="head_ct").samples[0].path.parents[2]
    words = predict(several, tmp_path, "--images", folder / "test", "--task", task, "--maps=false")
    assert main([str(word) for word in words]) == 0
    assert capsys.readouterr().err == ""
    rows = read_scores(tmp_path / "scores.csv")
    samples = [next(s for s in phantom if str(s.path) == row["path"]) for row in rows]
    assert len(samples) == 8
    check_close([row["score"] for row in rows], scores_of(several[1], samples, intensity))
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert lines[0]["scale"] == pytest.approx(several[1].empty_bank(task).map_range)
    assert not any(name.startswith("weight_") for name in rows[0])
    report = (tmp_path / "report.html").read_text()
    for teacher in several[1].method.teachers.values():
        assert f"{teacher.name} ({teacher.weights_hash[:12]})" in report


@pytest.mark.parametrize(
    "words",
    [
        ["--support={}"],
        ["--support={}", "--shots=2"],
        ["--support={}", "--save_bank=b"],
        ["--bank={}/bank"],
        ["--bank={}/gone"],
        ["--save_bank=b"],
        ["--shots=2"],
    ],
    ids=" ".join,
)
def test_options_of_a_support_are_refused(words, several, phantom, make_detector, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    normals = phantom.select(task="head_ct", split="train").samples[:2]
    for sample in normals:
        shutil.copy(sample.path, tmp_path)
    if "bank" in words[0]:
        make_detector().set_support(normals, task="head_ct").save_support(tmp_path / "bank")
    words = [word.format(tmp_path) for word in words]
    line = refused(*predict(several, tmp_path / "out", "--images", normals[0].path, *words))
    assert "pdd learned what is normal in training" in line
    assert "Leave out --support, --bank, --shots and --save_bank." in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "b").exists()


def test_a_few_shot_model_without_support_is_told_so(make_detector, phantom, tmp_path, refused):
    make_detector().save(tmp_path / "model")
    where = ("--model", tmp_path / "model", "--out", tmp_path / "out", "--device=cpu")
    line = refused("predict", *where, "--images", judged(phantom)[0].path)
    assert line.startswith("anatomaly: support: d24fad needs normal images to compare with. Give --support")


def test_a_percentile_that_no_task_fixed_is_one_line(phantom, tmp_path, refused):
    """The training tasks' percentiles became ranges; a task that was not trained on has none."""
    config = replace(settings(), preprocessing=replace(SMALL, intensity=Intensity("percentile", 1, 99)))
    config = replace(config, training=replace(config.training, epochs=0))
    detector = fit(phantom.select(task="head_ct"), tmp_path / "m", config)
    words = predict((tmp_path / "m",), tmp_path / "out", "--images", judged(phantom)[0].path)
    assert detector.empty_bank("head_ct").preprocessing.intensity.rule == "range"
    line = refused(*words, "--task=chest_ct")
    assert "task 'chest_ct' has no range: take another --task (head_ct) or --intensity range:0..255." in line
    assert not (tmp_path / "out").exists()
    assert detector.empty_bank("task").map_range == detector.empty_bank("head_ct").map_range, "unnamed: the only one"
    assert main([str(word) for word in words]) == 0


# --- from image folders to figures, and the official checkpoint ---


def test_fit_on_the_command_line(phantom, tmp_path, capsys):
    teachers = ("--global_teacher.name=timm/resnet18", "--global_teacher.weights=random")
    small = ("--preprocessing.size=[64,64]", "--training.epochs=1", "--training.batch_size=5", "--training.device=cpu")
    where = (f"--data={phantom.source}", f"--out={tmp_path}", "--tasks=[brain_mr]")
    pdd = ("--method.name=pdd", "--method.pdd.diversity_weight=0.25", "--method.pdd.shared_students=true")
    assert main(["fit", *where, *teachers, *small, *pdd]) == 0
    images, first, last = capsys.readouterr().out.splitlines()
    assert images.startswith("normal images: brain_mr ")
    assert first.startswith("pdd on efficientnet_lite0 and timm/resnet18, 1 epoch.")
    assert last == f"model: {tmp_path}"
    loaded = Detector.load(tmp_path, device="cpu")
    assert loaded.method.settings.diversity_weight == 0.25
    assert len(loaded.method.students) == 1
    assert [teacher.name for teacher in loaded.method.teachers.values()] == ["efficientnet_lite0", "timm/resnet18"]


def test_settings_that_contradict_each_other_are_one_line(phantom, tmp_path, refused):
    words = ("fit", "--data", phantom.source, "--out", tmp_path / "m", "--method.name=pdd", "--method.pdd.mpa=false")
    assert "Set shared_students to False" in refused(*words, "--method.pdd.shared_students=true")
    assert "method.pdd.low_levels: got 5" in refused(*words, "--method.pdd.low_levels=5")
    line = refused(*words, "--global_teacher.name=efficientnet_lite9", "--preprocessing.size=[64,64]")
    assert "efficientnet_lite9" in line
    assert not (tmp_path / "m").exists()


def quick_weights(shapes, file):
    """A file of small random weights, as a release would save them."""
    generator = torch.Generator().manual_seed(0)
    state = {key: 0.02 * torch.randn(tuple(shape), generator=generator) for key, shape in shapes.items()}
    for key in state:
        if key.endswith("running_var"):
            state[key].fill_(1.0)
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
    torch.save(state, file)


def test_an_official_checkpoint_is_imported_and_judges_an_image(phantom, tmp_path, monkeypatch, capsys):
    """The model is not written here: it would be half a gigabyte; tests/test_bundle.py stores two teachers."""
    for way in ("anatomaly.backbones.weights._download", "timm.models._builder.load_pretrained"):
        monkeypatch.setattr(way, lambda *_, **__: pytest.fail("went to the network"))
    saved = {}
    monkeypatch.setattr(Detector, "save", lambda self, folder: saved.update({folder: self}))
    files = {name: tmp_path / f"{name}.pth" for name in ("pdd_decoder", "vanilla_vmamba_tiny", "wide_resnet50_2")}
    for name in ("pdd_decoder", "vanilla_vmamba_tiny"):
        quick_weights(json.loads((GOLDEN / f"keys_{name}.json").read_text("utf-8")), files[name])
    with torch.device("meta"):  # torchvision's names, which are timm's too
        wide = {key: value.shape for key, value in wide_resnet50_2().state_dict().items()}
    quick_weights(wide, files["wide_resnet50_2"])
    words = ["import", "pdd", files["pdd_decoder"], "--out", tmp_path / "model"]
    words += ["--teacher.weights", files["wide_resnet50_2"], "--global_teacher.weights", files["vanilla_vmamba_tiny"]]
    assert main([str(word) for word in words]) == 0
    assert capsys.readouterr().out == f"model: {tmp_path / 'model'}\n"
    detector = saved[str(tmp_path / "model")]
    facts = detector.facts
    assert tuple(teacher.name for teacher in facts.teachers) == ("timm/wide_resnet50_2.racm_in1k", "vmamba_tiny_merged")
    assert {teacher.weights for teacher in facts.teachers} == {"file"}
    assert detector.preprocessing == Preprocessing((256, 256), "squash", "bilinear")
    assert (facts.method.settings.shared_students, facts.method.settings.cosine_sign) == (True, "release")
    assert (len(detector.method.students), detector.method.settings.cosine_sign) == (1, "release")
    (found,) = detector.predict([judged(phantom)[0].path])
    assert found.error is None
    assert np.isfinite(found.score)
    assert found.anomaly_map.shape == (64, 64)
    assert found.anomaly_map.std() > 0
    for file in files.values():
        file.unlink()


def test_a_checkpoint_that_is_not_there_or_not_pdds_is_one_line(tmp_path, refused):
    line = refused("import", "pdd", tmp_path / "gone.pth", "--out", tmp_path / "model")
    assert line == f"anatomaly: {tmp_path / 'gone.pth'}: no such file. Pass a checkpoint of the pdd release.\n"
    (tmp_path / "text.pth").write_text("hello")
    assert "not a readable weights file" in refused("import", "pdd", tmp_path / "text.pth", "--out", tmp_path / "model")
    assert not (tmp_path / "model").exists()
