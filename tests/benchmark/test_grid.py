"""The grid: every cell once, the same supports for everybody, and nothing that is finished is done again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from anatomaly.backbones import build_backbone
from anatomaly.benchmark import anomalib_bridge
from anatomaly.benchmark import run as benchmark
from anatomaly.benchmark.grid import Entry, Grid, settings_of, slug
from anatomaly.benchmark.leaderboard import read_cells
from anatomaly.benchmark.run import CELL, Failure, run_grid
from anatomaly.cli import main
from anatomaly.commands.benchmark import _entry
from anatomaly.config import FitConfig, MethodConfig, TeacherConfig, TrainingConfig
from anatomaly.data.manifest import load_manifest
from anatomaly.errors import ConfigError, ManifestError, NotReadyError, ReadError
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.metrics import bootstrap
from anatomaly.evaluation.protocols import draw_supports
from anatomaly.evaluation.support_lists import lists_digest, read_support_lists
from anatomaly.types import Preprocessing

BASE = FitConfig(
    MethodConfig("d24fad"),
    global_teacher=TeacherConfig("timm/resnet18", "random"),
    preprocessing=Preprocessing((64, 64)),
    training=TrainingConfig(shots=2, epochs=1, batch_size=5, validate_every=1, device="cpu"),
)
COMMON = {group: settings for group, settings in BASE.as_dict().items() if group != "method"}
NEAREST = Entry("nearest", replace(BASE, method=MethodConfig(name="nearest")))
D24FAD = Entry("d24fad", BASE)
PDD = Entry("pdd", replace(BASE, method=MethodConfig(name="pdd")))


class Here:
    """A pool of processes that is this process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        job = Future()
        try:
            job.set_result(function(*arguments))
        except Exception as err:
            job.set_exception(err)
        return job

    def shutdown(self, **_):
        pass


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One process, short intervals, and a teacher that is built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "ProcessPoolExecutor", Here)
        for module in ("evaluation.evaluate", "benchmark.leaderboard"):
            patch.setattr(f"anatomaly.{module}.bootstrap", partial(bootstrap, samples=20))
        build = cache(build_backbone)
        for module in ("training.fit", "detector.bundle", "backbones"):
            patch.setattr(f"anatomaly.{module}.build_backbone", build)
        yield


def grid(phantom, *entries, **changes):
    settings = {"shots": (1, 2), "seeds": (0, 1), "draws": 2, **changes}
    return Grid(phantom, settings.pop("protocol", "few_shot"), entries or (NEAREST,), [BASE.teacher], **settings)


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    """A finished grid of two methods: (grid, folder)."""
    out = tmp_path_factory.mktemp("grid")
    whole = grid(phantom, NEAREST, D24FAD)
    assert run_grid(whole, out) == []
    return whole, out


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    return finished[0], tmp_path / "out"


@pytest.fixture
def work(monkeypatch):
    """Names of the cells and trainings that are really run."""
    done = []
    for name in ("_run_cell", "_train"):
        real = getattr(benchmark, name)

        def noted(grid, cell, *rest, _real=real, _name=name):
            done.append((_name, cell))
            return _real(grid, cell, *rest)

        monkeypatch.setattr(benchmark, name, noted)
    return done


def contents(out):
    """Every figure of a run, without its costs."""
    return {
        file.relative_to(out): file.read_bytes()
        for file in sorted(out.rglob("*"))
        if file.name in ("test_scores.csv", "draws.csv", "evaluation.json", "supports.json")
    }


# --- what a cell holds ---


def test_every_cell_of_the_grid_is_there(finished):
    whole, out = finished
    cells = whole.cells()
    assert len(set(cells)) == len(cells) == 2 * 2 * 2 * 2  # methods, tasks, shots, seeds
    assert len({cell.folder(out) for cell in cells}) == 16
    assert len({cell.model(out) for cell in cells if cell.entry == "d24fad"}) == 4  # shots share a model
    assert len(read_cells(cell.folder(out) for cell in cells)) == 16


