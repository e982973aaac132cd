"""A run into a folder: what it leaves for every kind of file, and what it leaves when it is cut short."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from scores import read_scores

import anatomaly.data.volumes
import anatomaly.results.folder
from anatomaly.errors import NotReadyError, OutputError
from anatomaly.results.folder import predict_to_folder
from anatomaly.tables import Table
from anatomaly.types import Prediction, Sample, Scoring


@pytest.fixture(scope="module")
def supports(phantom):
    return phantom.select(task="head_ct", split="train").samples[:3]


@pytest.fixture(scope="module")
def tests(phantom):
    return phantom.select(task="head_ct", split="test").samples


@pytest.fixture(scope="module")
def detector(make_detector, supports):
    return make_detector().set_support(supports, task="head_ct")


@pytest.fixture
def volume(tmp_path, make_detector, supports):
    """A NIfTI file of 4 slices, 20 x 24, stored from head to feet and from left to right, and a detector for it."""
    nibabel = pytest.importorskip("nibabel")
    affine = np.diag([-2.0, 3.0, -4.0, 1.0])
    affine[:3, 3] = 30, -20, 10
    voxels = np.random.default_rng(0).normal(40, 30, (24, 20, 4)).astype(np.float32)
    file = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(voxels, affine), file)
    from anatomaly.types import Intensity

    return file, make_detector(intensity=Intensity("range", 0.0, 100.0)).set_support(supports), affine


def texts(report):
    """Text of the report without markup, styles and scripts."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", report.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def cases(report):
    """The report's cases as HTML, highest score first."""
    return re.findall(r"<article.*?</article>", report.read_text(), flags=re.DOTALL)


def test_a_folder_of_pictures_a_broken_file_and_a_volume(volume, tests, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    file, detector, affine = volume
    broken = tmp_path / "broken.png"
    broken.write_bytes(tests[0].path.read_bytes()[:99])
    seen = []
    summary = predict_to_folder(
        detector,
        [tests[0], broken, file, tests[1]],
        tmp_path / "out",
        batch_size=2,
        on_progress=seen.append,
    )
    out = tmp_path / "out"
    rows = read_scores(out / "scores.csv")
    expected = [str(tests[0].path), str(broken), *[str(file)] * 4, str(tests[1].path)]
    assert [row["path"] for row in rows] == expected
    assert [row["frame"] for row in rows] == [None, None, 0, 1, 2, 3, None]
    assert [row["status"] for row in rows] == ["ok", "error", *["ok"] * 5]
    assert [prediction.score for prediction in seen] == pytest.approx([r["score"] or np.nan for r in rows], nan_ok=True)
    assert len((out / "scores.jsonl").read_text().splitlines()) == 7
    assert summary.failed == 1
    assert [str(prediction.sample.path) for prediction in summary.predictions] == expected

    source, maps = nibabel.load(file), nibabel.load(out / "maps" / "scan_map.nii.gz")
    assert maps.shape == source.shape == (24, 20, 4)
    np.testing.assert_array_equal(maps.affine, affine)
    assert maps.get_data_dtype() == np.float32
    slices = nibabel.as_closest_canonical(maps).get_fdata()  # (x, y, z), see data/volumes.py
    for row in rows[2:6]:
        shown = np.load(out / row["map"])
        np.testing.assert_allclose(slices[:, ::-1, row["frame"]].T, shown, atol=1e-6)
        assert shown.max() > 0

    assert summary.report == out / "report.html"
    text = texts(summary.report)
    assert "Not for clinical use" in text
    assert "1 image could not be scored" in text
    assert "broken.png" in text
    assert len(cases(summary.report)) == 6


def test_two_volumes_of_one_name_and_one_given_in_turn_with_a_picture_keep_all_maps(volume, tests, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    file, detector, _ = volume
    other = tmp_path / "other" / "scan.nii.gz"
    other.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.full((16, 12, 2), 50, np.float32), np.eye(4)), other)
    predict_to_folder(detector, [other, tests[0], file], tmp_path / "out", overlays=False)
    shapes = {path.name: nibabel.load(path).shape for path in (tmp_path / "out" / "maps").glob("*.nii.gz")}
    assert shapes == {"scan_map.nii.gz": (16, 12, 2), "scan_map_2.nii.gz": (24, 20, 4)}


