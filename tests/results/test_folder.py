"""A run into a folder: what it leaves for every kind of file, and what it leaves when it is cut short."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from scores import read_scores

import anatomaly.results.folder
from anatomaly.errors import NotReadyError, OutputError
from anatomaly.results.folder import predict_to_folder
from anatomaly.tables import Table


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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "scores.csv", "scores.jsonl"]


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
    assert all(case.count("data:image/") >= 3 and "not kept" not in case for case in shown)
    assert "5 images with lower scores are left out" in texts(summary.report)


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


@pytest.mark.parametrize("room", [4, 5])
def test_a_full_disk_leaves_complete_rows(detector, tests, tmp_path, monkeypatch, room):
    full_disk(monkeypatch, room)  # a map and an overlay per image: the third image fails at its map or its overlay
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
    full_disk(monkeypatch, 0)
    with pytest.raises(OutputError, match=r"report\.html.*no space left"):
        predict_to_folder(detector, tests, tmp_path / "out", maps=False, overlays=False)
    monkeypatch.undo()
    assert len(read_scores(tmp_path / "out" / "scores.csv")) == len(tests)
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_volume_that_does_not_fit_is_an_output_error_and_leaves_no_half_of_it(volume, tmp_path, monkeypatch):
    nibabel = pytest.importorskip("nibabel")
    file, detector, _ = volume

    def save(image, out):
        Path(out).write_bytes(b"half a volume")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nibabel, "save", save)
    with pytest.raises(OutputError, match=r"scan_map\.nii\.gz"):
        predict_to_folder(detector, [file], tmp_path / "out")
    assert len(read_scores(tmp_path / "out" / "scores.csv")) == 4
    assert not list((tmp_path / "out").rglob("*.nii.gz"))