def test_a_cell_holds_what_evaluate_says(finished, phantom, make_detector):
    whole, out = finished
    cell = next(c for c in whole.cells() if (c.entry, c.task, c.shots, c.seed) == ("nearest", "head_ct", 2, 1))
    (found,) = read_cells([cell.folder(out)])
    (expected,) = evaluate(make_detector("nearest"), phantom, task="head_ct", shots=[2], draws=2, seed=1)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    assert found.labels.tolist() == [row.label for row in expected.samples]
    assert found.metrics[1]["auroc"] == pytest.approx(expected.metrics[1]["auroc"])


def test_a_few_shot_model_is_trained_on_the_other_tasks(finished):
    whole, out = finished
    cell = next(c for c in whole.cells() if c.entry == "d24fad" and c.task == "head_ct")
    facts = json.loads((cell.model(out) / "config.json").read_text())
    assert facts["training"]["tasks"] == ["brain_mr"]
    assert facts["training"]["seed"] == cell.seed


def test_everybody_gets_the_same_supports(finished, phantom):
    whole, out = finished
    drawn = read_support_lists(out / "supports.json", phantom)
    assert drawn["head_ct"][1] == draw_supports(phantom, task="head_ct", shots=2, draws=2, seed=1)
    by_place = {}
    for cell in whole.cells():
        key = json.loads((cell.folder(out) / CELL).read_text())["key"]
        first = [draw[: cell.shots] for draw in drawn[cell.task][cell.seed]]
        assert key["supports"] == lists_digest({cell.task: {cell.seed: first}})
        by_place.setdefault((cell.task, cell.shots, cell.seed), set()).add(key["supports"])
    assert {len(digests) for digests in by_place.values()} == {1}


def test_costs_are_measured(finished):
    whole, out = finished
    for cell in read_cells(cell.folder(out) for cell in whole.cells()):
        assert cell.seconds > 0
        assert 50 < cell.peak_mib < 20_000
        assert (cell.training.get("seconds", 0) > 0) == (cell.entry == "d24fad")


def test_one_class_gets_all_normals_or_as_many_as_it_may(phantom, tmp_path):
    few = Entry("three", NEAREST.config, images=3)
    whole = grid(phantom, NEAREST, few, PDD, protocol="one_class", tasks=("head_ct",), seeds=(0,))
    assert run_grid(whole, tmp_path) == []
    shots = {
        cell.entry: json.loads((cell.folder(tmp_path) / "evaluation.json").read_text())[0]["shots"]
        for cell in whole.cells()
    }
    assert shots == {"nearest": 8, "three": 3, "pdd": 0}
    facts = json.loads((whole.cells()[-1].model(tmp_path) / "config.json").read_text())
    assert facts["training"]["tasks"] == ["head_ct"]
    assert not (tmp_path / "supports.json").exists()


def test_one_class_counts_copies_once(phantom, tmp_path):
    normals = phantom.select(task="head_ct", split="train").samples
    shutil.copy(normals[0].path, tmp_path / "copy.png")
    twice = replace(phantom, samples=(*phantom, replace(normals[0], path=tmp_path / "copy.png")))
    whole = grid(twice, NEAREST, protocol="one_class", tasks=("head_ct",), seeds=(0,))
    assert run_grid(whole, tmp_path / "out") == []
    assert json.loads((whole.cells()[0].folder(tmp_path / "out") / "evaluation.json").read_text())[0]["shots"] == 8


class Elsewhere(Here):
    """A cluster that is this process."""

    processors, at_once = 1, 2


def test_a_cluster_runs_the_same_cells_and_none_twice(phantom, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("ran here"))
    whole = grid(phantom, NEAREST)
    assert run_grid(whole, tmp_path, cluster=Elsewhere()) == []
    for cell in whole.cells():
        one, two = (json.loads((cell.folder(out) / "evaluation.json").read_text()) for out in (tmp_path, finished[1]))
        assert one == two
    monkeypatch.setattr(Elsewhere, "submit", lambda *_: pytest.fail("ran again"))
    assert run_grid(whole, tmp_path, cluster=Elsewhere()) == []


# --- never twice ---


