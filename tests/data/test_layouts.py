import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from anatomaly.data import layouts
from anatomaly.data.layouts import rows_of
from anatomaly.data.manifest import load_manifest
from anatomaly.errors import ManifestError
from anatomaly.types import Sample


def make_images(folder, *names):
    """Write tiny images of different content below a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(map(ord, str(path)))
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 5), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(path)


def table(samples, folder):
    """Rows as tuples: (path below the folder, split, label, mask below the folder)."""

    def below(path):
        return None if path is None else path.relative_to(folder).as_posix()

    return [(below(s.path), s.split, s.label, below(s.mask)) for s in samples]


def test_mvtec_masks_belong_to_the_image_of_the_same_name_and_type(tmp_path):
    make_images(tmp_path, "train/good/000.png", "test/good/000.png", "test/crack/000.png", "test/crack/001.png")
    make_images(tmp_path, "test/hole/000.png", "ground_truth/crack/000_mask.png", "ground_truth/hole/000.png")
    assert table(layouts.read_mvtec(tmp_path, "bottle").samples, tmp_path) == [
        ("test/crack/000.png", "test", 1, "ground_truth/crack/000_mask.png"),
        ("test/crack/001.png", "test", 1, None),
        ("test/good/000.png", "test", 0, None),
        ("test/hole/000.png", "test", 1, "ground_truth/hole/000.png"),
        ("train/good/000.png", "train", 0, None),
    ]


def test_bmad_ungood_is_anomalous_and_masks_come_from_its_label_folder(tmp_path):
    make_images(tmp_path, "train/good/1.png", "valid/good/img/2.png", "valid/good/label/2.png")
    make_images(tmp_path, "test/Ungood/img/3.png", "test/Ungood/label/3.png", "test/good/img/4.png")
    samples = load_manifest(tmp_path, task="liver").samples
    assert table(samples, tmp_path) == [
        ("test/Ungood/img/3.png", "test", 1, "test/Ungood/label/3.png"),
        ("test/good/img/4.png", "test", 0, None),
        ("train/good/1.png", "train", 0, None),
        ("valid/good/img/2.png", "val", 0, None),
    ]
    assert {sample.task for sample in samples} == {"liver"}


def test_flat_bmad_and_class_folders_need_no_img_folder(tmp_path):
    make_images(tmp_path, "train/good/1.png", "valid/Ungood/2.png", "test/Ungood/3.png", "test/good/4.png")
    labels = {sample.path.name: (sample.split, sample.label) for sample in load_manifest(tmp_path)}
    assert labels == {"1.png": ("train", 0), "2.png": ("val", 1), "3.png": ("test", 1), "4.png": ("test", 0)}


def test_zhanglab_class_folders_leave_out_anomalous_training_images_and_say_so(tmp_path):
    make_images(tmp_path, "train/NORMAL/a.jpeg", "train/PNEUMONIA/person1_b.jpeg", "train/PNEUMONIA/person2_b.jpeg")
    make_images(tmp_path, "val/NORMAL/c.jpeg", "val/PNEUMONIA/d.jpeg", "test/PNEUMONIA/e.jpeg")
    manifest = load_manifest(tmp_path)
    assert [(s.path.name, s.split, s.label) for s in manifest] == [
        ("e.jpeg", "test", 1),
        ("a.jpeg", "train", 0),
        ("c.jpeg", "val", 0),
        ("d.jpeg", "val", 1),
    ]
    assert manifest.left_out["file", "anomalous in train"] == 2


def test_class_folders_named_after_what_is_absent_are_normal(tmp_path):
    make_images(tmp_path, "train/No Finding/a.png", "test/no_tumor/b.png", "test/glioma/c.png", "test/missing/d.png")
    assert {s.path.name: s.label for s in load_manifest(tmp_path)} == {"a.png": 0, "b.png": 0, "c.png": 1, "d.png": 1}


def test_class_folders_of_unclear_meaning_are_refused_together(tmp_path):
    make_images(tmp_path, "train/good/a.png", "test/benign/b.png", "val/unlabeled/c.png")
    with pytest.raises(ManifestError) as caught:
        load_manifest(tmp_path)
    assert "labels 'benign' (test), 'unlabeled' (val) could mean normal or anomalous. Rename" in str(caught.value)


def test_what_a_layout_leaves_out_is_counted(tmp_path):
    make_images(tmp_path, "train/good/a.png", "train/bad/b.png", "test/good/c.png", "test/masks/c.png", "extra/d.png")
    make_images(tmp_path, "ground_truth/bad/e.png")
    for name in ("readme.txt", "test/list.csv", "test/good/c.xml"):
        (tmp_path / name).write_text("text")
    manifest = load_manifest(tmp_path)
    assert [s.path.name for s in manifest] == ["c.png", "a.png"]
    expected = {("file", "not an image"): 3, ("file", "anomalous in train"): 1, ("folder", "of masks"): 1}
    assert {key: n for key, n in manifest.left_out.items() if n} == {**expected, ("folder", "outside of the splits"): 1}
    assert manifest.select(split="test").left_out == manifest.left_out == manifest.with_hashes().left_out


def test_what_lies_beside_data_sets_is_counted(tmp_path):
    make_images(tmp_path, "chest/train/good/1.png", "liver/train/good/1.png", "stray.png")
    (tmp_path / "liver/notes.txt").write_text("text")
    expected = {("file", "outside of the data sets"): 1, ("file", "not an image"): 1}
    assert {key: n for key, n in load_manifest(tmp_path).left_out.items() if n} == expected


def test_a_folder_without_any_image_says_what_it_holds(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / ".b.png").write_text("text")
    with pytest.raises(ManifestError, match=r"no images found \(2 files left out: 1 hidden, 1 not an image\)"):
        load_manifest(tmp_path)


def test_images_directly_in_a_split_folder_are_refused(tmp_path):
    make_images(tmp_path, "train/a.png", "test/good/b.png")
    with pytest.raises(ManifestError, match="outside of a class folder"):
        load_manifest(tmp_path)


def test_a_mask_folder_beside_the_classes_is_no_class(tmp_path):
    make_images(tmp_path, "train/normal/a.png", "test/tumor/b.png", "test/annotation/b.png")
    assert [s.path.parent.name for s in load_manifest(tmp_path)] == ["tumor", "normal"]


def test_plain_folder_is_unlabelled_test_images_in_natural_order(tmp_path):
    folder = tmp_path / "clinic"
    make_images(folder, "10.png", "2.png", "sub/1.png", "2_mask.png", "masks/2.png", ".hidden.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    manifest = load_manifest(folder)
    assert table(manifest, folder) == [
        ("2.png", "test", None, None),
        ("10.png", "test", None, None),
        ("sub/1.png", "test", None, None),
    ]
    assert manifest.tasks == ("clinic",)


def test_files_without_suffix_are_recognised_by_content(tmp_path):
    make_images(tmp_path, "a.png")
    (tmp_path / "a.png").rename(tmp_path / "1.2.840.7")
    (tmp_path / "README").write_text("not an image")
    assert [s.path.name for s in load_manifest(tmp_path)] == ["1.2.840.7"]


def test_every_page_of_a_tiff_becomes_a_row_and_shares_the_mask(tmp_path):
    make_images(tmp_path, "train/good/a.png", "ground_truth/bad/v_mask.tif")
    pages = [PIL.Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (1, 2, 3)]
    (tmp_path / "test/bad").mkdir(parents=True)
    pages[0].save(tmp_path / "test/bad/v.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "test/bad/w.tif")
    bad = [s for s in load_manifest(tmp_path) if s.label == 1]
    assert [(s.name, s.mask is not None) for s in bad] == [
        ("v.tif#0", True),
        ("v.tif#1", True),
        ("v.tif#2", True),
        ("w.tif", False),
    ]


def test_every_slice_of_a_nifti_volume_becomes_a_row(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 4, 3), np.float32), np.eye(4)), tmp_path / "scan.nii.gz")
    assert [s.frame for s in load_manifest(tmp_path)] == [0, 1, 2]


def test_a_broken_volume_stays_one_row_for_the_check_to_report(tmp_path):
    (tmp_path / "scan.tif").write_bytes(b"not a tiff")
    assert [s.name for s in load_manifest(tmp_path)] == ["scan.tif"]


def test_meta_json_paths_start_at_its_folder_and_classes_are_tasks(tmp_path):
    make_images(tmp_path, "brain/train/good/1.png", "brain/test/x/2.png", "brain/gt/2.png", "liver/test/good/3.png")
    meta = {
        "train": {"brain": [{"img_path": "brain/train/good/1.png", "mask_path": "", "anomaly": 0}]},
        "test": {
            "brain": [{"img_path": "brain/test/x/2.png", "mask_path": "brain/gt/2.png", "anomaly": 1}],
            "liver": [{"img_path": "liver/test/good/3.png", "mask_path": "", "anomaly": 0}],
        },
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    for source in (tmp_path, tmp_path / "meta.json"):
        manifest = load_manifest(source)
        assert table(manifest, tmp_path) == [
            ("brain/train/good/1.png", "train", 0, None),
            ("brain/test/x/2.png", "test", 1, "brain/gt/2.png"),
            ("liver/test/good/3.png", "test", 0, None),
        ]
        assert [s.task for s in manifest] == ["brain", "brain", "liver"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "expected"),
        ('{"test": {"a": [{"anomaly": 0}]}}', "test/a entry 0: has no img_path"),
        ('{"test": {"a": [{"img_path": "x.png", "anomaly": "no"}]}}', "anomaly is 'no', expected 0 or 1"),
        ('{"holdout": {"a": [{"img_path": "x.png", "anomaly": 0}]}}', "unknown split 'holdout'"),
        ('{"train": {"a": 3}}', "expected"),
    ],
)
def test_malformed_meta_json_is_named(tmp_path, text, message):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ManifestError, match=message):
        load_manifest(tmp_path)


def test_a_folder_of_data_sets_has_one_task_per_folder(tmp_path):
    make_images(tmp_path, "liver/train/good/1.png", "liver/test/Ungood/img/2.png", "liver/test/Ungood/label/2.png")
    make_images(tmp_path, "chest/train/good/1.png", "chest/test/bad/2.png", "fundus/images/7.png")
    (tmp_path / "fundus/manifest.csv").write_text("path,task\nimages/7.png,retina\n")
    manifest = load_manifest(tmp_path)
    assert manifest.tasks == ("chest", "liver", "retina")
    assert [s.task for s in manifest] == ["chest", "chest", "retina", "liver", "liver"]


def test_a_stray_image_folder_among_data_sets_is_refused(tmp_path):
    make_images(tmp_path, "chest/train/good/1.png", "extra/1.png")
    with pytest.raises(ManifestError, match="extra is only images"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("inside", ["nothing", "train/good/readme.txt"])
def test_a_folder_without_images_lists_the_layouts(tmp_path, inside):
    (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / inside).write_text("text")
    with pytest.raises(ManifestError, match=r"no images.*MVTec.*BMAD"):
        load_manifest(tmp_path)


REAL = Path(__file__).parents[3] / "shared" / "data" / "real"


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="the real image sets are absent")
@pytest.mark.parametrize("read", ["csv", "folders"])
def test_real_sets_have_the_counts_of_their_readme(read):
    expected = {"headct": (50, 47, 100), "zhanglab": (400, 234, 390), "brain_tumor": (400, 129, 300)}
    expected |= {"fundus": (200, 150, 150), "kidney_ct": (300, 170, 150), "oral_histo": (100, 90, 150)}
    expected |= {"otoscopy": (100, 112, 150), "wce_bleeding": (300, 170, 150), "lung_us": (81, 97, 150)}
    expected |= {"leukemia_smear": (300, 170, 150), "dermoscopy": (40, 39, 40)}
    manifest = load_manifest(REAL)
    assert manifest.tasks == tuple(sorted(expected))
    for task, counts in expected.items():
        own = manifest.select(task=task) if read == "csv" else layouts.read_splits(REAL / task, task).samples
        kinds = [(s.split, s.label) for s in own]
        assert (kinds.count(("train", 0)), kinds.count(("test", 0)), kinds.count(("test", 1))) == counts
        assert len(kinds) == sum(counts)


def test_one_path_is_taken_for_a_list_of_one(tmp_path):
    make_images(tmp_path, "ab.png")
    row = Sample(tmp_path / "ab.png", "t")
    for items in (row.path, str(row.path), [row.path], [row]):
        assert list(rows_of(items, task="t")) == [row]


# --- plain folders of normal images ---


def tasks_of(folder, **options):
    manifest = load_manifest(folder, normal=True, **options)
    assert {(row.split, row.label) for row in manifest} == {("train", 0)}
    return {task: len(manifest.select(task=task)) for task in manifest.tasks}


def test_a_plain_folder_is_one_task_of_normal_images(tmp_path):
    make_images(tmp_path / "eight normals", "1.png", "2.png", "more/3.png")
    assert tasks_of(tmp_path / "eight normals") == {"eight normals": 3}
    assert tasks_of(tmp_path / "eight normals", task="head_ct") == {"head_ct": 3}


def test_a_folder_of_folders_is_a_task_each(tmp_path):
    make_images(tmp_path, "brain/a/1.png", "brain/b/1.png", "liver/1.png")
    (tmp_path / "notes.txt").write_text("of the radiologist")
    (tmp_path / "empty").mkdir()
    assert tasks_of(tmp_path) == {"brain": 2, "liver": 1}
    assert tasks_of(tmp_path, task="all") == {"all": 3}
    assert load_manifest(tmp_path, normal=True).left_out["file", "not an image"] == 1


def test_a_folder_named_normal_is_no_task(tmp_path):
    make_images(tmp_path / "head", "normal/1.png", "normal/2.png")
    assert tasks_of(tmp_path / "head") == {"head": 2}


@pytest.mark.parametrize("names", [("normal", "hemorrhage"), ("abnormal", "brain"), ("abnormal",)])
def test_anomalous_images_are_not_taken_for_normal_ones(names, tmp_path):
    make_images(tmp_path, *(f"{name}/1.png" for name in names))
    with pytest.raises(ManifestError, match=r"normal looks like a folder of anom|hemorrhage looks .*ones, .*/normal"):
        load_manifest(tmp_path, normal=True)


def test_a_known_layout_stays_what_it_is(tmp_path):
    make_images(tmp_path, "train/good/1.png", "test/good/2.png", "test/bad/3.png")
    assert load_manifest(tmp_path, normal=True) == load_manifest(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ManifestError, match="no images found"):
        load_manifest(tmp_path, normal=True)