def test_the_rows_are_those_of_predict_and_pictures_can_be_left_out(detector, tests, tmp_path):
    predict_to_folder(detector, tests, tmp_path / "out", maps=False, overlays=False, batch_size=3)
    rows = read_scores(tmp_path / "out" / "scores.csv")
    expected = list(detector.predict(tests))
    assert [row["score"] for row in rows] == pytest.approx([p.score for p in expected], abs=1e-6)
    assert [row["label"] for row in rows] == [p.sample.label for p in expected]
    weights = [[row[f"weight_{k}"] for k in range(3)] for row in rows]
    np.testing.assert_allclose(weights, [p.support_weights.mean(axis=0) for p in expected], atol=1e-6)
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["patients.csv", "report.html", "run.json", "scores.csv", "scores.jsonl"]


def test_the_report_says_what_the_run_was(detector, supports, tests, tmp_path):
    table = Table("Earlier results", ("task", "AUROC"), [("head_ct", "0.87")], note="Five draws.")
    images = [np.full((1, 8, 8), 0.5, np.float32)] * 3
    summary = predict_to_folder(
        detector,
        tests[:2],
        tmp_path / "out",
        title="Ward <7>",
        bank_images=images,
        tables=[table],
    )
    text = texts(summary.report)
    for said in ("Ward &lt;7&gt;", "d24fad", "efficientnet_lite0", "head_ct", "64 x 64 pixels, squash"):
        assert said in text
    for said in (detector.model_hash[:12], "Earlier results", "0.87", "Five draws.", *[s.name for s in supports]):
        assert said in text


def test_the_report_has_the_references_own_scores(detector, tests, tmp_path):
    predict_to_folder(detector, tests[:2], tmp_path / "out")
    text = texts(tmp_path / "out/report.html")
    assert [float(each) for each in re.findall(r"score ([\d.]+) , judged by the others", text)] == pytest.approx(
        detector.bank.normal_scores, rel=1e-3
    )
    assert text.count("of 3 reference images") == 2


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ("sum", "mean of the highest 5 % of the map, Gaussian blur 4 pixels"),
        ("geometric", "geometric mean over levels, each the mean of the highest 5 %"),
    ],
)
def test_the_report_says_how_a_score_is_made(levels, words, make_detector, supports, tests, tmp_path):
    detector = make_detector("matching", scoring=Scoring(pooling="topk", top_fraction=0.05, levels=levels))
    detector.set_support(supports, task="head_ct")
    predict_to_folder(detector, tests[:1], tmp_path / "out", title="t")
    assert words in texts(tmp_path / "out/report.html")