def test_what_is_finished_is_not_run_again(finished, work):
    whole, out = finished
    before = contents(out)
    steps = []
    assert run_grid(whole, out, on_step=lambda *step: steps.append(step)) == []
    assert work == []
    assert steps == [((), 16, 16)]
    assert contents(out) == before


def test_a_run_that_was_killed_goes_on_where_it_stopped(finished, tmp_path, work, monkeypatch):
    whole, out = finished
    real, left = benchmark._run_cell, [5]

    def dying(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "_run_cell", dying)
        with pytest.raises(KeyboardInterrupt):
            run_grid(whole, tmp_path)
    survived = {cell for cell in whole.cells() if (cell.folder(tmp_path) / CELL).exists()}
    assert len(survived) == 5
    work.clear()
    steps = []
    run_grid(whole, tmp_path, on_step=lambda *step: steps.append(step))
    assert list(dict.fromkeys(step[1:] for step in steps)) == [(done, 16) for done in range(5, 17)]
    again = [cell for name, cell in work if name == "_run_cell"]
    assert len(again) == 11
    assert not survived.intersection(again)
    assert contents(tmp_path) == contents(out)


def test_a_cell_without_its_last_file_is_run_again(copied, work):
    whole, out = copied
    cell = whole.cells()[3]
    (cell.folder(out) / CELL).unlink()
    run_grid(whole, out)
    assert work == [("_run_cell", cell)]


def test_a_larger_grid_adds_cells(copied, phantom, work):
    whole, out = copied
    run_grid(replace(whole, shots=(1, 2, 3)), out)
    assert {cell.shots for name, cell in work if name == "_run_cell"} == {3}
    assert len(work) == 8 + 4  # cells, and trainings that find themselves finished


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda g: replace(g, draws=3), "draws 2, now 3"),
        (lambda g: replace(g, entries=[replace(NEAREST, images=2)]), "images 0, now 2"),
        (lambda g: replace(g, entries=[replace(NEAREST, config=replace(NEAREST.config, task_intensity={}))]), None),
        (
            lambda g: replace(
                g, entries=[replace(NEAREST, config=replace(NEAREST.config, preprocessing=Preprocessing((96, 96))))]
            ),
            r"settings.preprocessing.size \[64, 64\], now \[96, 96\]",
        ),
    ],
)
def test_cells_of_other_settings_are_refused(copied, work, change, named):
    whole, out = copied
    other = change(replace(whole, entries=[NEAREST]))
    if named is None:
        run_grid(other, out)
    else:
        with pytest.raises(ConfigError, match=rf"another benchmark \({named}"):
            run_grid(other, out)
    assert work == []


@pytest.mark.parametrize("kind", ["image", "mask", "label"])
def test_cells_of_other_data_are_refused(phantom, tmp_path, kind):
    shutil.copytree(phantom.source.parent, tmp_path / "data")
    data = load_manifest(tmp_path / "data" / "manifest.csv")
    data = replace(data, samples=tuple(replace(row, sha256=None) for row in data))
    whole = grid(data, tasks=("head_ct",), seeds=(0,), shots=(1,), draws=1)
    run_grid(whole, tmp_path / "out")
    row = next(row for row in data.select(task="head_ct", split="test") if row.mask is not None)
    rows = data.samples
    if kind == "label":
        rows = tuple(replace(each, label=0) if each == row else each for each in rows)
    else:
        file = row.path if kind == "image" else row.mask
        file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ConfigError, match="other images"):
        run_grid(replace(whole, manifest=replace(data, samples=rows)), tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, '{"key": 5}', '{"key": {"settings": {"method": {"name": "no"}}}}']
)
def test_a_damaged_cell_is_named(copied, text):
    whole, out = copied
    (whole.cells()[0].folder(out) / CELL).write_text(text)
    with pytest.raises(ConfigError, match=r"cell.json: is damaged. Delete the folder"):
        run_grid(whole, out)


# --- what goes wrong in one cell ---


