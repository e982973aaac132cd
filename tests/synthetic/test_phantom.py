import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from anatomaly.errors import ConfigError, OutputError
from anatomaly.synthetic.phantom import COLUMNS, TASKS, draw, is_drawn, png_bytes, write_benchmark

COLOUR = {"fundus", "histology"}


def read_rows(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_there_are_five_tasks_with_three_pathologies_each():
    assert set(TASKS) == {"brain_mr", "head_ct", "chest_xray", "fundus", "histology"}
    assert all(len(pathologies) >= 3 for _, pathologies in TASKS.values())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [65, 128])
def test_pixels_and_mask_have_the_promised_form(task, size):
    for anomalous in (False, True):
        image = draw(task, seed=3, anomalous=anomalous, size=size)
        assert image.pixels.shape == (3 if task in COLOUR else 1, size, size)
        assert image.pixels.dtype == np.float32
        assert 0.0 <= image.pixels.min() < image.pixels.max() <= 1.0
        assert image.mask.shape == (size, size) and image.mask.dtype == np.bool_
        assert image.mask.any() == anomalous == (image.pathology is not None)


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_everything(task):
    first = draw(task, seed=11, anomalous=True, slice_index=1)
    again = draw(task, seed=11, anomalous=True, slice_index=1)
    assert np.array_equal(first.pixels, again.pixels) and np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.pixels, draw(task, seed=12, anomalous=True, slice_index=1).pixels)


@pytest.mark.parametrize("task", TASKS)
def test_the_next_slice_is_the_same_patient_slightly_moved(task):
    def shown(seed, slice_index):
        return ndimage.gaussian_filter(draw(task, seed=seed, slice_index=slice_index).pixels.mean(axis=0), 3).ravel()

    own, others = [], []
    for seed in range(8):
        first = shown(seed, 0)
        assert not np.array_equal(first, shown(seed, 1))
        own.append(np.corrcoef(first, shown(seed, 1))[0, 1])
        others.append(np.corrcoef(first, shown(seed + 100, 0))[0, 1])
    assert np.mean(own) > np.mean(others)


@pytest.mark.parametrize("task", TASKS)
def test_a_lesion_changes_its_mask_and_nothing_far_from_it(task):
    for seed in range(24):
        normal, sick = draw(task, seed=seed), draw(task, seed=seed, anomalous=True)
        change = np.abs(sick.pixels - normal.pixels).max(axis=0)
        far = ndimage.distance_transform_edt(~sick.mask) > 26
        assert change[sick.mask].mean() > 0.03, (seed, sick.pathology)
        assert change[sick.mask].mean() > 15 * change[~sick.mask].mean(), (seed, sick.pathology)
        assert change[far].max() < 0.05, (seed, sick.pathology)  # faint rims of patches below the mask threshold


@pytest.mark.parametrize("task", TASKS)
def test_every_pathology_can_be_drawn_and_has_a_plausible_area(task):
    images = [draw(task, seed=seed, anomalous=True, size=64) for seed in range(60)]
    assert {image.pathology for image in images} == set(TASKS[task][1])
    areas = [image.mask.mean() for image in images]
    assert min(areas) > 0.0005 and max(areas) < 0.35


@pytest.mark.parametrize("task", TASKS)
def test_trivial_statistics_do_not_tell_anomalous_images(task):
    images = [draw(task, seed=seed, anomalous=seed % 2 == 1, size=64) for seed in range(200)]
    labels = [image.pathology is not None for image in images]
    grays = [image.pixels.mean(axis=0) for image in images]
    statistics = {
        "mean": [gray.mean() for gray in grays],
        "std": [gray.std() for gray in grays],
        "bytes": [len(png_bytes(image.pixels)) for image in images],
    }
    for name, values in statistics.items():
        area = roc_auc_score(labels, values)
        assert max(area, 1 - area) <= 0.65, name


def test_pixels_of_other_sizes_show_the_same_patient():
    for task in TASKS:
        large = draw(task, seed=5, size=128).pixels.mean(axis=0).reshape(64, 2, 64, 2).mean(axis=(1, 3))
        small = draw(task, seed=5, size=64).pixels.mean(axis=0)
        assert np.corrcoef(large.ravel(), small.ravel())[0, 1] > 0.8, task


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom")
    return write_benchmark(out, train=5, test_normal=3, test_anomalous=4, size=32, seed=2)


