import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scores import read_scores

from anatomaly.errors import OutputError
from anatomaly.files import write_whole
from anatomaly.results.pictures import overlay, render_map
from anatomaly.results.writer import ResultWriter
from anatomaly.scoring import scale_from_normals
from anatomaly.types import Prediction, Sample

SCALE = (0.0, 2.0)


def prediction(path="a.png", *, score=0.1 + 0.2, shape=(5, 7), frame=None, label=None, **changes):
    rng = np.random.default_rng(3)
    made = Prediction(
        Sample(Path(path), "headct", label=label, frame=frame),
        score,
        anomaly_map=rng.random(shape, dtype=np.float32),
        image=rng.random((1, *shape), dtype=np.float32),
        support_weights=np.array([[0.25, 0.75], [0.5, 0.5]], np.float32),
        spacing=(0.5, 0.25),
        seconds=0.125,
    )
    return replace(made, **changes)


def failed(path="bad.png", error="bad.png: is empty.\nCopy it again."):
    return Prediction(Sample(Path(path), "headct"), float("nan"), error=error)


def written(out, *predictions, **settings):
    with ResultWriter(out, scale=SCALE, **settings) as writer:
        for each in predictions:
            writer.write(each)
    return read_scores(out / "scores.csv")


def test_the_table_reads_back_exactly(tmp_path):
    row = written(tmp_path, prediction("x/a.png", label=1, frame=4), support_names=("n0", "n1"))[0]
    assert row == {
        "path": str(Path("x/a.png")),
        "frame": 4,
        "task": "headct",
        "label": 1,
        "score": 0.1 + 0.2,
        "status": "ok",
        "error": None,
        "seconds": 0.125,
        "map": "maps/a_0004.npy",
        "overlay": "overlays/a_0004.png",
        "p_value": None,
        "note": None,
        "map_volume": None,
        "axis": None,
        "position": None,
        "weight_0": 0.375,
        "weight_1": 0.625,
    }


def test_a_p_value_and_a_note_stand_in_both_tables(tmp_path):
    row = written(tmp_path, prediction(p_value=0.05, note="one of the support images"))[0]
    assert (row["p_value"], row["note"]) == (0.05, "one of the support images")
    line = json.loads((tmp_path / "scores.jsonl").read_text())
    assert (line["p_value"], line["note"]) == (0.05, "one of the support images")


def test_json_lines_hold_levels_spacing_scale_and_names(tmp_path):
    written(tmp_path, prediction(), support_names=("n0", "n1"))
    row = json.loads((tmp_path / "scores.jsonl").read_text())
    assert row["support_weights"] == [[0.25, 0.75], [0.5, 0.5]]
    assert row["support"] == ["n0", "n1"]
    assert row["spacing"] == [0.5, 0.25]
    assert row["scale"] == [0.0, 2.0]
    assert row["score"] == 0.1 + 0.2


def test_a_bad_file_has_a_row_and_the_others_are_scored(tmp_path):
    rows = written(tmp_path, prediction("a.png"), failed(), prediction("c.png"), support_names=("n0", "n1"))
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert rows[1]["error"] == "bad.png: is empty. Copy it again."
    assert all(rows[1][column] is None for column in ("score", "label", "map", "overlay", "weight_0", "weight_1"))
    assert json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[1])["score"] is None


