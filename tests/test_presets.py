"""The presets as the command line reads them: they hold the numbers of the papers and releases, and flags win."""

import json
from dataclasses import replace

import pytest

from anatomaly.cli import main
from anatomaly.config import FitConfig, MethodConfig, TeacherConfig
from anatomaly.errors import ConfigError
from anatomaly.methods import METHODS
from anatomaly.methods.settings import AttentionSettings, D24FADSettings, MatchingSettings, PDDSettings
from anatomaly.presets import DEFAULT_PRESET, configured, defaults_of, load_preset, preset_file, preset_names
from anatomaly.training.fit import fit
from anatomaly.types import Intensity, Preprocessing, Scoring

#: What the specifications say, written down from them and not from the files.
D24FAD = {
    "teacher.name": "wide_resnet50_2",
    "teacher.normalise": False,
    "method.name": "d24fad",
    "method.settings.softmax_scale": "channels",
    "method.settings.tsd_weight": 0.1,
    "method.settings.self_distillation": True,
    "method.settings.learn_to_weight": True,
    "preprocessing": Preprocessing((128, 128), "squash", "lanczos", Intensity()),
    "scoring.blur": 4.0,
    "training.epochs": 70,
    "training.batch_size": 16,
    "training.learning_rate": 1e-4,
    "training.schedule": "constant",
    "training.gradient_clip": 0.0,
    "training.precision": "fp32",
    "training.seed": 111,
}
PDD = {
    "teacher.name": "timm/wide_resnet50_2.racm_in1k",
    "teacher.normalise": True,
    "global_teacher.name": "vmamba_tiny_merged",
    "global_teacher.normalise": True,
    "method.name": "pdd",
    "preprocessing": Preprocessing((256, 256), "squash", "bilinear", Intensity()),
    "scoring.blur": 4.0,
    "scoring.pooling": "max",
    "training.epochs": 100,
    "training.batch_size": 10,
    "training.learning_rate": 2e-3,
    "training.schedule": "cosine",
    "training.cosine_epochs": 40,
    "training.gradient_clip": 0.0,
    "training.precision": "fp32",
}
PARTS = {
    "detach_targets": False,
    "mpa": True,
    "two_students": True,
    "reconstruction_weight": 0.02,
    "cosine_weight": 0.05,
    "diversity_weight": 0.5,
    "relation": "diverse",
    "tau_low": 0.75,
    "tau_high": 0.30,
    "low_levels": 1,
}
#: docs/patch-attention.md: what its tables were measured with.
ATTENTION = {
    "teacher.name": "efficientnet_lite0",
    "teacher.normalise": True,
    "method.name": "attention",
    "preprocessing": Preprocessing((128, 128), "squash", "lanczos", Intensity()),
    "scoring.blur": 4.0,
    "scoring.pooling": "topk",
    "scoring.top_fraction": 0.05,
    "training.shots": 4,
    "training.epochs": 3,
    "training.batch_size": 4,
    "training.learning_rate": 1e-3,
    "training.synthetic": 50,
}
EXPECTED = {
    "attention": ATTENTION,
    "d24fad-release": {
        **D24FAD,
        "method.settings.distance": "flattened",
        "scoring.pooling": "max",
        "training.resample": False,
    },
    "d24fad-paper": {**D24FAD, "method.settings.distance": "positionwise", "scoring.pooling": "mean"},
    "pdd-release": {**PDD, "method.settings": PDDSettings(shared_students=True, cosine_sign="release", **PARTS)},
    "pdd-paper": {**PDD, "method.settings": PDDSettings(shared_students=False, cosine_sign="paper", **PARTS)},
}


@pytest.fixture
def settings_of(monkeypatch, phantom):
    """settings_of(*words): the settings that `fit` or the ablation is called with."""

    def call(*words, command=("fit",)):
        called = []
        monkeypatch.setattr("anatomaly.training.fit.fit", lambda manifest, out, config, **_: called.append(config))
        monkeypatch.setattr(
            "anatomaly.benchmark.ablation.run_ablation",
            lambda manifest, out, base, **_: (called.append(base) or [], []),
        )
        where = ["--data", str(phantom.source), "--out", "unused"]
        assert main([*command, *where, *map(str, words)]) == 0
        (config,) = called
        assert isinstance(config, FitConfig)
        return config

    return call