def test_a_second_run_into_the_same_folder_is_refused_and_changes_nothing(detector, tests, tmp_path):
    predict_to_folder(detector, tests[:2], tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="already exists"):
        predict_to_folder(detector, tests[2:], tmp_path / "out")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_without_a_support_nothing_is_written(make_detector, tests, tmp_path):
    with pytest.raises(NotReadyError):
        predict_to_folder(make_detector(), tests, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_are_kept_of_the_highest_cases_only(detector, tests, tmp_path, monkeypatch):
    monkeypatch.setattr(anatomaly.results.folder, "_CASES", 3)
    summary = predict_to_folder(detector, tests, tmp_path / "out")
    kept = {p.sample.name for p in summary.predictions if p.image is not None and p.anomaly_map is not None}
    ranked = sorted(summary.predictions, key=lambda prediction: -prediction.score)
    assert kept == {prediction.sample.name for prediction in ranked[:3]}
    shown = cases(summary.report)
    assert [re.search(r"<h3>(.*?)</h3>", case)[1] for case in shown] == [p.sample.name for p in ranked[:3]]
    assert all(case.count("data:image/") >= 2 and "not kept" not in case for case in shown)
    assert "5 images with lower scores are left out" in texts(summary.report)


def test_every_part_of_a_note_is_counted_by_itself(detector, tests, tmp_path, monkeypatch):
    def predict(*_, **__):
        yield from (made(note=note) for note in ("faint", "faint; a support", None))

    monkeypatch.setattr(detector, "predict", predict)
    remarks = predict_to_folder(detector, tests[:3], tmp_path / "out").remarks
    assert remarks[-2:] == ("1 of 3 images: a support.", "2 of 3 images: faint.")


def test_cases_of_equal_score_are_shown_with_their_pictures(detector, tests, tmp_path, monkeypatch):
    monkeypatch.setattr(anatomaly.results.folder, "_CASES", 3)
    same = []
    for n in range(7):
        same.append(tmp_path / f"same_{n}.png")
        same[-1].write_bytes(tests[0].path.read_bytes())
    summary = predict_to_folder(detector, same, tmp_path / "out", batch_size=1)
    assert len({prediction.score for prediction in summary.predictions}) == 1
    assert "not kept" not in "".join(cases(summary.report))


def full_disk(monkeypatch, room):
    """From now on the disk takes `room` more picture or array files."""
    written, write_bytes = [], Path.write_bytes

    def write(path, content):
        if len(written) == room:
            write_bytes(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)


@pytest.mark.parametrize("room", [6, 7])
def test_a_full_disk_leaves_complete_rows(detector, tests, tmp_path, monkeypatch, room):
    full_disk(monkeypatch, room)  # run.json, scores.csv, two files per image: the third fails at its map or its overlay
    with pytest.raises(OutputError, match=r"no space left.*2 rows written so far are complete.*Free some space"):
        predict_to_folder(detector, tests, tmp_path / "out", batch_size=4)
    monkeypatch.undo()
    rows = read_scores(tmp_path / "out" / "scores.csv")
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [line["path"] for line in lines] == [str(t.path) for t in tests[:2]]
    for row in rows:
        assert np.load(tmp_path / "out" / row["map"]).shape == (64, 64)
        assert (tmp_path / "out" / row["overlay"]).read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_full_disk_at_the_report_leaves_all_rows(detector, tests, tmp_path, monkeypatch):
    full_disk(monkeypatch, 2)  # run.json and the head of scores.csv
    with pytest.raises(OutputError, match=r"report\.html.*no space left"):
        predict_to_folder(detector, tests, tmp_path / "out", maps=False, overlays=False)
    monkeypatch.undo()
    assert len(read_scores(tmp_path / "out" / "scores.csv")) == len(tests)
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_volume_that_does_not_fit_is_an_output_error_and_leaves_no_half_of_it(volume, tmp_path, monkeypatch):
    file, detector, _ = volume

    def blocks(*_):
        yield np.zeros((24, 20, 1), np.float32)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(anatomaly.data.volumes, "_blocks", blocks)
    with pytest.raises(OutputError, match=r"scan_map\.nii\.gz: cannot be written: no space left.*Free some space"):
        predict_to_folder(detector, [file], tmp_path / "out")
    assert len(read_scores(tmp_path / "out" / "scores.csv")) == 4
    assert not list((tmp_path / "out").rglob("*.nii.gz*"))


def of_volumes(summary):
    """What is said of map volumes; the images come from another kind of file than the supports, which is said too."""
    return [remark for remark in summary.remarks if "map" in remark]


def two_volumes(folder, voxels):
    """Two NIfTI files of 4 slices under one name, in two folders."""
    nibabel = pytest.importorskip("nibabel")
    files = [folder / f"sub-{n}" / "T1w.nii.gz" for n in (1, 2)]
    for n, file in enumerate(files, 1):
        file.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(voxels[..., ::-1] if n == 2 else voxels, np.diag([-2.0, 3.0, 4.0, 1.0])), file)
    return files


@pytest.mark.parametrize("frames", [(0, 1, 2, 3), (3, 1)])
def test_rows_of_two_volumes_in_turn_give_one_whole_volume_each(volume, tmp_path, frames):
    nibabel = pytest.importorskip("nibabel")
    file, detector, _ = volume
    files = two_volumes(tmp_path, nibabel.load(file).get_fdata(dtype=np.float32))
    rows = [Sample(each, "head_ct", frame=frame) for frame in frames for each in files]
    out = tmp_path / "out"
    summary = predict_to_folder(detector, rows, out, overlays=False, batch_size=3)

    table = read_scores(out / "scores.csv")
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [row["map_volume"] for row in table] == [line["map_volume"] for line in lines]
    volumes = {row["path"]: row["map_volume"] for row in table}
    assert volumes == {str(files[0]): "maps/T1w_map.nii.gz", str(files[1]): "maps/T1w_map_2.nii.gz"}
    assert sorted(path.name for path in (out / "maps").glob("*.nii.gz")) == ["T1w_map.nii.gz", "T1w_map_2.nii.gz"]
    for row in table:
        slices = nibabel.as_closest_canonical(nibabel.load(out / row["map_volume"])).get_fdata()
        np.testing.assert_allclose(slices[:, ::-1, row["frame"]].T, np.load(out / row["map"]), atol=1e-6)
        judged = np.isfinite(slices).all(axis=(0, 1))
        assert [k for k in range(4) if judged[k]] == sorted(frames)
        assert np.isnan(slices[..., ~judged]).all()
    said = "2 of 2 map volumes: 4 slices were not judged and have no value there (NaN)."
    assert of_volumes(summary) == ([said] if len(frames) < 4 else [])