def test_a_cell_that_fails_costs_the_others_nothing(phantom, tmp_path, monkeypatch, work):
    whole = grid(phantom, NEAREST, D24FAD, seeds=(0,), shots=(1,))
    run, train = benchmark._run_cell, benchmark._train

    def broken(real, trouble):
        def run_or_fail(grid, cell, *rest):
            if cell.task == "head_ct":
                raise trouble
            return real(grid, cell, *rest)

        return run_or_fail

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "_run_cell", broken(run, ZeroDivisionError("ouch")))
        patch.setattr(benchmark, "_train", broken(train, ReadError("scan.png: is damaged.")))
        failures = run_grid(whole, tmp_path)
    assert failures == [
        Failure("head_ct, nearest (efficientnet_lite0), K = 1, seed 0", "ZeroDivisionError: ouch"),
        Failure("head_ct, d24fad (efficientnet_lite0), K = 1, seed 0", "scan.png: is damaged."),
    ]
    work.clear()
    assert run_grid(whole, tmp_path) == []
    assert {cell.task for _, cell in work} == {"head_ct"}


def test_a_process_that_dies_leaves_the_rest_to_the_next_run(phantom, tmp_path, monkeypatch):
    class Dying(Here):
        def submit(self, function, *arguments):
            if arguments[1].task == "head_ct":
                job = Future()
                job.set_exception(BrokenProcessPool())
                return job
            return super().submit(function, *arguments)

    whole = grid(phantom, seeds=(0,), shots=(1,))
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Dying)
    (failure,) = run_grid(whole, tmp_path)
    assert "killed, probably for want of memory" in failure.reason
    assert "head_ct" in failure.cell


# --- fixed supports ---


def test_fixed_supports_give_the_same_figures(finished, tmp_path):
    whole, out = finished
    run_grid(replace(whole, entries=[NEAREST], supports=out / "supports.json"), tmp_path)
    same = contents(tmp_path)
    assert len(same) == 3 * 8 + 1
    assert same == {name: content for name, content in contents(out).items() if "d24fad" not in name.parts}


def test_fixed_supports_are_really_used(finished, phantom, tmp_path):
    from anatomaly.evaluation.support_lists import write_support_lists

    whole, _ = finished
    normals = phantom.select(task="head_ct", split="train").samples
    write_support_lists({"head_ct": {0: [normals[:2], normals[2:4]]}}, tmp_path / "mine.json")
    mine = replace(whole, entries=[NEAREST], tasks=("head_ct",), seeds=(0,), supports=tmp_path / "mine.json")
    run_grid(mine, tmp_path / "out")
    draws = (mine.cells()[1].folder(tmp_path / "out") / "draws.csv").read_text()
    assert f"{normals[2].name};{normals[3].name}" in draws


@pytest.mark.parametrize("change", [{"shots": (1, 3)}, {"draws": 3}, {"seeds": (0, 5)}])
def test_too_few_fixed_supports_are_refused(finished, tmp_path, change):
    whole, out = finished
    short = replace(whole, entries=[NEAREST], supports=out / "supports.json", **change)
    with pytest.raises(ConfigError, match=r"supports.json: task '\w+', seed \d: lists \d draws of \d images, expected"):
        run_grid(short, tmp_path)


def test_fixed_supports_that_are_tested_are_refused(finished, phantom, tmp_path):
    from anatomaly.evaluation.support_lists import write_support_lists

    tests = phantom.select(task="head_ct", split="test", label=0).samples
    write_support_lists({"head_ct": {0: [tests[:2], tests[2:4]]}}, tmp_path / "leak.json")
    leak = replace(finished[0], tasks=("head_ct",), seeds=(0,), supports=tmp_path / "leak.json")
    with pytest.raises(ConfigError, match="share image or patient with the test set"):
        run_grid(leak, tmp_path / "out")