def test_json_lines_stay_valid_json_when_a_number_is_not_finite(tmp_path):
    weights = np.array([[np.nan, 1.0]], np.float32)
    written(tmp_path, prediction(score=float("nan"), support_weights=weights), support_names=("n0", "n1"))
    row = json.loads((tmp_path / "scores.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["score"] is None
    assert row["support_weights"] == [[None, 1.0]]


def test_a_row_is_on_disk_before_the_next_image(tmp_path):
    with ResultWriter(tmp_path, scale=SCALE) as writer:
        writer.write(prediction("a.png"))
        assert len(read_scores(tmp_path / "scores.csv")) == 1
        assert (tmp_path / "maps/a.npy").exists()
        writer.write(prediction("b.png"))
        assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 2


def test_maps_are_float32_on_the_source_grid_and_overlays_fit_them(tmp_path):
    given_map = np.arange(35, dtype=np.float32).reshape(7, 5).T  # not contiguous
    row = written(tmp_path, prediction(anomaly_map=given_map))[0]
    stored = np.load(tmp_path / row["map"], allow_pickle=False)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, given_map)
    with Image.open(tmp_path / row["overlay"]) as picture:
        assert picture.size == (7, 5)
        np.testing.assert_array_equal(np.asarray(picture), overlay(prediction().image, given_map, SCALE))


def test_pictures_can_be_left_out(tmp_path):
    row = written(tmp_path, prediction(), maps=False, overlays=False)[0]
    assert row["map"] is None
    assert row["overlay"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv", "scores.jsonl"]


def test_files_of_one_name_get_their_own_pictures(tmp_path):
    paths = [
        "good/1.png",
        "bad/1.png",
        "x/bad/1.png",
        "x/bad/1.png",
        "other/1.PNG",
        "1.nii.gz",
        "1.2.840.113",
        "?/..png",
    ]
    rows = written(tmp_path, *(prediction(path) for path in paths), prediction("1.nii.gz", frame=12))
    maps = [row["map"] for row in rows]
    assert maps[:2] == ["maps/1.npy", "maps/bad_1.npy"]
    assert maps[6:] == ["maps/1.2.840.113.npy", "maps/image.npy", "maps/1_0012.npy"]
    assert len({name.casefold() for name in maps}) == len(maps)
    assert all((tmp_path / name).exists() for name in maps)


def test_one_image_a_thousand_times_keeps_all_its_maps(tmp_path):
    rows = written(tmp_path, *[prediction("a/x.png", shape=(1, 1))] * 1000, overlays=False)
    assert len({row["map"].casefold() for row in rows}) == 1000
    assert [row["map"] for row in rows[:2]] == ["maps/x.npy", "maps/a_x.npy"]


@pytest.mark.parametrize("names", [("Scan.png", "scan.png"), ("scan.png", "Scan.png")])
def test_names_differing_only_in_case_do_not_share_a_file(tmp_path, names):
    rows = written(tmp_path, *(prediction(name) for name in names))
    assert rows[0]["map"].casefold() != rows[1]["map"].casefold()


@pytest.mark.skipif(sys.platform != "linux", reason="file names are byte strings on Linux only")
@pytest.mark.parametrize("name", [os.fsdecode(b"scan\xff.png"), 'a,"b"\nc;\r.png', "Ä" * 125 + ".png"])
def test_an_odd_file_name_does_not_stop_the_run(tmp_path, name):
    row, after = written(tmp_path, prediction(name), prediction("next.png"))
    assert (tmp_path / row["map"]).exists()
    assert row["path"] == name.encode(errors="backslashreplace").decode()
    assert after["path"] == "next.png"
    assert json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])["path"] == name


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_scores_keep_every_bit(tmp_path_factory, score):
    out = tmp_path_factory.mktemp("run")
    assert written(out, prediction(score=score), maps=False, overlays=False)[0]["score"] == score


def test_scores_of_an_earlier_run_are_not_overwritten(tmp_path):
    written(tmp_path, prediction())
    before = (tmp_path / "scores.csv").read_bytes()
    with pytest.raises(OutputError, match=r"already exists. Choose another output folder"):
        ResultWriter(tmp_path, scale=SCALE)
    assert (tmp_path / "scores.csv").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.*cannot be written: .*Choose an output folder") as caught:
        ResultWriter(tmp_path / "file" / "run", scale=SCALE)
    assert "\n" not in str(caught.value)


def limited(bytes_left, path):
    """Let every file of this process grow to the size of `path` plus `bytes_left`: the system call stops half-way."""
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + bytes_left, resource.RLIM_INFINITY))


@pytest.fixture
def unlimited_after():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("unlimited_after")
@pytest.mark.parametrize("full", ["scores.jsonl", "scores.csv"])
@pytest.mark.parametrize("bytes_left", [0, 20])
def test_a_full_disk_leaves_whole_rows_only(tmp_path, full, bytes_left):
    if full == "scores.csv":  # make the CSV the larger of the two, so that it is the one to hit the limit
        settings = {"support_names": ("n",) * 400}
        weights = np.full((1, 400), 1 / 3, np.float32) * np.float32(np.nan)
    else:
        settings, weights = {}, None
    writer = ResultWriter(tmp_path, scale=SCALE, maps=False, overlays=False, **settings)
    with writer:
        for path in ("a.png", "b.png"):
            writer.write(prediction(path, support_weights=weights))
        before = {name: (tmp_path / name).read_bytes() for name in ("scores.csv", "scores.jsonl")}
        limited(bytes_left, tmp_path / full)
        with pytest.raises(OutputError, match=r"2 rows written so far are complete. Free some space"):
            writer.write(prediction("c.png", support_weights=weights))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert [row["path"] for row in read_scores(tmp_path / "scores.csv")] == ["a.png", "b.png"]


@pytest.mark.usefixtures("unlimited_after")
def test_a_map_that_does_not_fit_leaves_neither_file_nor_row(tmp_path):
    with ResultWriter(tmp_path, scale=SCALE) as writer:
        writer.write(prediction("a.png"))
        limited(1000, tmp_path / "scores.jsonl")
        with pytest.raises(OutputError, match=r"b\.npy: cannot be written: .* 1 rows .* Free some space"):
            writer.write(prediction("b.png", shape=(100, 100)))
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["a.npy"]
    assert len(read_scores(tmp_path / "scores.csv")) == 1