def test_a_volume_is_written_as_soon_as_its_slices_are_there_and_takes_no_row_twice(volume, tests, tmp_path):
    file, detector, _ = volume
    seen = []
    rows = [Sample(file, "head_ct", frame=frame) for frame in (0, 0, 1, 2, 3)]
    rows += [tests[0], Sample(file, "head_ct", frame=2)]
    out = tmp_path / "out"
    predict_to_folder(detector, rows, out, on_progress=lambda _: seen.append((out / "maps/scan_map.nii.gz").exists()))
    assert seen == [False] * 4 + [True] * 3
    named = [row["map_volume"] for row in read_scores(out / "scores.csv")]
    assert named == ["maps/scan_map.nii.gz"] * 5 + [None, "maps/scan_map.nii.gz"]
    assert len(list((out / "maps").glob("*.nii.gz"))) == 1


def test_two_paths_to_one_file_are_one_source(volume, tmp_path):
    file, detector, _ = volume
    (tmp_path / "link.nii.gz").symlink_to(file)
    rows = [Sample(tmp_path / name, "head_ct", frame=n) for n, name in enumerate(("scan.nii.gz", "link.nii.gz") * 2)]
    summary = predict_to_folder(detector, rows, tmp_path / "out", overlays=False)
    assert {row["map_volume"] for row in read_scores(tmp_path / "out" / "scores.csv")} == {"maps/scan_map.nii.gz"}
    assert of_volumes(summary) == []


@pytest.mark.skipif(os.name != "posix", reason="limits of names are those of Linux")
@pytest.mark.parametrize("name", ["b" * 250 + ".nii", "Ä" * 125 + ".nii"])
def test_the_longest_name_costs_no_row(volume, tmp_path, name):
    nibabel = pytest.importorskip("nibabel")
    file, detector, _ = volume
    nibabel.save(nibabel.load(file), tmp_path / "in.nii")
    long, short = tmp_path / name, tmp_path / "z.nii"
    short.write_bytes((tmp_path / "in.nii").read_bytes())
    (tmp_path / "in.nii").rename(long)
    summary = predict_to_folder(detector, [long, long, short], tmp_path / "out")
    rows = read_scores(tmp_path / "out" / "scores.csv")
    assert summary.report.exists()
    assert [row["status"] for row in rows] == ["ok"] * 12
    for row in rows:
        for column in ("map", "overlay", "map_volume"):
            assert (tmp_path / "out" / row[column]).exists()
            assert len(Path(row[column] + ".part").name.encode()) <= 143  # what eCryptfs takes
    assert len(list((tmp_path / "out" / "maps").glob("*.nii.gz"))) == 2


def test_a_volume_that_changed_under_the_run_costs_no_row(volume, tests, tmp_path):
    file, detector, _ = volume
    rows = [Sample(file, "head_ct", frame=frame) for frame in (0, 1, 2)]

    def vanish(_):
        file.unlink(missing_ok=True)

    summary = predict_to_folder(detector, [*rows, tests[0]], tmp_path / "out", on_progress=vanish)
    assert summary.report.exists()
    assert len(read_scores(tmp_path / "out" / "scores.csv")) == 4
    [remark] = of_volumes(summary)
    assert remark.startswith("maps/scan_map.nii.gz is missing, though tables name it: ")
    assert "no such file" in remark


class Fixed:
    """A detector whose verdicts are given."""

    def __init__(self, detector, predictions):
        self._detector, self._predictions = detector, predictions

    def __getattr__(self, name):
        return getattr(self._detector, name)

    def predict(self, samples, **_):
        return iter(self._predictions)


def made(path="a.png", score=1.0, *, shape=(20, 30), **changes):
    arrays = {"image": np.full((1, *shape), 0.5, np.float32), "anomaly_map": np.full(shape, 0.5, np.float32)}
    return Prediction(**({"sample": Sample(Path(path), "head_ct"), "score": score} | arrays | changes))