@pytest.fixture
def refused(capsys):
    def call(*words):
        capsys.readouterr()
        assert main([*map(str, words)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    return call


def value(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_all_presets_are_known_here():
    assert set(preset_names()) - set(METHODS.built_in) == {*EXPECTED, "d24fad-quick"} - set(METHODS.built_in)
    assert all(preset_file(name).is_file() for name in EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_holds_the_numbers_of_its_source(name, settings_of):
    config = settings_of("--preset", name)
    assert {key: value(config, key) for key in EXPECTED[name]} == EXPECTED[name]
    assert (config.teacher.weights, config.global_teacher.weights) == ("auto", "auto")
    assert config.task_intensity == {}
    assert settings_of(f"--preset={name}") == config
    assert settings_of("--config", preset_file(name)) == config
    assert load_preset(name) == config
    assert settings_of("--preset", name, command=("benchmark", "ablation", name.split("-")[0])) == config


def test_the_default_is_what_its_page_was_measured_with():
    config = load_preset()
    assert config.method == MethodConfig("matching", MatchingSettings(places=(2, 3), wholes=(4,), whole_weight=0.25))
    assert (config.teacher, config.global_teacher.name) == (TeacherConfig("efficientnet_lite0"), "none")
    assert config.preprocessing.size == (224, 224)
    assert config.scoring == Scoring(blur=4.0, pooling="topk", top_fraction=0.05, levels="geometric")


def test_defaults_follow_the_method_and_files_lie_over_them(settings_of, tmp_path):
    file, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    file.write_text("training: {epochs: 2}", encoding="utf-8")
    other.write_text("method: {name: d24fad}\ntraining: {epochs: 2}", encoding="utf-8")
    ours, theirs = load_preset(), load_preset("d24fad")
    assert settings_of() == ours == settings_of("--preset", DEFAULT_PRESET) == settings_of("--method.name=matching")
    assert settings_of("--training.seed", "3") == replace(ours, training=replace(ours.training, seed=3))
    assert settings_of("--method.name", "d24fad") == theirs != ours
    for flag in (("-c", file), ("--config", file), (f"--config={file}",)):
        assert settings_of(*flag) == replace(ours, training=replace(ours.training, epochs=2))
    assert settings_of("-c", other) == replace(theirs, training=replace(theirs.training, epochs=2))
    assert settings_of("-c", other, "--method.name=matching").scoring == ours.scoring


def test_the_settings_of_a_method_choose_it(settings_of, refused, capsys):
    ours = load_preset("attention")
    for words in (("--method.attention.mirrored", "false"), ("--method.attention.mirrored=false",)):
        assert settings_of(*words) == replace(ours, method=MethodConfig("attention", AttentionSettings(mirrored=False)))
    assert settings_of("--method.pdd.mpa=false").method == MethodConfig("pdd", PDDSettings(mpa=False))
    where = ("fit", "--data", "x", "--out", "y")
    assert "settings of d24fad and pdd, but no method" in refused(
        *where, "--method.pdd.mpa=false", "--method.d24fad.tsd_weight=1"
    )
    assert "settings of pdd, but the method is nearest" in refused(
        *where, "--method.pdd.mpa=false", "--method.name=nearest"
    )


def test_former_spellings_are_accepted_with_a_line(settings_of, tmp_path, caplog):
    wanted = MethodConfig("d24fad", D24FADSettings(tsd_weight=0.2))
    file = tmp_path / "former.yaml"
    file.write_text("method: {name: d24fad, tsd_weight: 0.2}", encoding="utf-8")
    for words in (("--method.tsd_weight", "0.2"), ("--method.tsd_weight=0.2",), ("-c", file)):
        caplog.clear()
        assert settings_of(*words) == replace(load_preset("d24fad"), method=wanted)
        assert caplog.text.count("--method.tsd_weight is now --method.d24fad.tsd_weight.") == 1


def test_an_ablation_starts_from_what_goes_with_its_method(settings_of):
    words = ("--preset", "attention")
    assert settings_of(command=("benchmark", "ablation", "attention")) == settings_of(*words)
    assert settings_of(command=("benchmark", "ablation", "d24fad")) == load_preset("d24fad")
    named = settings_of("--out", "attention", command=("benchmark", "ablation", "pdd"))  # a word that means nothing
    assert named == load_preset("pdd")


@pytest.mark.parametrize("name", [name for name in METHODS.built_in if name in preset_names()])
def test_what_goes_with_a_method_is_the_preset_of_its_name(name):
    assert configured(defaults_of(name)) == load_preset(name)
    assert load_preset(name).method == MethodConfig(name)


def test_fit_in_python_and_on_the_command_line_do_the_same_by_default(settings_of, phantom, tmp_path, monkeypatch):
    monkeypatch.setattr("anatomaly.training.fit.train_student", lambda *_: {})
    made = fit(phantom, tmp_path / "model")
    written = json.loads((tmp_path / "model/training/run.json").read_text())
    assert written["training"] == settings_of().identity()["training"]
    assert made.facts.method == settings_of().method
    assert (made.scoring, made.preprocessing) == (settings_of().scoring, settings_of().preprocessing)


def test_what_comes_later_wins(settings_of, tmp_path):
    pdd = ("--preset", "pdd-release")
    config = settings_of(*pdd, "--training.epochs=3", "--method.pdd.tau_low=0.5", "--teacher.name=efficientnet_lite0")
    assert (config.training.epochs, config.training.batch_size) == (3, 10)
    assert config.method.settings == PDDSettings(
        shared_students=True, cosine_sign="release", **{**PARTS, "tau_low": 0.5}
    )
    assert (config.teacher.name, config.global_teacher.name) == ("efficientnet_lite0", "vmamba_tiny_merged")
    assert settings_of("--training.epochs=3", *pdd).training.epochs == 100
    file = tmp_path / "mine.yaml"
    file.write_text("training: {epochs: 4}\nscoring: {pooling: mean}\n")
    config = settings_of(*pdd, "--config", file, "--scoring.blur=2")
    assert (config.training.epochs, config.training.batch_size) == (4, 10)
    assert (config.scoring.pooling, config.scoring.blur) == ("mean", 2.0)
    assert settings_of("--preset=d24fad-paper", "--preset", "attention").method.name == "attention"


@pytest.mark.parametrize("words", [["--preset", "pdd-papr"], ["--preset=pdd-papr"]])
def test_an_unknown_preset_names_the_nearest(words, refused):
    line = refused("fit", "--data", "x", "--out", "y", *words)
    assert "preset: unknown name 'pdd-papr', expected one of attention, d24fad, d24fad-paper" in line
    assert line.endswith("Did you mean pdd-paper?\n")


def test_a_name_like_none_gets_no_hint_and_no_path_is_followed():
    with pytest.raises(ConfigError, match=r"expected one of .*pdd-release\.$"):
        preset_file("xyzzy")
    with pytest.raises(ConfigError):
        preset_file("../presets/pdd-paper")


@pytest.mark.parametrize("words", [["--preset"], ["--preset="], ["--preset", "--training.epochs=3"]])
def test_a_preset_without_a_name_is_one_line(words, refused):
    assert "preset" in refused("fit", "--data", "x", "--out", "y", *words)


def test_a_preset_in_a_file_is_refused_and_not_passed_over(refused, tmp_path):
    """It would have to come before the file's other settings, and would be silently without effect."""
    file = tmp_path / "mine.yaml"
    file.write_text("preset: pdd-paper\n")
    line = refused("fit", "--data", "x", "--out", "y", "--config", file)
    assert "--preset pdd-paper" in line