def test_a_failed_replacement_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def no_space(self, content):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(
        OutputError, match=r"report\.html: cannot be written: no space left on device\. Free some space"
    ):
        write_whole(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_another_bank_are_refused(tmp_path):
    with (
        ResultWriter(tmp_path, scale=SCALE, support_names=("n0", "n1", "n2")) as writer,
        pytest.raises(ValueError, match=r"weights of shape \(2, 2\), expected \(levels, 3\)"),
    ):
        writer.write(prediction())


def lightness(rgb):
    """CIE L* of sRGB colours (..., 3) in 0..255."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


def test_colours_brighten_evenly_along_the_scale():
    colours = render_map(np.linspace(0, 2, 33)[None], SCALE)[0]
    steps = np.diff(lightness(colours.astype(float)))
    assert (steps > 0).all()
    assert steps.max() < 2 * np.median(steps)
    assert lightness(colours[-1].astype(float)) > 95


def test_the_scale_is_fixed_and_not_that_of_the_image():
    faint = np.array([[0.1, 0.2]])
    strong = np.array([[0.1, 2.0]])
    np.testing.assert_array_equal(render_map(faint, SCALE)[0, 0], render_map(strong, SCALE)[0, 0])
    assert render_map(faint, SCALE).max() < 60  # a normal image stays dark
    assert render_map(strong, SCALE)[0, 1].tolist() == [252, 255, 164]


def test_values_off_the_scale_take_the_end_colours_and_missing_ones_are_grey():
    row = render_map(np.array([[-5.0, 0.0, 2.0, np.inf, np.nan]]), SCALE)[0]
    np.testing.assert_array_equal(row[0], row[1])
    np.testing.assert_array_equal(row[2], row[3])
    assert row[4].tolist() == [128, 128, 128]


def test_the_overlay_leaves_normal_tissue_grey_and_colours_the_rest():
    image = np.array([[[0.5, 0.5, 0.5]]])
    normal, half, strong = overlay(image, np.array([[0.0, 1.0, 2.0]]), SCALE)[0].astype(int)
    assert normal.tolist() == [128, 128, 128]
    assert np.ptp(half) > 30
    assert strong.tolist() == np.rint(0.25 * 127.5 + 0.75 * np.array([252, 255, 164])).astype(int).tolist()


def test_a_large_overlay_is_that_of_its_strips(monkeypatch):
    rng = np.random.default_rng(5)
    image, anomaly_map = rng.random((3, 50, 40)), 3 * rng.random((50, 40))
    whole = overlay(image, anomaly_map, SCALE)
    monkeypatch.setattr("anatomaly.results.pictures._STRIP", 7 * 40)
    np.testing.assert_array_equal(overlay(image, anomaly_map, SCALE), whole)
    with pytest.raises(ValueError, match=r"image is \(3, 50, 40\) and the map \(14, 40\)"):
        overlay(image, anomaly_map[:14], SCALE)


def test_the_overlay_of_a_colour_image_is_grey_and_survives_missing_values():
    image = np.array([1.0, 0.0, 0.0])[:, None, None] * np.array([[1.0, 1.0, np.nan, 9.0, -9.0]])
    with np.errstate(invalid="raise"):
        result = overlay(image, np.array([[0.0, np.nan, 0.0, 0.0, 0.0]]), SCALE)
    assert result[0].tolist() == [[grey] * 3 for grey in (76, 76, 0, 255, 0)]


@pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 1.0), (0.0, float("nan")), (float("-inf"), 0.0)])
def test_an_impossible_scale_is_refused(tmp_path, scale):
    with pytest.raises(ValueError, match="colour scale: got"):
        render_map(np.zeros((2, 2)), scale)
    with pytest.raises(ValueError, match="colour scale: got"):
        ResultWriter(tmp_path / "run", scale=scale)
    assert not (tmp_path / "run").exists()


def test_image_and_map_must_fit():
    with pytest.raises(ValueError, match=r"image is \(1, 2, 3\) and the map \(3, 2\)"):
        overlay(np.zeros((1, 2, 3)), np.zeros((3, 2)), SCALE)
    with pytest.raises(ValueError, match=r"has shape \(3,\), expected \(H, W\)"):
        render_map(np.zeros(3), SCALE)


def test_normal_images_stay_in_the_dark_third_of_their_scale():
    rng = np.random.default_rng(0)
    maps = [rng.normal(1.0, 0.1, shape) for shape in ((64, 64), (300, 500), (1000, 1000))]
    low, high = scale_from_normals(maps)
    assert low == pytest.approx(1.0, abs=0.01)
    assert high == pytest.approx(1.0 + 3 * 0.2576, abs=0.02)  # 99.5th percentile of a normal: 2.576 sd
    assert all(np.mean(each < low + (high - low) / 3) > 0.99 for each in maps)


def test_a_large_image_does_not_outweigh_a_small_one_beyond_its_share():
    small, large = np.zeros((256, 256)), np.ones((2048, 2048))
    low, _ = scale_from_normals([small, small, large])
    assert low == 0.0


@given(st.floats(-1e30, 1e30), st.integers(1, 3))
def test_constant_maps_still_give_a_scale(value, count):
    low, high = scale_from_normals([np.full((4, 4), value, np.float32)] * count)
    assert low < high
    render_map(np.full((2, 2), value), (low, high))


def test_scale_needs_a_finite_pixel():
    with pytest.raises(ValueError, match="got 0 maps"):
        scale_from_normals([])
    with pytest.raises(ValueError, match="got 1 maps"):
        scale_from_normals([np.full((2, 2), np.nan)])
    assert scale_from_normals([np.array([[np.nan, 0.0, 1.0]])])[0] == 0.5
