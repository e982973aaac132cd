"""A method and a teacher of somebody else's package work in fit, Detector, evaluate, benchmark and commands."""

import json

import pytest

from anatomaly import METHODS, Detector, FitConfig, MethodConfig, backbones, evaluate, fit, load_preset
from anatomaly.cli import main
from anatomaly.config import TrainingConfig
from anatomaly.errors import ConfigError
from anatomaly.presets import configured, defaults_of
from anatomaly.types import Preprocessing

MODULE = '''
"""Mean feature distance: a query's features against the mean of the supports', both scaled by learned weights."""

from dataclasses import dataclass

import torch
from torch import nn

from anatomaly import Comparison, MethodRecord, Teacher


@dataclass(frozen=True)
class Settings:
    """Its settings.

    Attributes:
        levels: Number of shallow levels that count.
    """

    levels: int = 2


class MeanDistance(nn.Module):
    needs_support = True

    def __init__(self, teacher, *, settings):
        super().__init__()
        self.teachers, self.settings = {"teacher": teacher}, settings
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(c, 1, 1)) for c in teacher.channels[: settings.levels]])

    def extract(self, images):
        return {"teacher": self.teachers["teacher"](images)}

    extract_support = extract

    def encode(self, features):
        return [scale * level for scale, level in zip(self.scales, features["teacher"])]

    def embed_support(self, features):
        return {f"level_{i}": level for i, level in enumerate(self.encode(features))}

    def compare(self, encoded, support):
        pairs = ((level, support[f"level_{i}"]) for i, level in enumerate(encoded))
        return [Comparison(level, bank.mean(dim=0, keepdim=True).expand_as(level)) for level, bank in pairs]

    def training_loss(self, query, support):
        banks = ([level[b] for level in support["teacher"]] for b in range(len(query["teacher"][0])))
        means = [[scale * level.mean(dim=0) for scale, level in zip(self.scales, bank)] for bank in banks]
        queries = ([level[b] for level in query["teacher"]] for b in range(len(means)))
        pairs = [zip(self.encode({"teacher": levels}), mean) for levels, mean in zip(queries, means)]
        return {"total": sum((1 - torch.cosine_similarity(x, y, dim=0)).mean() for each in pairs for x, y in each)}


RECORD = MethodRecord(
    "mean_distance",
    "distance from the mean features of the supports",
    MeanDistance,
    Settings,
    few_shot=True,
    one_class=False,
    learns_from="episodes",
    defaults={"scoring": {"pooling": "mean"}, "training": {"epochs": 1, "batch_size": 2, "shots": 2}},
)


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stages = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 2, stride=2) for i in range(4))

    def forward(self, images):
        levels = [images]
        for stage in self.stages:
            levels.append(stage(levels[-1]))
        return levels[1:]


def tiny(*, weights, normalise):
    return Teacher.of_module("tiny", Pyramid(), size=(64, 64), weights="random", normalise=normalise)
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package as pip leaves it: a module and its metadata beside it."""
    site = tmp_path / "site"
    about = site / "outside-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "outside.py").write_text(MODULE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[anatomaly.methods]\nmean_distance = outside:RECORD\n[anatomaly.teachers]\ntiny = outside:tiny\n"
    )
    monkeypatch.syspath_prepend(str(site))
    backbones._outside.cache_clear()
    monkeypatch.setattr(METHODS, "_outside", None)
    monkeypatch.setattr(METHODS, "_records", dict(METHODS._records))
    yield
    backbones._outside.cache_clear()


SMALL = ["--teacher.name=tiny", "--preprocessing.size=[64,64]", "--training.device=cpu"]


def test_an_outside_method_works_on_the_command_line(installed, phantom, tmp_path, capsys):
    data, model = str(phantom.source), str(tmp_path / "model")
    words = ["fit", "--data", data, "--out", model, "--method.name=mean_distance", "--method.mean_distance.levels=3"]
    assert main([*words, *SMALL]) == 0
    assert "\nmean_distance on tiny, 1 epoch. Distance from the mean features" in capsys.readouterr().out
    facts = json.loads((tmp_path / "model/config.json").read_text())
    assert facts["method"] == {"name": "mean_distance", "mean_distance": {"levels": 3}}
    assert facts["scoring"]["pooling"] == "mean", "defaults follow the method"
    assert facts["teacher"]["name"] == "tiny"
    assert main([*words, *SMALL]) == 0, "a finished run is found finished"
    task = [row for row in phantom if row.task == "head_ct"]
    normals = tmp_path / "normals.csv"
    normals.write_text("path\n" + "".join(f"{row.path}\n" for row in task if row.split == "train"))
    out = str(tmp_path / "out")
    images = ["--images", str(next(row.path for row in task if row.split == "test"))]
    assert main(["predict", "--model", model, "--support", str(normals), "--shots=3", *images, "--out", out]) == 0
    assert main(["calibrate", "--model", model, "--support", str(normals)]) == 0
    words = ["evaluate", "--model", model, "--data", data, "--tasks=[head_ct]", "--shots=2", "--draws=2"]
    assert main([*words, "--out", str(tmp_path / "figures")]) == 0
    assert json.loads((tmp_path / "figures/evaluation.json").read_text())[0]["shots"] == 2


def test_an_outside_method_works_in_a_benchmark(installed, phantom, tmp_path, capsys):
    words = ["benchmark", "--data", str(phantom.source), "--methods=[mean_distance, nearest]", "--tasks=[head_ct]"]
    words += ["--shots=2", "--seeds=[0]", "--draws=1", "--out", str(tmp_path / "grid"), *SMALL]
    assert main(words) == 0
    text = (tmp_path / "grid/leaderboard.md").read_text()
    assert "| mean_distance |" in text
    assert "| nearest |" in text or "| **nearest** |" in text
    key = json.loads(next((tmp_path / "grid/cells").rglob("mean_distance/**/cell.json")).read_text())["key"]
    assert (key["settings"]["training"]["epochs"], key["settings"]["scoring"]["pooling"]) == (1, "mean")
    assert main([*words, "--protocol=one_class"]) == 2
    assert "mean_distance trains on other tasks" in capsys.readouterr().err


def test_an_outside_method_and_a_module_of_ones_own_work_in_python(installed, phantom, tmp_path):
    from outside import Pyramid, Settings, tiny

    from anatomaly import Teacher

    config = configured(defaults_of("mean_distance"), FitConfig(MethodConfig("mean_distance", Settings(levels=1))))
    assert config.training == TrainingConfig(epochs=1, batch_size=2, shots=2)
    size = Preprocessing(size=(64, 64))
    config = FitConfig(config.method, preprocessing=size, training=config.training)
    mine = Teacher.of_module("mine", Pyramid(), size=(64, 64))
    made = fit(phantom, tmp_path / "model", config, teachers=[mine])
    supports = [row for row in phantom.select(task="head_ct") if row.split == "train"][:3]
    found = [made.set_support(supports, task="head_ct").predict(phantom.samples[:2])]
    with pytest.raises(ConfigError, match="unknown name 'mine'"):
        Detector.load(tmp_path / "model", device="cpu")
    loaded = Detector.load(tmp_path / "model", device="cpu", teachers=[mine])
    found.append(loaded.set_support(supports, task="head_ct").predict(phantom.samples[:2]))
    one, two = ([prediction.score for prediction in each] for each in found)
    assert one == two
    (result,) = evaluate(loaded, phantom, task="head_ct", shots=[2], draws=1)
    assert 0 <= result.metrics[0]["auroc"] <= 1
    assert tiny(weights="auto", normalise=True).strides == (2, 4, 8, 16)


def test_without_the_package_its_names_are_unknown():
    with pytest.raises(ConfigError, match=f"unknown name 'mean_distance', expected one of {', '.join(METHODS)}"):
        METHODS["mean_distance"]
    assert load_preset().method.name in METHODS
