"""Settings out of range are refused when the record is made, whoever makes it."""

import json
import math
from dataclasses import asdict

import pytest

from anatomaly.cli import main
from anatomaly.config import (
    FitConfig,
    MethodConfig,
    TeacherConfig,
    TrainingConfig,
    check_intensity,
    check_preprocessing,
    with_later_settings,
)
from anatomaly.errors import ConfigError
from anatomaly.methods.settings import AttentionSettings, D24FADSettings, PDDSettings
from anatomaly.types import Intensity, Preprocessing, Scoring


def test_the_defaults_are_valid():
    FitConfig(MethodConfig("d24fad"))


def test_the_ends_of_the_ranges_are_valid():
    TrainingConfig(shots=1, epochs=0, batch_size=1, validate_every=1, seed=0, gradient_clip=0, cache_gib=0)
    FitConfig(scoring=Scoring(blur=0, top_fraction=1), method=MethodConfig("d24fad", D24FADSettings(tsd_weight=0)))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("shots", [0, -1, 2**31]),
        ("epochs", [-1]),
        ("synthetic", [-1, 2**31]),
        ("batch_size", [0]),
        ("validate_every", [0]),
        ("seed", [-1, 10**20]),
        ("learning_rate", [0.0, -1e-4, math.nan, math.inf]),
        ("validation", [0.0, 1.0, math.nan]),
        ("gradient_clip", [-1.0, math.nan, math.inf]),
        ("cache_gib", [-1.0, math.nan]),
        ("precision", ["fp16"]),
        ("device", ["tpu"]),
        ("accumulate", [0, -1]),
        ("keep_checkpoints", ["yes", 1]),
    ],
)
def test_training_settings_out_of_range_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"^training\.{name}: got {value}, expected "):
            TrainingConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mirrored", [1, "yes"]),
        ("resized", [0]),
        ("surroundings", [None]),
        ("teacher_levels", [-1, 5, 1.5]),
        ("deepest", [-0.5, math.nan, math.inf]),
    ],
)
def test_parts_of_attention_out_of_range_are_refused_by_name(name, values):
    AttentionSettings(teacher_levels=0, deepest=0.0)
    AttentionSettings(teacher_levels=4)
    for value in values:
        with pytest.raises(ConfigError, match=rf"^method\.attention\.{name}: got {value}, expected "):
            AttentionSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distance", "l2"),
        ("softmax_scale", ""),
        ("tsd_weight", math.nan),
        ("learn_to_weight", 1),
        ("detach_supports", 0),
    ],
)
def test_method_settings_are_checked(name, value):
    with pytest.raises(ConfigError, match=rf"^method\.d24fad\.{name}: got {value}, expected "):
        D24FADSettings(**{name: value})


def test_a_method_is_known_and_takes_its_own_settings():
    assert MethodConfig("pdd").settings == PDDSettings()
    with pytest.raises(ConfigError, match=r"^method: unknown name 'pd', expected one of .* Did you mean pdd\?"):
        MethodConfig("pd")
    with pytest.raises(ConfigError, match=r"^method\.pdd: got a D24FADSettings, expected a PDDSettings"):
        MethodConfig("pdd", D24FADSettings())


def test_a_method_is_spelled_under_its_name_and_read_in_the_former_spelling_too():
    config = MethodConfig("d24fad", D24FADSettings(tsd_weight=0.3))
    assert config.as_dict() == {"name": "d24fad", "d24fad": asdict(config.settings)}
    former = {**asdict(D24FADSettings()), "pdd": asdict(PDDSettings(mpa=False)), "attention": {"mirrored": False}}
    assert MethodConfig.from_dict(config.as_dict()) == config
    assert MethodConfig.from_dict({"name": "d24fad", **former, "tsd_weight": 0.3}) == config
    assert MethodConfig.from_dict({"name": "pdd", **former}) == MethodConfig("pdd", PDDSettings(mpa=False))
    assert MethodConfig.from_dict({"name": "nearest", **former}) == MethodConfig("nearest")
    assert MethodConfig.from_dict({"name": "attention", **former}).settings == AttentionSettings(mirrored=False)


