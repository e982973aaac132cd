"""The ablations: what every row trains, what the table says, and that nothing that is finished is done again."""

import csv
import json
from dataclasses import asdict, replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest

from anatomaly.backbones import build_backbone
from anatomaly.benchmark import ablation
from anatomaly.benchmark.ablation import ABLATIONS, AblationRow, run_ablation, table_of
from anatomaly.cli import main
from anatomaly.config import FitConfig, MethodConfig, TeacherConfig, TrainingConfig
from anatomaly.detector.detector import Detector
from anatomaly.errors import ConfigError, ManifestError
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.metrics import auroc, bootstrap
from anatomaly.methods import D24FAD, PDD, PatchAttention, PatchNearestNeighbours, build_method
from anatomaly.methods.settings import PDDSettings
from anatomaly.training import fit as training
from anatomaly.types import Preprocessing, Scoring

BASE = FitConfig(
    global_teacher=TeacherConfig("timm/resnet18", "random"),
    preprocessing=Preprocessing((64, 64)),
    training=TrainingConfig(shots=2, epochs=1, batch_size=5, validate_every=1, device="cpu"),
)
BOOTSTRAP = partial(bootstrap, samples=20)
#: Two short rows of two seeds, of which the second has nothing to train.
FEW_SHOT = {
    "method": "d24fad",
    "rows": ["TSD only", "nearest neighbours, teacher"],
    "tasks": ["head_ct"],
    "seeds": (0, 1),
    "shots": 2,
    "draws": 2,
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Intervals of 20 samples, which are compared and not judged; a teacher, which is frozen, is built once."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("anatomaly.benchmark.ablation", "anatomaly.evaluation.evaluate"):
            patch.setattr(f"{module}.bootstrap", BOOTSTRAP)
        build = cache(build_backbone)
        for module in ("anatomaly.training.fit", "anatomaly.detector.bundle"):
            patch.setattr(f"{module}.build_backbone", build)
        yield


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    """A finished table: (folder, rows)."""
    out = tmp_path_factory.mktemp("table")
    return out, run_ablation(phantom, out, BASE, **FEW_SHOT)


@pytest.fixture
def work(monkeypatch):
    """What was done: {"trained": folders, "judged": [(task, shots, draws, seed)]}."""
    done = {"trained": [], "judged": []}
    train = training.train_student

    def noted_train(method, train_rows, held_out, prepare, folder, config):
        done["trained"].append(folder.parent)
        return train(method, train_rows, held_out, prepare, folder, config)

    def noted_evaluate(detector, manifest, *, task, shots, draws, seed):
        done["judged"].append((task, shots, draws, seed))
        return evaluate(detector, manifest, task=task, shots=shots, draws=draws, seed=seed)

    monkeypatch.setattr(training, "train_student", noted_train)
    monkeypatch.setattr(ablation, "evaluate", noted_evaluate)
    return done


# --- the rows ---


def changed(config, base=BASE):
    """The settings in which two configurations differ, by dotted name."""

    def flat(value, prefix=""):
        if isinstance(value, dict):
            return {k: v for key, each in value.items() for k, v in flat(each, f"{prefix}.{key}".lstrip(".")).items()}
        return {prefix: value}

    one, other = flat(asdict(base)), flat(asdict(config))
    return {name: value for name, value in other.items() if one[name] != value}


PDD_BASE = replace(BASE, method=MethodConfig("pdd"))
ATTENTION_BASE = replace(
    BASE,
    method=MethodConfig("attention"),
    scoring=Scoring(pooling="topk"),
    training=replace(BASE.training, synthetic=2),
)
BASES = {"pdd": PDD_BASE, "d24fad": BASE, "attention": ATTENTION_BASE}
ROWS = {
    "pdd": {
        "one teacher, one student": {
            "global_teacher.name": "none",
            "global_teacher.weights": "auto",
            "method.pdd.mpa": False,
            "method.pdd.two_students": False,
        },
        "+ global teacher (InA, MMU)": {"method.pdd.mpa": False, "method.pdd.two_students": False},
        "+ priors (MPA)": {"method.pdd.two_students": False},
        "+ second student (PDD)": {},
        "PDD without diversity loss": {"method.pdd.diversity_weight": 0.0},
        "PDD, students alike": {"method.pdd.relation": "alike"},
        "PDD, shared students": {"method.pdd.shared_students": True},
        "PDD, release's cosine sign": {"method.pdd.cosine_sign": "release"},
        "nearest neighbours, teacher": {"method.name": "nearest"},
        "nearest neighbours, global teacher": {
            "method.name": "nearest",
            "teacher.name": "timm/resnet18",
            "teacher.weights": "random",
        },
    },
    "d24fad": {
        "TSD only": {"method.self_distillation": False},
        "SSD only, equal weights": {"method.tsd_weight": 0.0, "method.learn_to_weight": False},
        "SSD + TSD, equal weights": {"method.learn_to_weight": False},
        "SSD + TSD + L2W (D24FAD)": {},
        "nearest neighbours, teacher": {"method.name": "nearest"},
    },
    "attention": {
        "patch attention": {},
        "not trained": {"training.epochs": 0},
        "without synthetic tasks": {"training.synthetic": 0},
        "without surroundings": {"method.attention.surroundings": False},
        "without mirrored supports": {"method.attention.mirrored": False},
        "without resized supports": {"method.attention.resized": False},
        "without the teacher's own levels": {"method.attention.teacher_levels": 0},
        "deepest level counts once": {"method.attention.deepest": 1.0},
        "score is the maximum": {"scoring.pooling": "max"},
        "nearest neighbours, teacher": {"method.name": "nearest"},
    },
}


@pytest.mark.parametrize("method", ROWS)
def test_every_row_changes_what_it_says_and_nothing_else(method):
    base = BASES[method]
    assert {name: changed(change(base), base) for name, change in ABLATIONS[method].items()} == ROWS[method]


@pytest.mark.parametrize(("method", "kind"), [("pdd", PDD), ("d24fad", D24FAD), ("attention", PatchAttention)])
def test_rows_choose_the_method_whatever_the_base_is(method, kind):
    teachers = [SimpleNamespace(channels=(8, 12, 16, 20), strides=(4, 8, 16, 32), signed=False)] * 2
    for base in (*BASES.values(), replace(BASE, method=MethodConfig("nearest"))):
        for name, change in ABLATIONS[method].items():
            config = change(base)
            built = build_method(
                teachers=teachers[: 1 + (config.global_teacher.name != "none")], **asdict(config.method)
            )
            assert type(built) is (PatchNearestNeighbours if name.startswith("nearest") else kind), name


def test_a_base_whose_students_share_weights_has_rows_of_one_student_too():
    """As the preset pdd-release has it."""
    base = replace(BASE, method=MethodConfig("pdd", PDDSettings(shared_students=True, cosine_sign="release")))
    teachers = [SimpleNamespace(channels=(8, 12, 16, 20), strides=(4, 8, 16, 32), signed=False)] * 2
    found = {}
    for name, change in ABLATIONS["pdd"].items():
        settings = change(base).method
        if settings.name == "pdd":
            found[name] = len(build_method(teachers=teachers, **asdict(settings)).roles)
    assert list(found.values()) == [1, 1, 1, 2, 2, 2, 2, 2]


# --- the table ---


def test_the_table_says_what_evaluate_says(finished, phantom):
    out, results = finished
    assert [(row.task, row.name, row.seeds) for row in results] == [("head_ct", name, 2) for name in FEW_SHOT["rows"]]
    for row, folder in zip(results, ("tsd_only", "nearest_neighbours_teacher"), strict=True):
        scores, means = [], []
        for seed in (0, 1):
            detector = Detector.load(out / "head_ct" / folder / f"seed_{seed}", device="cpu")
            (found,) = evaluate(detector, phantom, task="head_ct", shots=[2], draws=2, seed=seed)
            means.append(found.summary()["auroc"][0])
            scores.append(found.scores)
        assert row.auroc == pytest.approx(np.mean(means), abs=1e-6)
        assert row.sd == pytest.approx(np.std(means, ddof=1), abs=1e-6)
        labels, patients = zip(*((s.label, s.patient_id) for s in found.samples), strict=True)
        interval = BOOTSTRAP(auroc, np.concatenate(scores), np.array(labels), groups=list(patients))
        assert (row.low, row.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
        assert row.low <= row.auroc <= row.high


def test_the_table_is_written_twice_alike(finished):
    out, results = finished
    columns, cells = table_of(results)
    assert columns == ["row", "head_ct"]
    assert [name for name, _ in cells] == FEW_SHOT["rows"]
    with (out / "ablation.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [columns, *cells]
    lines = (out / "ablation.md").read_text().splitlines()
    assert lines[0] == "| row | head_ct |"
    assert lines[2:] == [f"| {name} | {cell} |" for name, cell in cells]


def test_a_table_has_a_column_per_task_and_leaves_gaps():
    nan = float("nan")
    rows = [AblationRow("a", "x", 1, 0.5, nan, 0.4, 0.6), AblationRow("b", "y", 3, 0.75, 0.125, 0.5, 1.0)]
    columns, cells = table_of(rows)
    assert columns == ["row", "a", "b"]
    assert cells == [["x", "0.500 (0.400 to 0.600)", ""], ["y", "", "0.750 ± 0.125 (0.500 to 1.000)"]]


def test_pdd_sees_the_judged_task_only_and_d24fad_all_others(finished, phantom, tmp_path, work):
    rows = ["one teacher, one student", "nearest neighbours, global teacher"]
    cells = []
    run_ablation(
        phantom, tmp_path, BASE, method="pdd", rows=rows, tasks=["brain_mr"], seeds=[7], shots=3, on_cell=cells.append
    )
    assert cells == [f"brain_mr, {name}, seed 7" for name in rows]
    # The neighbours are all 8 normal training images of the task, however many shots are asked for.
    assert work["judged"] == [("brain_mr", [0], 1, 7), ("brain_mr", [8], 1, 7)]
    tasks = {}
    for cell in (*tmp_path.glob("*/*/seed_7"), *finished[0].glob("*/*/seed_1")):
        facts = json.loads((cell / "config.json").read_text())
        tasks[cell.parent.name] = (facts["training"]["tasks"], facts["training"]["seed"])
    assert tasks == {
        "one_teacher_one_student": (["brain_mr"], 7),
        "nearest_neighbours_global_teacher": (["brain_mr"], 7),
        "tsd_only": (["brain_mr"], 1),
        "nearest_neighbours_teacher": (["brain_mr"], 1),
    }


# --- going on ---


class Killed(BaseException):
    """Like a kill signal: no handler of ours expects it."""


def test_a_killed_table_goes_on_at_the_cell_it_was_killed_in(finished, phantom, tmp_path, work):
    cells = []

    def killed_before_the_third(cell):
        cells.append(cell)
        if len(cells) == 3:
            raise Killed

    with pytest.raises(Killed):
        run_ablation(phantom, tmp_path, BASE, on_cell=killed_before_the_third, **FEW_SHOT)
    folders = [tmp_path / "head_ct/tsd_only" / f"seed_{seed}" for seed in (0, 1)]
    assert work["trained"] == folders
    assert [seed for *_, seed in work["judged"]] == [0, 1]
    assert (tmp_path / "ablation.csv").is_file(), "rows that are complete are there already"
    before = {file: file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*") if file.is_file()}
    for done in work.values():
        done.clear()
    results = run_ablation(phantom, tmp_path, BASE, **FEW_SHOT)
    assert work["trained"] == []  # nearest neighbours need none
    assert work["judged"] == [("head_ct", [2], 2, 0), ("head_ct", [2], 2, 1)]
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert results == finished[1]
    for name in ("ablation.csv", "ablation.md"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()


def test_a_cell_killed_between_training_and_judging_is_only_judged(phantom, tmp_path, monkeypatch, work):
    choice = {**FEW_SHOT, "rows": ["TSD only"], "seeds": [0]}
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "write_evaluations", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run_ablation(phantom, tmp_path, BASE, **choice)
    assert [len(done) for done in work.values()] == [1, 1]
    run_ablation(phantom, tmp_path, BASE, **choice)
    assert [len(done) for done in work.values()] == [1, 2]


def test_other_supports_or_test_images_are_judged_anew_by_the_same_models(phantom, tmp_path, work):
    choice = {**FEW_SHOT, "rows": ["TSD only"], "seeds": [0]}
    run_ablation(phantom, tmp_path, BASE, **choice)
    weights = tmp_path / "head_ct/tsd_only/seed_0/weights.safetensors"
    before = weights.read_bytes()
    run_ablation(phantom, tmp_path, BASE, **choice)
    run_ablation(phantom, tmp_path, BASE, **{**choice, "draws": 3})
    run_ablation(phantom, tmp_path, BASE, **{**choice, "draws": 3, "shots": 1})
    last = phantom.select(task="head_ct", split="test").samples[-1]
    fewer = replace(phantom, samples=tuple(sample for sample in phantom if sample != last))
    run_ablation(fewer, tmp_path, BASE, **{**choice, "draws": 3, "shots": 1})
    run_ablation(fewer, tmp_path, BASE, **{**choice, "draws": 3, "shots": 1})
    assert work["judged"] == [("head_ct", [k], draws, 0) for k, draws in ((2, 2), (2, 3), (1, 3), (1, 3))]
    assert len(work["trained"]) == 1
    assert weights.read_bytes() == before
    (facts,) = json.loads((tmp_path / "head_ct/tsd_only/seed_0/evaluation.json").read_text())
    assert (facts["shots"], facts["draws"], facts["images"]) == (1, 3, 7)


def test_other_settings_in_the_same_folder_are_refused(finished, phantom, work):
    other = replace(BASE, training=replace(BASE.training, learning_rate=3e-3))
    with pytest.raises(ConfigError, match=r"seed_0: holds a run with other settings \(training\.learning_rate 0\.0001"):
        run_ablation(phantom, finished[0], other, **FEW_SHOT)
    assert work == {"trained": [], "judged": []}


# --- what is wrong is said before anything is trained ---


@pytest.mark.parametrize("method", ABLATIONS)
def test_an_unknown_row_or_task_is_refused_at_once(method, phantom, tmp_path, work):
    with pytest.raises(ConfigError, match=r"^ablation: unknown row 'PDDD', expected one of .*\.$"):
        run_ablation(phantom, tmp_path / "out", BASE, method=method, rows=["PDDD"])
    with pytest.raises(ManifestError, match=r"no task 'heart_ct', the tasks are brain_mr, head_ct\.$"):
        run_ablation(phantom, tmp_path / "out", BASE, method=method, tasks=["head_ct", "heart_ct"])
    without = replace(phantom, samples=tuple(s for s in phantom if (s.task, s.split) != ("head_ct", "test")))
    with pytest.raises(ConfigError, match=r"task 'head_ct' has no rows of split 'test'"):
        run_ablation(without, tmp_path / "out", BASE, method=method)
    assert work == {"trained": [], "judged": []}
    assert not (tmp_path / "out").exists()


def test_one_task_is_too_few_to_leave_one_out(phantom, tmp_path):
    with pytest.raises(ConfigError, match="expected at least 2"):
        run_ablation(phantom.select(task="head_ct"), tmp_path, BASE, method="d24fad")


# --- the command ---


def command(phantom, out, *words):
    where = ["--data", str(phantom.source), "--out", str(out), "--tasks=[head_ct]", "--preprocessing.size=[64,64]"]
    small = ["--training.device=cpu", "--training.epochs=1", "--training.batch_size=5", "--training.shots=2"]
    return ["benchmark", "ablation", "d24fad", *where, *small, "--seeds=[0]", *words]


def test_the_command_prints_the_table(phantom, tmp_path, capsys):
    words = ["--rows=[nearest neighbours teacher]", "--shots=1", "--draws=2"]
    assert main(command(phantom, tmp_path, *words)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert (
        "unknown row 'nearest neighbours teacher', expected one of TSD only; SSD only, equal weights;" in captured.err
    )
    words[0] = '--rows=["nearest neighbours, teacher"]'
    assert main(command(phantom, tmp_path, *words)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("head_ct, nearest neighbours, teacher, seed 0\n")
    assert printed.endswith(f"{tmp_path}/ablation.md\n")
    (facts,) = json.loads((tmp_path / "head_ct/nearest_neighbours_teacher/seed_0/evaluation.json").read_text())
    assert (facts["shots"], facts["draws"]) == (1, 2)
    assert f"{facts['metrics']['auroc']['mean']:.3f} (" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks=[heart_ct]"], "no task 'heart_ct', the tasks are"),
        (["--seeds=[]"], "seeds is empty, expected at least one"),
        (["--training.epochs=-1"], "training.epochs: got -1"),
        (["--preset=pdd"], "unknown name 'pdd'"),
    ],
)
def test_a_command_that_cannot_be_run_is_one_line(words, message, phantom, tmp_path, capsys):
    assert main(command(phantom, tmp_path / "out", *words)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()