ODD = {
    "nan spacing": made(spacing=(float("nan"), 1.0)),
    "infinite spacing": made(spacing=(1.0, float("inf"))),
    "zero spacing": made(spacing=(0.0, 0.0)),
    "negative spacing": made(spacing=(-1.0, 1.0)),
    "map of NaN": made(anomaly_map=np.full((20, 30), np.nan, np.float32)),
    "one row": made(shape=(1, 20000)),
    "one column": made(shape=(20000, 1), spacing=(5.0, 0.1)),
    "nothing": made(shape=(0, 5)),
    "two channels": made(image=np.zeros((2, 20, 30), np.float32)),
    "map of another size": made(anomaly_map=np.zeros((3, 4), np.float32)),
    "NaN p-value": made(p_value=float("nan")),
    "NaN seconds": made(seconds=float("nan")),
    "NaN score": made(score=float("nan")),
    "infinite score": made(score=float("inf")),
    "frame of numpy": made(sample=Sample(Path("a.png"), "head_ct", frame=np.int64(3), label=np.int64(1))),
    "lines in the note": made(note="one\nof two"),
    "odd name": made(path="<b>\"'&\n\x1b[31m\udcff,;.png"),
    "no name": made(path="/"),
    "lone surrogate": made(path="\ud800.png"),
}


@pytest.mark.parametrize("odd", ODD)
def test_one_odd_image_costs_neither_the_run_nor_the_report(detector, tmp_path, odd):
    out = tmp_path / "out"
    run = [made("first.png"), ODD[odd], ODD[odd], made("last.png")]
    summary = predict_to_folder(Fixed(detector, run), [], out)
    rows = read_scores(out / "scores.csv")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == len(summary.predictions) == 4
    assert [rows[k]["status"] for k in (0, 3)] == ["ok", "ok"]
    assert [(row["score"], row["status"]) for row in rows] == [(line["score"], line["status"]) for line in lines]
    assert all((row["score"] is not None) == (row["status"] == "ok") for row in rows)
    page = summary.report.read_text()
    assert len(cases(summary.report)) == 4 - summary.failed
    assert '<b>"' not in page
    for row in rows:
        assert "\n" not in (row["note"] or "")
        for column in ("map", "overlay"):
            assert row["status"] == "error" or row[column] is not None or f"no {column} (" in row["note"]


def test_what_could_not_be_drawn_is_told(detector, tmp_path):
    run = [ODD["map of another size"], ODD["two channels"], ODD["infinite score"], made("last.png")]
    summary = predict_to_folder(Fixed(detector, run), [], tmp_path / "out")
    first, second, third, last = read_scores(tmp_path / "out" / "scores.csv")
    for row in (first, second):
        assert (row["status"], row["score"], row["overlay"]) == ("ok", 1.0, None)
        assert (tmp_path / "out" / row["map"]).exists()
        assert row["note"].startswith("no overlay (ValueError: overlay: the image is ")
    assert (third["status"], third["error"]) == ("error", "a.png: the score is not a finite number. Look at the image.")
    assert last["note"] is None
    assert (tmp_path / "out" / last["overlay"]).exists()
    assert summary.failed == 1
    assert sum(remark.startswith("1 of 4 images: no overlay (") for remark in summary.remarks) == 2
    assert "no overlay (ValueError" in texts(summary.report)


def test_a_file_system_that_refuses_a_name_costs_that_file_only(detector, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def write(path, content):
        if path.name.startswith("odd") and path.name != "odd.npy.part":
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    predict_to_folder(Fixed(detector, [made("odd.png"), made("last.png")]), [], tmp_path / "out")
    odd, last = read_scores(tmp_path / "out" / "scores.csv")
    assert (odd["map"], odd["overlay"], last["overlay"]) == ("maps/odd.npy", None, "overlays/last.png")
    assert odd["note"].startswith("no overlay (OutputError: ")


def test_a_hundred_and_fifty_supports_stand_in_the_report(detector, tmp_path):
    from anatomaly.results.page import write_report

    names = tuple(f"support {n}" for n in range(150))
    weights = np.full((2, 150), 1 / 150, np.float32)
    pictures = [np.full((1, 16, 16), 0.5, np.float32)] * 150
    report = write_report(
        tmp_path / "report.html",
        [made(support_weights=weights)],
        title="Many",
        bank_names=names,
        bank_images=pictures,
        scale=(0.0, 1.0),
    )
    assert "150 reference images" in texts(report)
    assert "and 142 more" in texts(report)