@pytest.mark.parametrize(("name", "value"), [("name", 5), ("weights", None), ("normalise", "no")])
def test_teacher_settings_of_another_type_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^teacher\.{name}: got {value!r}, expected a "):
        TeacherConfig(**{name: value})


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"preprocessing": Preprocessing(size=(0, 64))}, r"preprocessing\.size: got \(0, 64\)"),
        ({"preprocessing": Preprocessing(size=(64, -64))}, r"preprocessing\.size"),
        ({"preprocessing": Preprocessing(size=(64, 100_000))}, r"preprocessing\.size"),
        ({"preprocessing": Preprocessing(size=(8192, 8192))}, r"preprocessing\.size.*together at most 4194304 pixels"),
        ({"preprocessing": Preprocessing(size=(64.5, 64))}, r"preprocessing\.size: got \(64\.5, 64\)"),
        ({"preprocessing": Preprocessing(size=("64", "64"))}, r"preprocessing\.size"),
        ({"preprocessing": Preprocessing(size=(True, 64))}, r"preprocessing\.size"),
        ({"preprocessing": Preprocessing(resize="stretch")}, r"preprocessing\.resize: got stretch, expected one of sq"),
        ({"preprocessing": Preprocessing(interpolation="cubic")}, r"preprocessing\.interpolation"),
        ({"preprocessing": Preprocessing(intensity=Intensity("window", 40, 0))}, r"preprocessing\.intensity: window"),
        ({"scoring": Scoring(blur=-1)}, r"scoring\.blur"),
        ({"scoring": Scoring(blur=math.nan)}, r"scoring\.blur"),
        ({"scoring": Scoring(blur=1e300)}, r"scoring\.blur: got 1e\+300, expected 0 to 181\.0, the diagonal"),
        ({"scoring": Scoring(blur="4")}, r"scoring\.blur: got 4, expected a number"),
        ({"scoring": Scoring(blur=True)}, r"scoring\.blur: got True, expected a number"),
        ({"scoring": Scoring(pooling="a\nb")}, r"scoring\.pooling: got a b, expected one of"),
        ({"scoring": Scoring(pooling="x" * 9999)}, r"scoring\.pooling: got x{200}\.\.\., expected one of"),
        ({"scoring": Scoring(pooling="median")}, r"scoring\.pooling"),
        ({"scoring": Scoring(top_fraction=0)}, r"scoring\.top_fraction"),
        ({"scoring": Scoring(top_fraction=1.5)}, r"scoring\.top_fraction"),
        ({"task_intensity": {"liver": Intensity("range", 2, 1)}}, r"task_intensity\.liver: range: got 2 and 1"),
    ],
)
def test_settings_of_images_and_scores_are_checked(changes, where):
    with pytest.raises(ConfigError, match=f"^{where}"):
        FitConfig(MethodConfig("nearest"), **changes)


@pytest.mark.parametrize(
    ("rule", "valid", "invalid"),
    [
        ("window", [(-600, 1500)], [(40, 0), (40, -80), (math.nan, 80), (0, math.inf), (1e300, 1), (0, 1e-300)]),
        ("range", [(-1000, 400)], [(1, 1), (2, 1), (math.nan, 1), (0, math.inf), (-1e300, 1e300)]),
        ("percentile", [(0, 100), (1, 99)], [(99, 1), (-1, 99), (0, 101), (math.nan, 99)]),
        ("auto", [(0, 1), (5, 2)], []),
    ],
)
def test_intensity_rules_must_span_values(rule, valid, invalid):
    for low, high in valid:
        check_intensity(Intensity(rule, low, high), "here")
    for low, high in invalid:
        with pytest.raises(ConfigError, match=f"^here: {rule}: got "):
            check_intensity(Intensity(rule, low, high), "here")


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match=r"preprocessing\.intensity\.rule: got magic, expected one of auto, window"):
        check_preprocessing(Preprocessing(intensity=Intensity("magic")))


def test_a_recorded_run_gets_the_settings_that_came_later():
    recorded = {"data": "abc", "training": {"epochs": 3}, "teacher": {"name": "a"}, "scoring": {"blur": 4.0}}
    later = {"keep_checkpoints": False, "synthetic": 0, "accumulate": 1}
    assert with_later_settings(recorded) == {
        **recorded,
        "training": {**later, "epochs": 3},
        "teacher": {"blocks": None, "name": "a"},
        "scoring": {"levels": "sum", "blur": 4.0},
    }
    assert Scoring().levels == "sum"
    assert recorded["training"] == {"epochs": 3}, "the record itself is left alone"
    for known in ({"keep_checkpoints": True}, {"synthetic": 50}, {"accumulate": 2}):
        assert with_later_settings({"training": known}) == {"training": {**later, **known}}
    processes = {"devices": 8, "strategy": "ddp"}
    assert with_later_settings({"training": processes}) == {"training": later}, "how many they are is no part of a run"
    defaults = TrainingConfig()
    assert {name: getattr(defaults, name) for name in later} == later, "today's defaults do what those runs did"
    assert with_later_settings({}) == {}
    before = {"name": "d24fad", "d24fad": {"tsd_weight": 0.2}}  # older than learn_to_weight and detach_supports
    now = MethodConfig("d24fad", D24FADSettings(tsd_weight=0.2, learn_to_weight=True, detach_supports=False))
    assert with_later_settings({"method": before})["method"] == now.as_dict()
    lists = json.loads(json.dumps(MethodConfig("matching").as_dict()))
    assert with_later_settings({"method": lists})["method"] == lists, "as JSON has it"
    former = {"name": "attention", "distance": "flattened", "attention": {"mirrored": False}, "pdd": {"mpa": True}}
    own = MethodConfig("attention", AttentionSettings(mirrored=False))
    assert with_later_settings({"method": former}) == with_later_settings({"method": own.as_dict()})
    assert with_later_settings({"method": former})["method"] == own.as_dict()


def test_the_preset_of_attention_is_a_valid_setting(monkeypatch, phantom):
    called = []
    monkeypatch.setattr("anatomaly.training.fit.fit", lambda manifest, out, config, **_: called.append(config))
    assert main(["fit", "--preset", "attention", "--data", str(phantom.source), "--out", "unused"]) == 0
    (config,) = called
    assert isinstance(config, FitConfig)
    assert config.method == MethodConfig(name="attention")
    assert config.training.synthetic > 0
    assert config.training.epochs > 0
    assert config.task_intensity == {}


def test_the_largest_size_and_blur_are_taken():
    for size in ((2048, 2048), (8192, 512)):
        FitConfig(MethodConfig("nearest"), preprocessing=Preprocessing(size=size), scoring=Scoring(blur=2000))
