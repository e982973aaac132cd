"""The leaderboard: figures of many cells in one row, fair duels, and tables that say so."""

import csv
import json
import os
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from anatomaly.benchmark import leaderboard
from anatomaly.benchmark.leaderboard import ALL_TASKS, Finished, Place, duels, rank, read_cells
from anatomaly.benchmark.tables import tables, write_leaderboard
from anatomaly.errors import ConfigError
from anatomaly.evaluation.comparison import compare_auroc, holm
from anatomaly.evaluation.metrics import bootstrap

N = 60


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leaderboard, "bootstrap", partial(bootstrap, samples=50))


def cell(entry, strength, *, task="brain", shots=4, seed=0, draws=2, teacher="lite0", groups=None, **changes):
    """A cell whose scores separate the classes by `strength` standard deviations."""
    rng = np.random.default_rng([seed, shots, len(task), sum(entry.encode())])
    labels = np.arange(N) % 2
    scores = rng.normal(size=(draws, N)) + strength * labels
    metrics = tuple({"auroc": roc_auc_score(labels, row), "f1max": 0.5} for row in scores)
    images = tuple((f"{task}_{i}.png", "") for i in range(N))
    settings = {"seconds": 6.0, "peak_mib": 300.0 + seed, "training": {}, **changes}
    return Finished(entry, teacher, task, shots, seed, images, labels, groups, scores, metrics, **settings)


CELLS = [
    cell(entry, strength, task=task, shots=shots, seed=seed)
    for entry, strength in (("good", 2.0), ("fair", 1.0), ("nearest", 0.9))
    for task in ("brain", "chest")
    for shots in (2, 4)
    for seed in (0, 1, 2)
]


def test_a_row_is_the_mean_over_seeds_and_draws():
    members = [c for c in CELLS if (c.entry, c.task, c.shots) == ("good", "brain", 4)]
    row = next(row for row in rank(CELLS) if row.place == Place("brain", 4, "good", "lite0"))
    by_hand = [roc_auc_score(c.labels, scores) for c in members for scores in c.scores]
    assert len(by_hand) == 6
    mean, sd = row.metrics["auroc"]
    assert mean == pytest.approx(np.mean(by_hand))
    assert sd == pytest.approx(np.std(by_hand, ddof=1))
    assert row.low < mean < row.high
    assert (row.seeds, row.draws, row.images) == (3, 2, N)
    assert row.milliseconds == pytest.approx(1000 * 6.0 / (2 * N))
    assert row.peak_mib == 302.0
    assert row.training_seconds is None


def test_training_costs_are_those_that_were_measured():
    measured = [replace(c, training={"seconds": 100.0 * c.seed, "peak_mib": None}) for c in CELLS if c.seed]
    rows = rank([*measured, *(c for c in CELLS if not c.seed)])
    assert {row.training_seconds for row in rows} == {150.0}
    unknown = rank([replace(c, peak_mib=None) for c in CELLS])
    assert {row.peak_mib for row in unknown} == {None}


def test_rows_are_ordered_by_task_shots_and_auroc():
    places = [(row.place.task, row.place.shots) for row in rank(CELLS)]
    assert places == sorted(places)
    for start in range(0, len(places), 3):
        values = [row.metrics["auroc"][0] for row in rank(CELLS)[start : start + 3]]
        assert values == sorted(values, reverse=True)


def test_a_duel_is_paired_on_images_seeds_and_draws():
    fought = duels(CELLS, reference="nearest")
    assert {duel.place.entry for duel in fought} == {"good", "fair"}
    duel = next(d for d in fought if d.place == Place("chest", 2, "good", "lite0"))
    one, two = (
        np.concatenate([c.scores for c in CELLS if (c.entry, c.task, c.shots) == (entry, "chest", 2)])
        for entry in ("good", "nearest")
    )
    expected = compare_auroc(one, two, CELLS[0].labels)
    assert duel.difference.difference == pytest.approx(expected.difference)
    assert duel.difference.p == pytest.approx(expected.p)
    assert duel.difference.difference > 0