# --- what is refused before anything runs ---


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ([], {}, "methods: got none"),
        ([NEAREST, NEAREST], {}, "methods: got nearest, nearest"),
        ([NEAREST], {"seeds": ()}, "seeds: got none"),
        ([NEAREST], {"seeds": (1, 1)}, "seeds: got 1, 1"),
        ([NEAREST], {"shots": ()}, "shots: got none"),
        ([NEAREST], {"shots": (2, 2)}, "shots: got 2, 2"),
        ([NEAREST], {"tasks": ("head_ct", "head_ct")}, "tasks: got head_ct, head_ct"),
        ([NEAREST], {"shots": (0,)}, "shots"),
        ([NEAREST], {"draws": 0}, "0 draws"),
        ([PDD], {}, "pdd is a one-class method. Set protocol: one_class"),
        ([D24FAD], {"protocol": "one_class"}, "d24fad trains on other tasks. Set protocol: few_shot"),
    ],
)
def test_grids_that_cannot_work_are_refused_at_once(phantom, entries, changes, message):
    settings = {"protocol": "few_shot", **changes}
    with pytest.raises(ConfigError, match=message):
        Grid(phantom, settings.pop("protocol"), entries, [BASE.teacher], **settings)


def test_an_entry_may_have_a_teacher_of_its_own(phantom):
    own = TeacherConfig("timm/resnet18", "random")
    alone = Entry("alone", NEAREST.config, teacher=own)
    whole = grid(phantom, NEAREST, alone, tasks=("head_ct",), seeds=(0,), shots=(2,))
    teachers = {cell.entry: settings_of(whole, cell).teacher for cell in whole.cells()}
    assert len(whole.cells()) == 2
    assert teachers == {"nearest": BASE.teacher, "alone": own}
    assert {cell.teacher for cell in Grid(phantom, "few_shot", [alone], ()).cells()} == {"timm/resnet18"}
    with pytest.raises(ConfigError, match="teachers: got none"):
        Grid(phantom, "few_shot", [alone, NEAREST], ())


def test_peers_that_cannot_work_are_refused_at_once(phantom, monkeypatch):
    monkeypatch.setattr(anomalib_bridge, "find_spec", lambda name: None)
    with pytest.raises(NotReadyError, match=r"anomalib is not installed. Run: pip install 'anatomaly\[peers\]'"):
        grid(phantom, Entry("padim", BASE, peer="padim"))
    with pytest.raises(ConfigError, match="knn: got option shots=3"):
        grid(phantom, Entry("knn", BASE, peer="knn", options={"shots": 3}))


def test_the_floor_is_a_peer_like_any_other(phantom, tmp_path):
    whole = grid(phantom, NEAREST, Entry("knn", BASE, peer="knn"), seeds=(0,), shots=(2,))
    assert run_grid(whole, tmp_path) == []
    assert {cell.entry for cell in read_cells(cell.folder(tmp_path) for cell in whole.cells())} == {"nearest", "knn"}


def test_attention_is_a_one_class_method_too(phantom, tmp_path):
    untrained = replace(BASE, method=MethodConfig(name="attention"), training=replace(BASE.training, epochs=0))
    entries = [Entry("attention", untrained, images=3), NEAREST]
    whole = Grid(phantom, "one_class", entries, [BASE.teacher], tasks=("head_ct",), seeds=(0,))
    assert run_grid(whole, tmp_path) == []
    found = {cell.entry: cell for cell in read_cells(cell.folder(tmp_path) for cell in whole.cells())}
    (model,) = (tmp_path / "models").rglob("config.json")
    assert json.loads(model.read_text(encoding="utf-8"))["training"]["tasks"] == ["head_ct"]
    assert set(found) == {"attention", "nearest"}


def test_tasks_that_cannot_be_judged_are_refused_at_once(phantom):
    with pytest.raises(ManifestError, match="no task 'liver'"):
        grid(phantom, tasks=("liver",))
    normal = replace(phantom, samples=tuple(row for row in phantom if row.label == 0))
    with pytest.raises(ConfigError, match="needs normal and anomalous images"):
        grid(normal)


def test_supports_are_for_few_shots_only(phantom, tmp_path):
    with pytest.raises(ConfigError, match="few_shot only"):
        run_grid(grid(phantom, protocol="one_class", supports=tmp_path / "x.json"), tmp_path)


