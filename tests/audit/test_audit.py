"""The audit of models and of foreign files: its figures against evaluate() and the loops, and how it fails."""

import csv
import io
import json
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import published_reference as reference
import pytest
from PIL import Image

from anatomaly.audit.figure import draw_audit
from anatomaly.audit.files import is_table, run_files
from anatomaly.audit.measure import Runs, measure
from anatomaly.audit.model import kept_checkpoints, run_model
from anatomaly.audit.published import RunScores, shuffled_loader
from anatomaly.audit.words import explain, table_of, tell_unreadable, write_audit
from anatomaly.backbones.weights import state_digest
from anatomaly.cli import main
from anatomaly.data.manifest import Manifest, load_manifest, write_csv
from anatomaly.detector.bundle import write_tensors
from anatomaly.detector.detector import Detector
from anatomaly.errors import ManifestError, NotReadyError, ReadError
from anatomaly.evaluation.cells import write_evaluations
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.metrics import bootstrap
from anatomaly.results.rows import COLUMNS
from anatomaly.synthetic.phantom import write_benchmark
from anatomaly.types import Sample, Scoring

TASK = "head_ct"


@pytest.fixture(autouse=True)
def quick(monkeypatch, lite0):
    """Intervals nobody looks at, and a teacher that is built once."""
    monkeypatch.setattr("anatomaly.detector.bundle.build_backbone", lambda *_, **__: lite0)
    for module in ("anatomaly.audit.measure", "anatomaly.evaluation.evaluate"):
        monkeypatch.setattr(f"{module}.bootstrap", partial(bootstrap, samples=20))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """One task: 6 normal training images, 18 normal and 17 anomalous tests."""
    out = tmp_path_factory.mktemp("scans")
    return load_manifest(write_benchmark(out, train=6, test_normal=18, test_anomalous=17, size=64, tasks=(TASK,)))


def in_file_order(manifest):
    rows = [row for row in manifest if row.split == "test"]
    return sorted(rows, key=lambda row: (row.label, row.path.as_posix()))


# --- models ---


@pytest.mark.parametrize(
    ("name", "scoring"),
    [
        ("nearest", Scoring()),
        ("pdd", Scoring()),
        ("matching", Scoring(pooling="topk", top_fraction=0.05, levels="geometric")),
    ],
)
def test_sound_scores_are_those_of_evaluate_and_published_ones_those_of_the_loops(
    name, scoring, scans, make_detector, tmp_path
):
    detector = make_detector(name, scoring=scoring)
    runs = run_model(detector, tmp_path, scans, task=TASK, shots=2, draws=2, seed=3, batch_size=5)
    (judged,) = evaluate(detector, scans, task=TASK, shots=(2,), draws=2, seed=3, batch_size=16)
    assert list(runs.samples) == in_file_order(scans)
    for draw, scores in enumerate(judged.scores):
        expected = dict(zip(judged.samples, scores, strict=True))
        np.testing.assert_allclose(runs.draws[draw].alone, [expected[row] for row in runs.samples], atol=1e-6)
    audit = measure(runs)
    assert audit.result("sound").draws == pytest.approx([draw["auroc"] for draw in judged.metrics])
    unblurred = make_detector(name, scoring=Scoring(blur=0.0))
    if detector.method.needs_support:
        unblurred.set_support(judged.supports[0], task=TASK)
    maps = [prediction.anomaly_map for prediction in unblurred.predict(runs.samples)]
    across, labels = runs.draws[0].across, runs.labels.tolist()
    np.testing.assert_allclose(across[:32], reference.published_d24fad(maps), rtol=1e-4)
    assert np.isnan(across[32:]).all()
    assert audit.result("published-d24fad").draws[0] == pytest.approx(reference.auroc(across[:32], labels[:32]))
    scores, classes = reference.published_pdd(maps, labels)
    assert audit.result("published-pdd").draws[0] == pytest.approx(reference.auroc(scores, classes))
    assert [(r.scored, r.total) for r in audit.results] == [(35, 35), (32, 35), (4, 35)]
    assert len(runs.shuffled) == 20
    assert not list(tmp_path.iterdir())


