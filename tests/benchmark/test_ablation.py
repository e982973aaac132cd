"""The ablations: what every row trains, what the table says, and that nothing that is finished is done again."""

import csv
import json
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
from test_grid import Here

from anatomaly.backbones import build_backbone
from anatomaly.benchmark import run as runner
from anatomaly.benchmark.ablation import AblationRow, ablated_methods, entries_of, run_ablation, summarise, table_of
from anatomaly.benchmark.leaderboard import read_cells
from anatomaly.cli import main
from anatomaly.config import FitConfig, MethodConfig, TeacherConfig, TrainingConfig
from anatomaly.detector.detector import Detector
from anatomaly.errors import ConfigError, ManifestError
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.metrics import auroc, bootstrap
from anatomaly.methods import METHODS, build_method
from anatomaly.methods.settings import PDDSettings
from anatomaly.types import Preprocessing, Scoring

BASE = FitConfig(
    MethodConfig("d24fad"),
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
    """One process, intervals of 20 samples, which are compared and not judged; a frozen teacher is built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "ProcessPoolExecutor", Here)
        for module in ("benchmark.ablation", "evaluation.evaluate"):
            patch.setattr(f"anatomaly.{module}.bootstrap", BOOTSTRAP)
        build = cache(build_backbone)
        for module in ("training.fit", "detector.bundle", "backbones"):
            patch.setattr(f"anatomaly.{module}.build_backbone", build)
        yield


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    """A finished table: (folder, rows)."""
    out = tmp_path_factory.mktemp("table")
    results, failures = run_ablation(phantom, out, BASE, **FEW_SHOT)
    assert failures == []
    return out, results


@pytest.fixture
def work(monkeypatch):
    """What was done: (what, row, task, K, seed)."""
    done = []
    for name in ("_run_cell", "_train"):
        real = getattr(runner, name)

        def noted(grid, cell, *rest, _real=real, _name=name):
            done.append((_name, cell.entry, cell.task, cell.shots, cell.seed))
            return _real(grid, cell, *rest)

        monkeypatch.setattr(runner, name, noted)
    return done


# --- the rows ---


def changed(config, base=BASE):
    """The settings in which two configurations differ, by dotted name."""

    def flat(value, prefix=""):
        if isinstance(value, dict):
            return {k: v for key, each in value.items() for k, v in flat(each, f"{prefix}.{key}".lstrip(".")).items()}
        return {prefix: value}

    one, other = flat(base.as_dict()), flat(config.as_dict())
    return {name: value for name, value in other.items() if one.get(name) != value}


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
        "TSD only": {"method.d24fad.self_distillation": False},
        "SSD only, equal weights": {"method.d24fad.tsd_weight": 0.0, "method.d24fad.learn_to_weight": False},
        "SSD + TSD, equal weights": {"method.d24fad.learn_to_weight": False},
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
    entries = entries_of(method, base)
    assert {entry.name: changed(entry.config, base) for entry in entries} == ROWS[method]
    assert all(entry.teacher == entry.config.teacher for entry in entries)
    assert {e.images for e in entries if e.config.method.name == "nearest"} == {64 if method == "pdd" else 0}


def test_every_table_of_rows_is_of_a_method():
    assert ablated_methods() == sorted(ROWS)
    assert set(ROWS) <= set(METHODS)
    with pytest.raises(
        ConfigError, match=r"^ablation: 'nearest' has no rows, expected one of attention, d24fad, pdd\.$"
    ):
        entries_of("nearest", BASE)


@pytest.mark.parametrize("method", ROWS)
def test_rows_choose_the_method_whatever_the_base_is(method):
    for base in (*BASES.values(), replace(BASE, method=MethodConfig("nearest"))):
        for entry in entries_of(method, base):
            expected = "nearest" if entry.name.startswith("nearest") else method
            assert entry.config.method.name == expected, entry.name


def test_a_base_whose_students_share_weights_has_rows_of_one_student_too():
    """As the preset pdd-release has it."""
    base = replace(BASE, method=MethodConfig("pdd", PDDSettings(shared_students=True, cosine_sign="release")))
    teachers = [SimpleNamespace(channels=(8, 12, 16, 20), strides=(4, 8, 16, 32), signed=False)] * 2
    found = [
        len(build_method("pdd", teachers, entry.config.method.settings).roles)
        for entry in entries_of("pdd", base)
        if entry.config.method.name == "pdd"
    ]
    assert found == [1, 1, 1, 2, 2, 2, 2, 2]


# --- the table ---


def test_the_table_says_what_evaluate_says(finished, phantom):
    out, results = finished
    assert [(row.task, row.name, row.seeds) for row in results] == [("head_ct", name, 2) for name in FEW_SHOT["rows"]]
    scores, means = [], []
    for seed in (0, 1):
        detector = Detector.load(out / f"models/TSD_only/efficientnet_lite0/head_ct/seed_{seed}", device="cpu")
        (found,) = evaluate(detector, phantom, task="head_ct", shots=[2], draws=2, seed=seed)
        means.append(found.summary()["auroc"][0])
        scores.append(found.scores)
    row = results[0]
    assert row.auroc == pytest.approx(np.mean(means), abs=1e-6)
    assert row.sd == pytest.approx(np.std(means, ddof=1), abs=1e-6)
    labels, patients = zip(*((s.label, s.patient_id) for s in found.samples), strict=True)
    interval = BOOTSTRAP(auroc, np.concatenate(scores), np.array(labels), groups=list(patients))
    assert (row.low, row.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert row.low <= row.auroc <= row.high


def test_the_table_is_written_twice_alike(finished):
    out, results = finished
    table = table_of(results)
    columns, cells = table.columns, table.rows
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
    table = table_of(rows)
    assert table.columns == ["row", "a", "b"]
    assert table.rows == [["x", "0.500 (0.400 to 0.600)", ""], ["y", "", "0.750 ± 0.125 (0.500 to 1.000)"]]


def test_the_table_counts_unreadable_images_and_says_why_there_is_no_interval():
    nan, reason = float("nan"), "it needs 2 images of a class, there is 1 normal one"
    rows = [
        AblationRow("a", "x", 1, 1.0, nan, nan, nan, undefined={"interval": reason}),
        AblationRow("b", "x", 2, 0.75, 0.125, 0.5, 1.0, unreadable=3),
    ]
    table = table_of(rows)
    cells = ["x", "1.000 (–)", "0.750 ± 0.125 (0.500 to 1.000)"]
    assert table.rows == [cells, ["unreadable test images", "0", "3"]]
    assert table.note == f"– stands for what cannot be had: a: 95 % interval ({reason})."


def test_unreadable_and_lonely_images_reach_the_files(phantom, tmp_path):
    """Of one task, three of four anomalous images are unreadable."""
    tests = [row for row in phantom if (row.task, row.split, row.label) == ("head_ct", "test", 1)]
    (tmp_path / "broken.png").write_bytes(b"")
    rows = tuple(
        replace(row, path=tmp_path / "broken.png", frame=tests.index(row), mask=None) if row in tests[:3] else row
        for row in phantom
    )
    results, failures = run_ablation(
        replace(phantom, samples=rows), tmp_path / "out", BASE, **{**FEW_SHOT, "rows": FEW_SHOT["rows"][1:]}
    )
    assert failures == []
    assert [(row.unreadable, row.undefined.keys()) for row in results] == [(3, {"interval"})]
    with (tmp_path / "out/ablation.csv").open(newline="") as stream:
        _, figures, counts = csv.reader(stream)
    assert figures[1].endswith("(–)")
    assert counts == ["unreadable test images", "3"]
    assert (
        "95 % interval (it needs 2 patients of a class, there is 1 anomalous one)"
        in (tmp_path / "out/ablation.md").read_text()
    )


def test_seeds_that_scored_other_images_are_not_one_row(finished):
    out, _ = finished
    cells = read_cells(sorted(out.glob("cells/head_ct/TSD_only/*/k2_seed_*")))
    assert len(cells) == 2
    fewer = replace(cells[1], images=cells[1].images[1:], labels=cells[1].labels[1:], scores=cells[1].scores[:, 1:])
    with pytest.raises(ConfigError, match="scored other images"):
        summarise([cells[0], fewer])


def test_a_one_class_method_sees_the_judged_task_only_and_others_all_but_it(finished, phantom, tmp_path, work):
    rows = ["one teacher, one student", "nearest neighbours, global teacher"]
    results, failures = run_ablation(
        phantom, tmp_path, BASE, method="pdd", rows=rows, tasks=["brain_mr"], seeds=[7], shots=3
    )
    assert (failures, [row.name for row in results]) == ([], rows)
    assert work == [
        ("_run_cell", rows[1], "brain_mr", 0, 7),
        ("_train", rows[0], "brain_mr", 0, 7),
        ("_run_cell", rows[0], "brain_mr", 0, 7),
    ]
    (cell,) = tmp_path.glob("cells/brain_mr/nearest*/timm_resnet18/seed_7")
    (facts,) = json.loads((cell / "evaluation.json").read_text())
    assert (facts["shots"], facts["draws"]) == (8, 1), "all normal training images, however many shots are asked for"
    for out, task in ((tmp_path, "brain_mr"), (finished[0], "brain_mr")):  # `finished` judges head_ct
        (model, *_) = out.glob("models/*/*/*/seed_*/config.json")
        assert json.loads(model.read_text())["training"]["tasks"] == [task]


# --- going on ---


class Killed(BaseException):
    """Like a kill signal: no handler of ours expects it."""


def test_a_killed_table_goes_on_at_the_cell_it_was_killed_in(finished, phantom, tmp_path, work, monkeypatch):
    def killed_at_the_first_step(running, done, total):
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        run_ablation(phantom, tmp_path, BASE, on_step=killed_at_the_first_step, **FEW_SHOT)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("models/**/*") if file.is_file()}
    assert before
    done = len(list(tmp_path.glob("cells/**/cell.json")))
    assert 2 <= done < 4
    work.clear()
    results, _ = run_ablation(phantom, tmp_path, BASE, **FEW_SHOT)
    assert len([cell for cell in work if cell[0] == "_run_cell"]) == 4 - done, "nothing is judged twice"
    assert results == finished[1]
    for name in ("ablation.csv", "ablation.md"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()
    work.clear()
    assert run_ablation(phantom, tmp_path, BASE, **FEW_SHOT)[0] == finished[1]
    assert work == []


def test_other_settings_or_supports_in_the_same_folder_are_refused(finished, phantom, work):
    other = replace(BASE, training=replace(BASE.training, learning_rate=3e-3))
    with pytest.raises(
        ConfigError, match=r"seed_0: holds a cell of another benchmark \(settings\.training\.learning_rate"
    ):
        run_ablation(phantom, finished[0], other, **FEW_SHOT)
    with pytest.raises(ConfigError, match=r"holds a cell of another benchmark \(draws 2, now 3"):
        run_ablation(phantom, finished[0], BASE, **{**FEW_SHOT, "draws": 3})
    assert work == []


def test_a_failed_row_costs_no_other(phantom, tmp_path, monkeypatch):
    def refuse(*_):
        raise ConfigError("no training today.")

    monkeypatch.setattr(runner, "_train", refuse)
    results, failures = run_ablation(phantom, tmp_path, BASE, **FEW_SHOT)
    assert [row.name for row in results] == ["nearest neighbours, teacher"]
    assert {failure.reason for failure in failures} == {"no training today."}
    assert (tmp_path / "ablation.md").read_text().count("\n") == 3


# --- what is wrong is said before anything is trained ---


@pytest.mark.parametrize("method", ROWS)
def test_an_unknown_row_or_task_is_refused_at_once(method, phantom, tmp_path, work):
    with pytest.raises(ConfigError, match=r"^ablation: unknown row 'PDDD', expected one of .*\.$"):
        run_ablation(phantom, tmp_path / "out", BASE, method=method, rows=["PDDD"])
    with pytest.raises(ManifestError, match=r"no task 'heart_ct', the tasks are brain_mr, head_ct\.$"):
        run_ablation(phantom, tmp_path / "out", BASE, method=method, tasks=["head_ct", "heart_ct"])
    without = replace(phantom, samples=tuple(s for s in phantom if (s.task, s.split) != ("head_ct", "test")))
    with pytest.raises(ConfigError, match=r"task 'head_ct' has no rows of split 'test'"):
        run_ablation(without, tmp_path / "out", BASE, method=method)
    assert work == []
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
    assert printed.startswith("d24fad: image AUROC"), "short work says nothing of its progress"
    assert printed.endswith(f"{tmp_path}/ablation.md\n")
    (found,) = tmp_path.glob("cells/head_ct/*/*/k1_seed_0/evaluation.json")
    (facts,) = json.loads(found.read_text())
    assert (facts["shots"], facts["draws"]) == (1, 2)
    assert f"{facts['metrics']['auroc']['mean']:.3f} (" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks=[heart_ct]"], "no task 'heart_ct', the tasks are"),
        (["--seeds=[]"], "seeds: got none, expected at least one"),
        (["--training.epochs=-1"], "training.epochs: got -1"),
        (["--preset=pddd"], "unknown name 'pddd'"),
    ],
)
def test_a_command_that_cannot_be_run_is_one_line(words, message, phantom, tmp_path, capsys):
    assert main(command(phantom, tmp_path / "out", *words)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()