def test_names_become_folders():
    assert slug("timm/wide_resnet50_2.racm_in1k") == "timm_wide_resnet50_2.racm_in1k"
    assert slug("../x y") == "___x_y"
    assert slug("..") == "__"


# --- the command ---


SMALL = ["--preprocessing.size", "[64, 64]", "--shots", "1", "--draws", "2", "--seeds", "0"]


def test_the_command_takes_the_teacher_of_a_method_over_the_common_ones(phantom, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("anatomaly.benchmark.run.run_grid", lambda grid, out, **_: asked.append(grid) or [])
    methods = "{nearest: {}, large: {method: {name: nearest}, teacher: {name: efficientnet_lite2}}}"
    words = ["--data", str(phantom.source), "--out", str(tmp_path), "--methods", methods, *SMALL]
    assert main(["benchmark", *words, "--teachers", "[efficientnet_lite0, timm/resnet18]"]) == 0
    (whole,) = asked
    found = {(cell.entry, cell.teacher) for cell in whole.cells()}
    both = {("nearest", "efficientnet_lite0"), ("nearest", "timm/resnet18")}
    assert found == {*both, ("large", "efficientnet_lite2")}


def test_the_command_writes_a_leaderboard(phantom, tmp_path, capsys):
    settings = tmp_path / "grid.yaml"
    settings.write_text(
        f"data: {phantom.source}\nout: {tmp_path / 'out'}\nmethods:\n  nearest:\n"
        "  mean:\n    method: {name: nearest}\n    scoring: {pooling: mean}\n"
        "preprocessing: {size: [64, 64]}\nshots: [1, 2]\ndraws: 2\nseeds: [0]\n"
    )
    assert main(["benchmark", "-c", str(settings)]) == 0
    said = capsys.readouterr().out
    assert "nearest" in said
    assert "mean of tasks" not in said
    assert "leaderboard.html" in said
    table = (tmp_path / "out" / "leaderboard.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * 2 * 2
    duels = (tmp_path / "out" / "comparisons.csv").read_text()
    assert ",mean,efficientnet_lite0,nearest," in duels
    digest = json.loads((tmp_path / "out" / "supports.json").read_text())["digest"]
    assert (
        f"Protocol few_shot. The supports are those of supports.json, digest {digest[:16]}."
        in (tmp_path / "out" / "leaderboard.md").read_text()
    )


@pytest.mark.parametrize("given", ["file", "flag"])
def test_numbers_that_no_option_has_a_type_for_are_numbers(given, phantom, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("anatomaly.benchmark.run.run_grid", lambda grid, out, **_: asked.append(grid) or [])
    methods = "{nearest: {images: 64}, attention: {training: {epochs: 3}}}"
    words = ["--data", str(phantom.source), "--out", str(tmp_path / "out"), *SMALL, "--methods", methods]
    if given == "file":
        (tmp_path / "grid.yaml").write_text(f"methods: {methods}\n")
        words = [*words[:-2], "-c", str(tmp_path / "grid.yaml")]
    assert main(["benchmark", *words]) == 0
    ((nearest, attention),) = (grid.entries for grid in asked)
    assert nearest.images == 64
    assert attention.config.training.epochs == 3


def test_a_peers_options_have_the_types_of_yaml(monkeypatch):
    monkeypatch.setattr("anatomaly.benchmark.peers.PEERS", {"padim": None})
    entry = _entry("padim", {"options": {"features": "50", "layers": ["1", "2"], "pre_trained": "false"}}, {})
    assert entry.options == {"features": 50, "layers": [1, 2], "pre_trained": False}


def test_the_command_works_in_processes_of_its_own(phantom, tmp_path, monkeypatch, capsys):
    from concurrent.futures import ProcessPoolExecutor

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", ProcessPoolExecutor)
    words = ["benchmark", "--data", str(phantom.source), "--out", str(tmp_path / "out"), "--methods", "[nearest]"]
    monkeypatch.setattr("anatomaly.commands.progress._EVERY", 0)
    assert main([*words, *SMALL, "--jobs", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Image AUROC by task")
    told = [line for line in captured.err.splitlines() if line.startswith("benchmark: ")]
    names = [f"{task}, nearest (efficientnet_lite0), K = 1, seed 0" for task in ("brain_mr", "head_ct")]
    assert f"benchmark: 0 of 2 cells, now {'; '.join(names)}" in told, "what runs"
    assert told[-1].startswith("benchmark: 2 of 2 cells, ")
    assert len(list((tmp_path / "out").glob("cells/**/cell.json"))) == 2
    here = tmp_path / "here"
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Here)
    assert main([*words[:4], str(here), *words[5:], *SMALL]) == 0
    # intervals: see `quick`
    scores = [
        name for name in contents(here) if name.name in ("test_scores.csv", "supports.json")
    ]  # intervals: see `quick`
    assert len(scores) == 3
    for name in scores:
        assert (tmp_path / "out" / name).read_bytes() == (here / name).read_bytes()


def test_a_worker_ends_with_its_parent():
    """A process whose parent is killed is gone within seconds, whatever it is doing."""
    code = (
        "import multiprocessing as m, time, os\n"
        "from anatomaly.benchmark.run import _start_worker\n"
        "def work():\n    _start_worker(1); print(os.getpid(), flush=True); time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    p = m.get_context('fork').Process(target=work); p.start(); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(300):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "[]"], "no methods"),
        (["--methods", "[best]"], "methods.best: which method"),
        (["--methods", "{x: {peer: best}}"], "unknown peer 'best'"),
        (["--methods", "{nearest: {images: few}}"], "images as a whole number"),
        (["--methods", "{nearest: 3}"], "methods.nearest is 3"),
        (["--methods", "{nearest: {trainin: {epochs: 3}}}"], "methods.nearest: .*trainin"),
        (["--methods", "{nearest: {training: {epochs: -3}}}"], "training.epochs: got -3"),
        (["--methods", "{x: {preset: pdd-papr}}"], "Did you mean pdd-paper"),
        (["--methods", "[nearest]", "--reference", "d24fad"], "reference 'd24fad' is not among the methods, nearest"),
        (["--methods", "[nearest]", "--jobs", "0"], "jobs is 0"),
        (["--methods", "[nearest, nearest]"], "nearest is named twice"),
        (["--methods", "[nearest]", "--teachers", "[resnet9000]"], "unknown name 'resnet9000'"),
        (["--methods", "[nearest]", "--protocol", "zero_shot"], "few_shot"),
    ],
)
def test_settings_that_make_no_sense_get_one_line(phantom, tmp_path, capsys, words, message):
    import re

    assert main(["benchmark", "--data", str(phantom.source), "--out", str(tmp_path / "o"), *SMALL, *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.search(message, said[0])
    assert not (tmp_path / "o").exists()


def test_a_preset_is_where_an_entry_starts(phantom):
    from anatomaly.commands.benchmark import _entry

    entry = _entry("paper", {"preset": "pdd-release", "training": {"epochs": 3}}, COMMON)
    assert entry.config.method.settings.cosine_sign == "release"
    assert entry.config.training.epochs == 3
    assert entry.config.training.learning_rate == 2e-3
    assert entry.config.preprocessing.size == (256, 256)


def test_an_entry_starts_from_the_common_settings():
    from anatomaly.commands.benchmark import _entry

    entry = _entry("nearest", {"scoring": {"pooling": "topk"}}, COMMON)
    assert entry.config == replace(NEAREST.config, scoring=replace(BASE.scoring, pooling="topk"))
    assert (entry.peer, entry.images) == (None, 0)
    assert Path(entry.name) == Path("nearest")


def test_a_setting_of_an_entry_is_never_dropped():
    from anatomaly.commands.benchmark import _entry

    entry = _entry("former", {"method": {"name": "d24fad", "tsd_weight": 0.5}}, COMMON)
    assert entry.config.method.settings.tsd_weight == 0.5
    with pytest.raises(ConfigError, match=r"methods\.typo: .*tsd_wieght"):
        _entry("typo", {"method": {"name": "d24fad", "tsd_wieght": 0.5}}, COMMON)