def test_p_values_are_adjusted_among_single_tasks_and_among_means():
    fought = duels(CELLS, reference="nearest")
    single = [d for d in fought if d.place.task != ALL_TASKS]
    over_all = [d for d in fought if d.place.task == ALL_TASKS]
    assert (len(single), len(over_all)) == (8, 4)
    for family in (single, over_all):
        assert [d.adjusted for d in family] == pytest.approx(list(holm([d.difference.p for d in family])))


def test_the_mean_over_tasks_adds_variances():
    fought = {d.place: d.difference for d in duels(CELLS, reference="nearest")}
    parts = [fought[Place(task, 4, "good", "lite0")] for task in ("brain", "chest")]
    whole = fought[Place(ALL_TASKS, 4, "good", "lite0")]
    assert whole.difference == pytest.approx(np.mean([part.difference for part in parts]))
    reach = np.sqrt(sum((part.high - part.low) ** 2 for part in parts)) / 2
    assert whole.high - whole.low == pytest.approx(reach)
    assert whole.p < min(part.p for part in parts)


def test_a_method_equal_to_the_reference_is_not_significant():
    twins = [replace(c, entry="twin") for c in CELLS if c.entry == "nearest"]
    for duel in duels([*CELLS, *twins], reference="nearest"):
        if duel.place.entry == "twin":
            assert duel.difference.difference == 0
            assert duel.difference.p == duel.adjusted == 1


def test_a_seed_that_only_one_has_finished_takes_no_part():
    """The reference lacks seed 2: as if nobody had run it."""
    lacking = [c for c in CELLS if c.entry != "nearest" or c.seed != 2]
    found = {d.place: d.difference for d in duels(lacking, reference="nearest")}
    assert found == {d.place: d.difference for d in duels([c for c in CELLS if c.seed != 2], reference="nearest")}
    assert not duels([c for c in CELLS if (c.entry == "nearest") == (c.seed == 2)], reference="nearest")