def test_the_manifests_order_changes_nothing(scans, make_detector, tmp_path):
    turned = replace(scans, samples=scans.samples[::-1])
    one, other = (
        run_model(make_detector("nearest"), tmp_path, m, task=TASK, shots=2, draws=1) for m in (scans, turned)
    )
    assert one.samples == other.samples
    np.testing.assert_allclose(one.draws[0].across[:32], other.draws[0].across[:32], atol=1e-6)


def test_unreadable_images_are_listed_and_counted(scans, make_detector, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    rows = (*scans.samples, Sample(broken, TASK, "test", 1))
    runs = run_model(make_detector("nearest"), tmp_path, replace(scans, samples=rows), task=TASK, shots=2, draws=1)
    assert [sample.path for sample, _ in runs.unreadable] == [broken]
    audit = measure(runs)
    assert (audit.result("sound").scored, audit.result("sound").total) == (35, 36)
    assert "broken.png" in explain(audit)
    line = tell_unreadable(audit)
    assert line == f"1 of 36 test images is unreadable and left out of all figures; the first: {runs.unreadable[0][1]}"
    assert "broken.png" in line
    assert "\n" not in line
    table = table_of(audit)
    assert [row[table.columns.index("unreadable")] for row in table.rows] == ["1"] * 3
    write_audit(audit, tmp_path / "out")
    figures = list(csv.DictReader(io.StringIO((tmp_path / "out/audit.csv").read_text())))
    assert {figure["unreadable"] for figure in figures} == {"1"}
    facts = json.loads((tmp_path / "out/audit.json").read_text())
    assert {each["unreadable"] for each in facts["protocols"].values()} == {1}
    assert "unreadable" not in table_of(measure(replace(runs, unreadable=()))).columns


@pytest.fixture
def kept(make_detector, tmp_path):
    """A model whose epochs 0, 2 and 4 were kept, and which chose 2: (folder, weights by epoch)."""
    detectors = {epoch: make_detector("d24fad", seed=epoch) for epoch in (0, 2, 4)}
    weights = {epoch: detector.method.state_dict() for epoch, detector in detectors.items()}
    for epoch, state in weights.items():
        write_tensors(tmp_path / f"model/training/epoch_{epoch}.safetensors", state)
    detectors[2].facts = replace(detectors[2].facts, training={"best_epoch": 2, "tasks": ["fundus"], "images": 4})
    detectors[2].save(tmp_path / "model")
    return tmp_path / "model", detectors


def test_every_kept_epoch_is_judged_like_a_model_of_its_own(kept, scans, tmp_path):
    folder, detectors = kept
    model = Detector.load(folder, device="cpu")
    few = {"task": TASK, "shots": 2, "draws": 2}
    seen = []
    runs = run_model(model, folder, scans, **few, on_image=seen.append)
    assert len(seen) == 3 * 35
    assert state_digest(model.method.state_dict()) == state_digest(detectors[2].method.state_dict())
    assert list(runs.epochs) == [0, 2, 4]
    for epoch, draws in runs.epochs.items():
        alone = run_model(detectors[epoch], tmp_path, scans, **few)
        for one, other in zip(draws, alone.draws, strict=True):
            np.testing.assert_allclose(one.across[:32], other.across[:32], atol=1e-6)
    assert runs.epochs[2] == runs.draws
    assert not np.allclose(runs.epochs[0][0].alone, runs.epochs[4][0].alone)
    audit = measure(runs)
    assert [(choice.chosen, choice.last) for choice in audit.epochs] == [(2, 4)] * 3
    assert audit.epochs[0].aurocs[2] == pytest.approx(audit.result("sound").auroc)


def test_kept_epochs_of_another_run_are_refused(kept, scans):
    folder, detectors = kept
    write_tensors(folder / "training/epoch_2.safetensors", detectors[4].method.state_dict())
    with pytest.raises(NotReadyError, match=r"epoch_2\.safetensors does not hold the model's weights"):
        run_model(Detector.load(folder, device="cpu"), folder, scans, task=TASK)


def test_without_kept_epochs_it_says_how_to_get_them(scans, make_detector, tmp_path):
    assert kept_checkpoints(tmp_path) == {}
    runs = run_model(make_detector("pdd"), tmp_path, scans, task=TASK)
    assert "--training.keep_checkpoints true" in explain(measure(runs))


# --- figures ---


def runs_of(draws, *, epochs=None, chosen=None, across=None, method="d24fad", **choices):
    """12 normal and 12 anomalous images; `draws` are how far the classes lie apart."""
    labels = np.repeat([0, 1], 12)
    noise = np.random.default_rng(0).normal(size=24)

    def scores(lift):
        values = noise + lift * labels
        return RunScores(values, values, None if across is None else np.r_[values[:16] + across, [np.nan] * 8])

    return Runs(
        source="model",
        method=method,
        task=TASK,
        shots=4,
        samples=tuple(Sample(f"{i}.png", TASK, "test", int(label)) for i, label in enumerate(labels)),
        labels=labels,
        unreadable=(),
        draws=tuple(map(scores, draws)),
        epochs={e: tuple(map(scores, lifts)) for e, lifts in (epochs or {}).items()},
        chosen=chosen,
        **choices,
    )


def auroc_at(lift, images=24):
    runs = runs_of([lift])
    return reference.auroc(runs.draws[0].alone[:images], runs.labels[:images])


def test_luck_is_the_best_draw_above_the_mean():
    result = measure(runs_of([0.2, 1.5, 0.7])).result("sound")
    values = [auroc_at(lift) for lift in (0.2, 1.5, 0.7)]
    assert result.draws == pytest.approx(values)
    assert result.luck == pytest.approx(max(values) - np.mean(values)) != 0


def test_choosing_by_test_labels_is_compared_with_the_chosen_epoch():
    runs = runs_of([0.7, 0.7], epochs={0: [0.2, 2.5], 5: [0.7, 0.7], 9: [1.5, 0.1]}, chosen=5, across=0.0)
    audit = measure(runs)
    sound, d24fad, _ = audit.epochs
    mean = {
        e: np.mean([auroc_at(lift) for lift in lifts])
        for e, lifts in ((0, (0.2, 2.5)), (5, (0.7, 0.7)), (9, (1.5, 0.1)))
    }
    assert sound.aurocs == pytest.approx(mean)
    assert sound.best == max(mean, key=mean.get) == 0
    assert (sound.last, sound.chosen) == (9, 5)
    assert sound.adds == pytest.approx(max(mean.values()) - mean[5])
    assert d24fad.aurocs[0] == pytest.approx(np.mean([auroc_at(lift, 16) for lift in (0.2, 2.5)]))
    habits = audit.as_released[0]
    assert (habits.protocol, habits.epoch) == ("published-d24fad", 9), "the best epoch of the first draw alone"
    assert habits.first == pytest.approx(auroc_at(1.5, 16))
    assert habits.luckiest == pytest.approx(max(auroc_at(1.5, 16), auroc_at(2.5, 16)))


def test_the_release_of_a_method_is_that_of_methods_like_it():
    with_support = runs_of([1.0], method="nearest", across=0.0)
    assert measure(replace(with_support, shots=0)).release == "published-pdd"
    assert measure(with_support).release == "published-d24fad"
    assert measure(runs_of([1.0], method="files")).release == "published-pdd", "there are no maps"


def test_a_mixed_batch_is_counted_as_relabelled():
    result = measure(runs_of([1.0])).result("published-pdd")
    assert (result.scored, result.relabelled) == (3, 1)  # images 0, 10 and 20; 10 is normal, its batch is mixed


def test_what_is_undefined_is_said_and_not_a_number_in_no_file(tmp_path):
    runs = runs_of([1.0])
    few = [0, 1, 2, 3, 12]  # one batch, one class
    scores = RunScores(*(runs.draws[0].alone[few] for _ in range(2)), np.full(5, np.nan))
    samples = tuple(runs.samples[i] for i in few)
    audit = measure(replace(runs, samples=samples, labels=runs.labels[few], draws=(scores,)))
    assert [result.protocol for result in audit.results] == ["sound", "published-pdd"]
    assert "not defined" in explain(audit)
    assert "**published-d24fad** scores no image" in explain(audit)
    write_audit(audit, tmp_path)
    assert "NaN" not in (tmp_path / "audit.json").read_text()
    assert json.loads((tmp_path / "audit.json").read_text())["protocols"]["published-pdd"]["auroc"] is None
    assert Image.open(tmp_path / "audit.png").width == 2000


def test_a_figure_that_cannot_be_had_is_a_dash_with_the_reason(tmp_path):
    """Two draws of five images, one of them anomalous: a single batch of ten."""
    few = [0, 1, 2, 3, 12]
    draws = []
    for draw in runs_of([1.0, 0.5]).draws:
        values = draw.alone[few]
        draws.append(RunScores(values, values, None))
    whole = runs_of([1.0])
    labels = np.array([0, 0, 0, 0, 1])
    samples = tuple(whole.samples[i] for i in few)
    audit = measure(replace(whole, samples=samples, labels=labels, draws=tuple(draws)))
    sound, first = audit.results
    assert np.isfinite(sound.auroc)
    assert np.isnan(sound.interval[1:]).all()
    assert np.isnan(first.draws).all()
    table = table_of(audit)
    assert list(table.rows[1]) == ["published-pdd", "–", "–", "–", "–", "1 of 5", "–"]
    assert table.rows[0][2] == "–"
    one = "sound: 95 % interval (it needs 2 images of a class, there is 1 anomalous one)"
    other = "image AUROC, AP, F1max, 95 % interval (it needs both classes, the one image scored is anomalous)"
    assert table.note == f"– stands for what cannot be had: {one}; published-pdd: {other}."
    write_audit(audit, tmp_path)
    text = (tmp_path / "audit.md").read_text()
    assert table.note in text
    assert "nan" not in text
    assert ",  for" not in text
    facts = json.loads((tmp_path / "audit.json").read_text())["protocols"]
    assert facts["sound"]["interval"] == [None, None]
    assert facts["sound"]["undefined"].keys() == {"interval"}
    assert facts["published-pdd"]["ap"] is None


def test_the_files_hold_the_figures(tmp_path):
    runs = runs_of([0.7, 0.7], epochs={0: [0.2, 1.0], 5: [0.7, 0.7]}, chosen=5, across=0.0, shuffled=(0.5, 0.6))
    audit = measure(runs)
    write_audit(audit, tmp_path)
    facts = json.loads((tmp_path / "audit.json").read_text())
    assert facts["protocols"]["published-d24fad"]["scored"] == 16
    assert facts["epochs"]["sound"]["choosing_by_test_auroc_adds"] == pytest.approx(audit.epochs[0].adds)
    assert facts["other_file_names"]["orders"] == 200
    lines = list(csv.DictReader(io.StringIO((tmp_path / "audit.csv").read_text())))
    kinds = {(line["evaluation"], line["what"]) for line in lines}
    assert {("sound", "epoch"), ("published-pdd", "other file names"), ("published-d24fad", "shuffled loader")} <= kinds
    assert [float(line["auroc"]) for line in lines if line["what"] == "shuffled loader"] == [0.5, 0.6]
    text = (tmp_path / "audit.md").read_text()
    for words in ("16 of 24", "0.550", "the epoch that pasted lesions chose (5)", "average precision", "8 images"):
        assert words in text
    table = table_of(audit)
    assert all(len(row) == len(table.columns) for row in table.rows)
    without = Image.open(io.BytesIO(draw_audit(replace(audit, epochs=()))))
    assert without.height < Image.open(tmp_path / "audit.png").height


# --- foreign files ---


@pytest.fixture
def foreign(tmp_path):
    """20 normal and 20 anomalous images of a manifest, and a tool's table and unblurred maps of them."""
    rng = np.random.default_rng(1)
    samples = []
    for label, folder in ((0, "normal"), (1, "ill")):
        for number in range(20):
            path = tmp_path / f"data/test/{folder}/{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            samples.append(Sample(path, "scan", "test", label))
    extra = tmp_path / "data/train/normal/00.png"  # named like a test image
    extra.parent.mkdir(parents=True)
    extra.touch()
    samples.append(Sample(extra, "scan", "train", 0))
    write_csv(Manifest(tuple(samples), tmp_path), tmp_path / "data/manifest.csv")
    (tmp_path / "tool/maps").mkdir(parents=True)
    rows, maps = [], []
    for sample in samples[:40]:
        maps.append((rng.gamma(2, 1, (24, 24)) + sample.label * rng.random()).astype(np.float32))
        name = f"{sample.path.parent.name}_{sample.path.stem}.npy"
        np.save(tmp_path / "tool/maps" / name, maps[-1])
        rows.append({"path": f"elsewhere/test/{sample.path.parent.name}/{sample.path.name}", "map": name})
    rows.append({"path": "elsewhere/train/normal/00.png", "map": "normal_00.npy"})
    rng.shuffle(rows)
    return Foreign(tmp_path, rows, maps, [sample.label for sample in samples[:40]])


class Foreign:
    def __init__(self, folder, rows, maps, labels):
        self.folder, self.rows, self.maps, self.labels = folder, rows, maps, labels
        self.manifest = load_manifest(folder / "data")

    def run(self, **choices):
        with (self.folder / "tool/table.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in self.rows for name in row)), restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        return run_files(self.folder / "tool", self.manifest, task="scan", **choices)

    def refused(self, error=ManifestError, **choices):
        with pytest.raises(error) as caught:
            self.run(**choices)
        message = str(caught.value)
        assert "\n" not in message
        assert message.endswith((".", "'."))
        return message


def test_foreign_maps_are_judged_like_ours(foreign):
    audit = measure(foreign.run())
    scores = reference.published_d24fad(foreign.maps)
    np.testing.assert_allclose(audit.runs.draws[0].across[:32], scores, rtol=1e-4)
    assert audit.result("published-d24fad").draws[0] == pytest.approx(reference.auroc(scores, foreign.labels[:32]))
    assert audit.result("sound").draws[0] == pytest.approx(
        reference.auroc(reference.sound(foreign.maps), foreign.labels)
    )
    blurred = np.stack([reference.blurred_alone(plane) for plane in foreign.maps]).astype(np.float32)
    expected = shuffled_loader(blurred, audit.runs.labels, orders=20, seed=0)
    assert audit.runs.shuffled == pytest.approx(expected, abs=0.01)
    assert audit.result("sound").scored == 40, "the row of the training image is left out"


def test_foreign_maps_may_be_blurred_already_pooled_otherwise_and_resampled(foreign):
    blurred = foreign.run(blur=0.0)
    np.testing.assert_allclose(blurred.draws[0].alone, [plane.max() for plane in foreign.maps], rtol=1e-6)
    mean = foreign.run(blur=2.0, pooling="mean")
    np.testing.assert_allclose(mean.draws[0].alone, reference.sound(foreign.maps, 2.0, np.mean), rtol=1e-4)
    small = foreign.run(blur=0.0, size=(12, 18))
    expected = [
        np.asarray(Image.fromarray(plane).resize((18, 12), Image.Resampling.BILINEAR)) for plane in foreign.maps
    ]
    np.testing.assert_allclose(small.draws[0].alone, [plane.max() for plane in expected], rtol=1e-6)


def test_maps_may_have_their_images_names_or_stand_alone(foreign):
    for folder in ("normal", "ill"):
        for number in range(20):
            file = foreign.folder / f"tool/maps/{folder}_{number:02d}.npy"
            file.rename(foreign.folder / f"tool/{folder}_{number:02d}.npy")
    whole = foreign.run()
    manifest = foreign.manifest
    renamed = [replace(row, path=row.path.with_name(f"{row.path.parent.name}_{row.path.name}")) for row in manifest]
    foreign.manifest = replace(manifest, samples=tuple(row for row in renamed if row.split == "test"))
    foreign.rows = [{"map": row["map"]} for row in foreign.rows if "train" not in row["path"]]
    np.testing.assert_array_equal(foreign.run().draws[0].alone, whole.draws[0].alone)
    foreign.rows = [{"path": row["map"].replace(".npy", ".png")} for row in foreign.rows]
    np.testing.assert_array_equal(foreign.run().draws[0].alone, whole.draws[0].alone)


def test_scores_alone_leave_out_the_blur(foreign):
    for number, row in enumerate(foreign.rows):
        row["score"] = number
        del row["map"]
    audit = measure(foreign.run())
    assert [result.protocol for result in audit.results] == ["sound", "published-pdd"]
    assert "needs the maps" in explain(audit)
    assert "can only be told from its maps" in explain(audit)
    given = {row["path"].split("/", 1)[1]: row["score"] for row in foreign.rows}
    expected = [given["/".join(sample.path.parts[-3:])] for sample in audit.runs.samples]
    assert audit.runs.draws[0].alone.tolist() == expected


def test_a_tools_own_scores_stand_beside_those_of_its_maps(foreign):
    for row in foreign.rows:
        row["score"] = float("ill" in row["path"])
    audit = measure(foreign.run())
    assert [result.protocol for result in audit.results][:2] == ["sound", "as given"]
    assert audit.result("as given").auroc == 1.0 > audit.result("sound").auroc


def test_draws_and_epochs_of_a_table(foreign):
    for row in foreign.rows:
        row.pop("map")
    ill = [float("ill" in row["path"]) for row in foreign.rows]
    foreign.rows = [
        {**row, "score": (epoch == 3) * (draw + 1) * sick + number % 7, "epoch": epoch, "draw": draw}
        for epoch in (1, 3)
        for draw in (0, 1)
        for number, (row, sick) in enumerate(zip(foreign.rows, ill, strict=True))
    ]
    runs = foreign.run()
    assert {epoch: len(draws) for epoch, draws in runs.epochs.items()} == {1: 2, 3: 2}
    assert runs.draws == runs.epochs[3]
    assert runs.chosen is None
    sound = measure(runs).epochs[0]
    assert sound.aurocs[3] > sound.aurocs[1]
    foreign.rows.pop(0)
    assert "has no row in epoch" in foreign.refused()


def test_one_k_of_several_is_chosen(foreign):
    foreign.rows = [
        {"path": row["path"], "score": 1000 * shots + number, "shots": shots}
        for shots in (2, 4)
        for number, row in enumerate(foreign.rows)
    ]
    assert (foreign.run(shots=4).draws[0].alone >= 4000).all()
    with pytest.raises(Exception, match="holds shots 2, 4, got 8"):
        foreign.run(shots=8)


def test_a_failed_row_is_listed_and_counted(foreign):
    foreign.rows = [row for row in foreign.rows if not row["path"].endswith("ill/07.png")]
    row = next(row for row in foreign.rows if row["path"].endswith("ill/03.png"))
    row |= {"map": "", "error": "the tool broke"}
    runs = foreign.run()
    assert {sample.path.name: reason for sample, reason in runs.unreadable} == {
        "03.png": "the tool broke",
        "07.png": "the table has no row for it",
    }
    audit = measure(runs)
    assert audit.result("sound").total == 40
    line = "2 of 40 test images are without a score and left out of all figures; the first: 03.png: the tool broke"
    assert tell_unreadable(audit) == line


def test_labels_come_from_the_table_where_the_manifest_has_none(foreign):
    foreign.manifest = replace(foreign.manifest, samples=tuple(replace(r, label=None) for r in foreign.manifest))
    assert "unlabelled" in foreign.refused()
    for row in foreign.rows:
        row["label"] = "anomalous" if "ill" in row["path"] else "normal"
    assert foreign.run().labels.tolist() == foreign.labels


BROKEN = {
    "has label 1, the manifest says 0": lambda f: [row.update(label=1) for row in f.rows],
    "images of the manifest, expected one. Give more of the path": lambda f: [
        row.update(path=row["path"].split("/")[-1]) for row in f.rows
    ],
    "has two rows in one draw": lambda f: f.rows.append(f.rows[0] | {"path": "test/ill/00.png"}),
    "score is 'nan', expected a finite number": lambda f: [row.update(score="nan") for row in f.rows],
    "score is 'high', expected a finite number": lambda f: [row.update(score="high") for row in f.rows],
    "draw is 'one', expected a whole number": lambda f: f.rows[0].update(draw="one"),
    "no row fits a test image": lambda f: [row.update(path="x.png") for row in f.rows],
    "has no column path or map": lambda f: [row.update(file=row.pop("path")) or row.pop("map") for row in f.rows],
    "40 of 80 rows have no map": lambda f: f.rows.extend(
        [{"path": row["path"], "score": 1, "draw": 1} for row in f.rows]
    ),
    "has no rows of task 'scan'": lambda f: [row.update(task="other") for row in f.rows],
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_table_is_one_line(foreign, message):
    BROKEN[message](foreign)
    assert message in foreign.refused()


def test_broken_maps_are_one_line(foreign):
    file = foreign.folder / "tool/maps/ill_05.npy"
    for content, message in (
        (np.full((24, 24), np.nan), "holds NaN or infinite values"),
        (np.zeros((24, 25)), "is 24 x 25, the first map 24 x 24; the blur across a batch needs one size"),
        (np.zeros((3, 24, 24)), "expected a (height, width) array"),
        (np.array([[{"a": 1}]], dtype=object), "is not a .npy array of numbers"),
        (np.array([["a"]]), "expected a (height, width) array of numbers"),
    ):
        np.save(file, content, allow_pickle=True)
        line = foreign.refused(ReadError)
        assert message in line
        assert "ill_05.npy" in line
    file.write_bytes(pickle.dumps({"a": 1}))
    assert "is not a .npy array" in foreign.refused(ReadError)
    file.unlink()
    assert "ill_05.npy does not exist" in foreign.refused(ReadError)


def test_our_own_predict_and_evaluate_output_is_read(scans, make_detector, tmp_path):
    detector = make_detector("nearest")
    (judged,) = evaluate(detector, scans, task=TASK, shots=(2,), draws=2, seed=0)
    write_evaluations([judged], tmp_path / "evaluated")
    audit = measure(run_files(tmp_path / "evaluated", scans, task=TASK))
    assert audit.result("sound").draws == pytest.approx([draw["auroc"] for draw in judged.metrics])
    assert audit.runs.shots == 2
    from anatomaly.results.folder import predict_to_folder

    detector.set_support(judged.supports[0], task=TASK)
    predict_to_folder(detector, in_file_order(scans), tmp_path / "predicted", overlays=False)
    runs = run_files(tmp_path / "predicted", scans, task=TASK)
    expected = run_model(detector, tmp_path, scans, task=TASK, shots=2, draws=2).draws[0]
    np.testing.assert_allclose(runs.draws[0].alone, expected.alone, rtol=1e-5)
    np.testing.assert_allclose(runs.draws[0].across, expected.across, rtol=1e-4)
    assert "blurred already" in runs.notes[0]
    assert set(COLUMNS) <= set((tmp_path / "predicted/scores.csv").read_text().splitlines()[0].split(","))
    table = tmp_path / "predicted/scores.csv"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column for column in rows[0] if column != "map_volume"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    older = run_files(tmp_path / "predicted", scans, task=TASK)  # a table from before that column
    assert older.notes == runs.notes
    np.testing.assert_array_equal(older.draws[0].alone, runs.draws[0].alone)


def test_a_model_is_no_table(tmp_path):
    (tmp_path / "scores.csv").touch()
    assert is_table(tmp_path)
    assert is_table(tmp_path / "scores.csv")
    (tmp_path / "config.json").touch()
    assert not is_table(tmp_path), "a benchmark leaves its scores beside the model"


def test_a_folder_with_the_tables_of_predict_and_evaluate_is_refused(scans, tmp_path):
    for name in ("scores.csv", "test_scores.csv"):
        (tmp_path / name).write_text("path,score\n")
    with pytest.raises(ManifestError, match=r"holds 2 tables of scores, expected scores\.csv, test_scores\.csv or"):
        run_files(tmp_path, scans, task=TASK)


# --- the command ---


@pytest.fixture
def run(capsys):
    def call(*words):
        capsys.readouterr()
        return (main([str(word) for word in words]), *capsys.readouterr())

    return call


def test_the_command_tells_and_writes(run, scans, kept, tmp_path):
    folder, _ = kept
    code, out, err = run("audit", folder, scans.source, "--out", tmp_path / "out", "--draws", 2, "--shots", 1)
    assert (code, err) == (0, "")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"audit.md", "audit.json", "audit.csv", "audit.png"}
    for words in ("published-d24fad", "32 of 35", "4 of 35", "Choosing the epoch by test AUROC"):
        assert words in out
    facts = json.loads((tmp_path / "out/audit.json").read_text())
    assert (facts["draws"], facts["shots"], list(facts["epochs"])) == (2, 1, list(facts["protocols"]))
    assert f"{facts['protocols']['sound']['auroc']:.3f}" in out


def test_the_command_counts_unreadable_images(run, scans, make_detector, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    rows = (*scans.samples, Sample(broken, TASK, "test", 1))
    write_csv(replace(scans, samples=rows), tmp_path / "table.csv")
    make_detector("nearest").save(tmp_path / "model")
    words = ("--out", tmp_path / "out", "--draws", 1, "--shots", 1)
    code, out, err = run("audit", tmp_path / "model", tmp_path / "table.csv", *words)
    assert (code, err) == (0, "")
    assert len([line for line in out.splitlines() if line.startswith("1 of 36 test images is unreadable")]) == 1


def test_the_command_fails_in_one_line(run, foreign, scans, kept, tmp_path):
    foreign.run()
    data = foreign.folder / "data"
    for words, message in (
        (("nowhere", data), "nowhere: no such file or folder"),
        ((foreign.folder / "tool", data, "--task", "liver"), "no task 'liver'"),
        ((foreign.folder / "tool", data, "--blur", -1), "blur is -1"),
        ((foreign.folder / "tool", data, "--size", "[0,5]"), "size is (0, 5)"),
        ((kept[0], scans.source, "--blur", 0), "Leave out --blur, --pooling and --size"),
        ((kept[0], scans.source, "--shots", 99), "99 shots asked"),
        ((foreign.folder, data), "not a model bundle"),
        ((kept[0], scans.source, "--batch_size", 0), "batch_size 0"),
    ):
        code, _, err = run("audit", *words, "--out", tmp_path / "out")
        assert code == 2
        assert err.count("\n") == 1
        assert message in err
    assert not (tmp_path / "out").exists()