def test_the_manifest_lists_every_file_with_its_digest(benchmark):
    rows, out = read_rows(benchmark), benchmark.parent
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 5 * (5 + 3 + 4)
    for row in rows:
        content = (out / row["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        folder = Path(row["path"]).parts
        assert folder[:2] == (row["task"], row["split"])
        assert (folder[2] == "normal") == (row["label"] == "normal") == (row["mask"] == "")
    listed = {out / row[column] for row in rows for column in ("path", "mask") if row[column]}
    assert listed == set(out.rglob("*.png"))


def test_dicom_files_hold_what_draw_gives(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from anatomaly.data.readers import read_image

    counts = {"train": 3, "test_normal": 2, "test_anomalous": 2, "size": 32, "seed": 2}
    write_benchmark(tmp_path / "out", **counts)
    rows = read_rows(write_benchmark(tmp_path / "out", **counts, dicom=True))
    assert {Path(row["path"]).suffix for row in rows} == {".dcm"}
    assert {file.parent.name for file in (tmp_path / "out").rglob("*.png")} == {"masks"}
    series = {}
    for row in rows:
        path = tmp_path / "out" / row["path"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        number, slice_index = (int(part) for part in path.stem[1:].split("_"))
        anomalous = row["label"] == "anomalous"
        image = draw(row["task"], seed=2_000_000 + number, anomalous=anomalous, size=32, slice_index=slice_index)
        stored = read_image(path)
        low, high = stored.value_range
        np.testing.assert_allclose((stored.pixels - low) / (high - low), image.pixels, atol=0.5 / 255 + 1e-6)
        header = pydicom.dcmread(path, stop_before_pixels=True)
        assert header.PatientID == row["patient_id"]
        series.setdefault(header.SeriesInstanceUID, set()).add(row["patient_id"])
        assert ("FrameOfReferenceUID" in header) == (row["task"] in ("head_ct", "brain_mr"))
    assert all(len(patients) == 1 for patients in series.values())
    assert len(series) == len({row["patient_id"] for row in rows})


def test_files_hold_what_draw_gives(benchmark):
    row = next(row for row in read_rows(benchmark) if row["task"] == "fundus" and row["label"] == "anomalous")
    number, slice_index = (int(part) for part in Path(row["path"]).stem[1:].split("_"))
    image = draw("fundus", seed=2_000_000 + number, anomalous=True, size=32, slice_index=slice_index)
    stored = np.asarray(Image.open(benchmark.parent / row["path"])).transpose(2, 0, 1)
    assert np.abs(stored / 255.0 - image.pixels).max() <= 0.5 / 255 + 1e-6
    mask = np.asarray(Image.open(benchmark.parent / row["mask"]))
    assert np.array_equal(mask, np.where(image.mask, 255, 0))
    assert Path(row["path"]).parent.name == image.pathology


def test_files_of_a_benchmark_are_known_as_drawn_and_others_are_not(benchmark, tmp_path, monkeypatch):
    out = benchmark.parent
    for row in read_rows(benchmark)[:3]:
        assert is_drawn(out / row["path"])
    assert is_drawn(benchmark)
    copied = tmp_path / "fundus" / "train" / "normal" / "p0000_0.png"
    copied.parent.mkdir(parents=True)
    copied.write_bytes((out / read_rows(benchmark)[0]["path"]).read_bytes())
    assert not is_drawn(copied)
    assert not is_drawn(out.parent / "other.png")
    monkeypatch.chdir(out / "fundus")
    assert is_drawn(Path("train/normal/p0000_0.png")), "the folder may be above where a relative path starts"
    monkeypatch.chdir(tmp_path)
    assert not is_drawn(Path("fundus/train/normal/p0000_0.png"))


def test_no_patient_is_in_two_groups_and_some_have_two_images(benchmark):
    groups, images = {}, {}
    for row in read_rows(benchmark):
        groups.setdefault(row["patient_id"], set()).add((row["split"], row["label"]))
        images[row["patient_id"]] = images.get(row["patient_id"], 0) + 1
    assert all(len(group) == 1 for group in groups.values())
    assert set(images.values()) == {1, 2}
    assert all(row["label"] == "normal" for row in read_rows(benchmark) if row["split"] == "train")


def test_writing_again_replaces_the_earlier_benchmark_and_its_files(tmp_path):
    write_benchmark(tmp_path, train=3, test_normal=1, test_anomalous=2, size=32, tasks=["fundus", "head_ct"])
    (tmp_path / "fundus" / "my notes.txt").write_text("kept")
    manifest = write_benchmark(tmp_path, train=1, test_normal=0, test_anomalous=1, size=32, tasks=["head_ct"])
    rows = read_rows(manifest)
    assert {tmp_path / row[column] for row in rows for column in ("path", "mask") if row[column]} == set(
        tmp_path.rglob("*.png")
    )
    assert (tmp_path / "fundus" / "my notes.txt").is_file()
    assert not (tmp_path / "fundus" / "train").exists()


def test_a_folder_of_something_else_is_refused_untouched(tmp_path):
    photo = tmp_path / "fundus" / "mine.png"
    photo.parent.mkdir()
    photo.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"not empty and holds no phantom\.json") as caught:
        write_benchmark(tmp_path, train=1, test_normal=1, test_anomalous=1, size=32)
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [photo]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        write_benchmark(file, train=1, test_normal=1, test_anomalous=1, size=32)
    with pytest.raises(OutputError, match="cannot write"):
        write_benchmark(file / "below", train=1, test_normal=1, test_anomalous=1, size=32)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'brain-mri'.*Did you mean brain_mr\?"):
        draw("brain-mri", seed=0)


def test_an_unknown_task_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"Did you mean histology\?"):
        write_benchmark(tmp_path / "out", tasks=["fundus", "histo"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 0, "size": 31}, {"seed": 0, "slice_index": -1}])
def test_draw_refuses_numbers_out_of_range(bad):
    with pytest.raises(ConfigError, match="expected seed and slice_index of at least 0"):
        draw("fundus", **bad)


@pytest.mark.parametrize("bad", [{"train": -1}, {"seed": -1}, {"size": 8}, {"tasks": ["fundus", "fundus"]}])
def test_write_benchmark_refuses_settings_out_of_range(tmp_path, bad):
    with pytest.raises(ConfigError, match="counts and seed of at least 0"):
        write_benchmark(tmp_path / "out", **bad)
    assert not (tmp_path / "out").exists()