@pytest.mark.parametrize("groups", [None, ("p0", "p1") * (N // 2)])
def test_one_image_or_patient_of_a_class_is_not_compared(groups):
    labels = CELLS[0].labels if groups else (np.arange(N) == 7).astype(int)
    lonely = [replace(c, labels=labels, groups=groups) for c in CELLS]
    assert duels(lonely, reference="nearest") == []


def test_rows_of_fewer_seeds_say_so():
    lacking = [c for c in CELLS if c.entry != "fair" or c.seed == 0]
    section = next(s for s in tables(rank(lacking), []) if s.title.startswith("brain, K = 2"))
    assert "3 seeds × 2 draws" in section.title
    place = section.columns.index("seeds")
    assert {line[0]: line[place] for line in section.rows} == {"good": "3", "fair": "1", "nearest": "3"}
    assert all("seeds" not in section.columns for section in tables(rank(CELLS), []))


def test_the_mean_needs_all_tasks():
    partial_cells = [c for c in CELLS if not (c.entry == "fair" and c.task == "chest")]
    means = {d.place.entry for d in duels(partial_cells, reference="nearest") if d.place.task == ALL_TASKS}
    assert means == {"good"}
    nobody = [c for c in CELLS if c.entry == "nearest" or c.task != "chest"]
    assert not any(d.place.task == ALL_TASKS for d in duels(nobody, reference="nearest"))


def test_each_teacher_has_its_own_reference():
    other = [replace(c, teacher="lite2", scores=c.scores + 0.1 * np.arange(N)) for c in CELLS]
    fought = duels([*CELLS, *other], reference="nearest")
    assert {d.place.teacher for d in fought} == {"lite0", "lite2"}
    only_one = [c for c in other if c.entry != "nearest"]
    assert {d.place.teacher for d in duels([*CELLS, *only_one], reference="nearest")} == {"lite0"}


def test_a_reference_that_took_no_part_is_refused():
    with pytest.raises(ConfigError, match="'padim' has no finished cells"):
        duels(CELLS, reference="padim")


def test_other_images_are_not_compared():
    stranger = replace(CELLS[0], images=(("other.png", ""), *CELLS[0].images[1:]))
    for cells in ([stranger, *CELLS[1:]],):
        with pytest.raises(ConfigError, match="scored other images"):
            rank(cells)
    with pytest.raises(ConfigError, match="scored other images"):
        duels([replace(c, images=stranger.images) if c.entry == "good" else c for c in CELLS], reference="nearest")


def test_patients_widen_the_intervals():
    groups = tuple(f"p{i // 10}" for i in range(N))
    clustered = [replace(c, scores=c.scores + np.repeat(np.arange(6) % 3, 10)) for c in CELLS]
    alone = {d.place: d.difference for d in duels(clustered, reference="nearest")}
    by_patient = {
        d.place: d.difference for d in duels([replace(c, groups=groups) for c in clustered], reference="nearest")
    }
    assert alone.keys() == by_patient.keys()
    assert any(by_patient[place].p != alone[place].p for place in alone)


# --- the files ---


def written(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_csv_holds_every_figure(tmp_path):
    rows, fought = write_leaderboard(CELLS, tmp_path, reference="nearest")
    table = written(tmp_path / "leaderboard.csv")
    assert len(table) == len(rows) == 12
    for line, row in zip(table, rows, strict=True):
        assert (line["task"], line["method"], int(line["shots"])) == (row.place.task, row.place.entry, row.place.shots)
        assert float(line["auroc"]) == row.metrics["auroc"][0]
        assert float(line["auroc_sd"]) == row.metrics["auroc"][1]
        assert float(line["auroc_low"]) == row.low
        assert line["training_seconds"] == ""
    compared = written(tmp_path / "comparisons.csv")
    assert [float(line["p_holm"]) for line in compared] == [duel.adjusted for duel in fought]
    assert [float(line["difference"]) for line in compared] == [duel.difference.difference for duel in fought]


def test_a_single_value_has_no_spread(tmp_path):
    alone = [replace(CELLS[0], scores=CELLS[0].scores[:1], metrics=CELLS[0].metrics[:1], shots=0)]
    write_leaderboard(alone, tmp_path, reference=None)
    (line,) = written(tmp_path / "leaderboard.csv")
    assert line["auroc_sd"] == ""
    assert "nan" not in (tmp_path / "leaderboard.md").read_text()
    assert written(tmp_path / "comparisons.csv") == []


def test_people_see_the_best_in_bold(tmp_path):
    write_leaderboard(CELLS, tmp_path, reference="nearest", note="A test.")
    text = (tmp_path / "leaderboard.md").read_text()
    overview = text[text.index("## Image AUROC by task") : text.index("## brain")]
    assert [line.split(" | ")[0] for line in overview.splitlines() if "**" in line] == ["| **good**"] * 2
    assert "A test." in text
    page = (tmp_path / "leaderboard.html").read_text()
    assert page.count("<table>") == text.count("## ")
    assert page.count("<tr>") == page.count("</tr>")
    assert "<b>good</b>" in page
    assert "http" not in re.sub("Content-Security-Policy|http-equiv", "", page)


def test_names_cannot_break_the_page(tmp_path):
    odd = [replace(c, entry="<script>alert(1)</script>") for c in CELLS]
    write_leaderboard(odd, tmp_path, reference=None, note="<b>")
    assert "<script>" not in (tmp_path / "leaderboard.html").read_text()


def test_the_overview_has_one_column_per_task_and_no_mean_of_holes():
    holes = [c for c in CELLS if not (c.entry == "fair" and c.task == "chest")]
    (overview, *_) = tables(rank(holes), [])
    assert list(overview.columns) == ["method", "K", "brain", "chest", "mean"]
    fair = [line for line in overview.rows if line[0] == "fair"]
    assert [line[-1] for line in fair] == ["", ""]
    assert [line[-2] for line in fair] == ["", ""]
    assert overview.bold == {(0, 0), (3, 0)}


def test_one_class_has_no_column_for_shots():
    one_class = [replace(c, shots=0) for c in CELLS if c.shots == 2]
    sections = tables(rank(one_class), duels(one_class, reference="nearest"))
    assert not any("K" in section.columns for section in sections)


# --- reading ---


def stored(folder, **changes):
    folder.mkdir(parents=True)
    facts = {
        "key": {"cell": {"entry": "good", "teacher": "lite0", "task": "brain", "shots": 2, "seed": 1}},
        "seconds": 2.5,
        "peak_mib": None,
        "training": {"seconds": 3.0, "peak_mib": 9.0},
        **changes,
    }
    (folder / "cell.json").write_text(json.dumps(facts))
    (folder / "draws.csv").write_text(
        "task,shots,draw,supports,auroc,aupro\nbrain,2,0,a.png;b.png,0.5,\nbrain,2,1,c.png;d.png,1.0,0.25\n"
    )
    (folder / "test_scores.csv").write_text(
        "task,shots,draw,path,frame,patient,label,score\n"
        "brain,2,0,x.png,,p1,0,1.5\nbrain,2,0,y.png,3,p2,1,1.25\nbrain,2,1,x.png,,p1,0,1\nbrain,2,1,y.png,3,p2,1,2\n"
    )
    return folder


def test_a_cell_is_read_back(tmp_path):
    (found,) = read_cells([stored(tmp_path / "a"), tmp_path / "not there"])
    assert found.images == (("x.png", ""), ("y.png", "3"))
    assert found.scores.tolist() == [[1.5, 1.25], [1.0, 2.0]]
    assert found.labels.tolist() == [0, 1]
    assert found.groups == ("p1", "p2")
    assert found.metrics == ({"auroc": 0.5}, {"auroc": 1.0, "aupro": 0.25})
    assert (found.seconds, found.peak_mib, found.training["seconds"]) == (2.5, None, 3.0)


def test_a_cell_of_an_earlier_version_is_read_back(tmp_path):
    """Its table of scores was called like that of `predict`."""
    folder = stored(tmp_path / "a")
    (now,) = read_cells([folder])
    (folder / "test_scores.csv").rename(folder / "scores.csv")
    (then,) = read_cells([folder])
    assert str(then) == str(now)


def test_one_unknown_patient_means_no_patients(tmp_path):
    folder = stored(tmp_path / "a")
    text = (folder / "test_scores.csv").read_text()
    (folder / "test_scores.csv").write_text(text.replace("p2", ""))
    assert read_cells([folder])[0].groups is None


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.update(training=5),
        lambda facts: facts.update(training={"seconds": "long"}),
        lambda facts: facts.update(peak_mib=[1]),
        lambda facts: facts["key"]["cell"].update(task=["ct"]),
        lambda facts: facts.update(key=[]),
    ],
)
def test_a_cell_whose_facts_are_of_another_type_is_damaged(tmp_path, change):
    folder = stored(tmp_path / "a")
    facts = json.loads((folder / "cell.json").read_text())
    change(facts)
    (folder / "cell.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="damaged cell"):
        read_cells([folder])


def test_a_cell_that_is_nested_too_deep_or_holds_a_pipe_is_damaged(tmp_path):
    folder = stored(tmp_path / "a")
    (folder / "draws.csv").unlink()
    os.mkfifo(folder / "draws.csv")
    with pytest.raises(ConfigError, match="damaged cell"):
        read_cells([folder])
    (folder / "cell.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="damaged cell"):
        read_cells([folder])


@pytest.mark.parametrize("name", ["test_scores.csv", "draws.csv", "cell.json"])
def test_a_damaged_cell_is_named(tmp_path, name):
    folder = stored(tmp_path / "a")
    (folder / name).write_text("{" if name == "cell.json" else "draw,score,auroc,path\n0,x,y,z\n")
    with pytest.raises(ConfigError, match="damaged cell"):
        read_cells([folder])
