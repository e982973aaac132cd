"""The catalogue of public data sets, on small fixtures in the layouts in which their owners publish them."""

import csv
import hashlib
import io
import json
import os
import random
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from anatomaly.cli import main
from anatomaly.data.catalog import download
from anatomaly.data.catalog import prepare as catalog
from anatomaly.data.catalog.prepare import describe, find_data_set, prepare, write_prepared
from anatomaly.data.catalog.table import CATALOG
from anatomaly.data.manifest import load_manifest
from anatomaly.errors import ConfigError, ManifestError, OutputError

DOCS = Path(__file__).parents[3] / "docs"

_stream = io.BytesIO()
PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(_stream, "PNG")
PIXELS = _stream.getvalue()  # readers go by the first bytes, so this serves as .jpg too


def put(folder, *names, content=PIXELS):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def table(file, header, rows, *, shuffled=False):
    rows = list(rows)
    if shuffled:
        random.Random(1).shuffle(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def dicom(path, seed):
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = uid.SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = f"1.2.3.{seed + 1}"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 32, 32, 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.PixelData = np.random.default_rng(seed).integers(0, 256, (32, 32), dtype=np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def headct(root, *, shuffled=False):
    rows = (f"{i}, {int(i < 10)}" for i in range(30))  # the blanks of the original, and ids without zeros
    table(root / "labels.csv", "id, hemorrhage", rows, shuffled=shuffled)
    put(root, *(f"head_ct/head_ct/{i:03d}.png" for i in range(29)), "head_ct/head_ct/029.PNG")
    put(root, "head_ct/head_ct/._000.png", content=b"AppleDouble")
    return 30


def brainmri(root, *, shuffled=False):
    names = [f"yes/Y{i}.jpg" for i in range(6)] + [f"no/{i} no.jpeg" for i in range(8)] + ["no/No19.JPG", "no/N1.png"]
    put(root, *names, *(f"brain_tumor_dataset/{name}" for name in names), "yes/Thumbs.db")
    return len(names)


def zhanglab(root, *, shuffled=False):
    names = [f"train/NORMAL/IM-{i:04d}-0001.jpeg" for i in range(115, 121)]
    names += ["train/NORMAL/NORMAL2-IM-0115-0001-0002.jpeg", "train/NORMAL/NORMAL-77-0001.jpeg"]
    names += ["train/PNEUMONIA/person1_bacteria_1.jpeg", "train/PNEUMONIA/person2_virus_4.jpeg"]
    names += ["val/NORMAL/NORMAL2-IM-1427-0001.jpeg", "val/PNEUMONIA/person9_bacteria_30.jpeg"]
    names += [
        "val/PNEUMONIA/person8_bacteria_30.jpeg",
        "test/NORMAL/IM-0115-0002.jpeg",
        "test/NORMAL/IM-0001-0001.jpeg",
    ]
    names += ["test/PNEUMONIA/person9_virus_1.jpeg", "test/PNEUMONIA/BACTERIA-88-0001.JPEG"]
    put(root / "chest_xray", *names, "__MACOSX/._x", *(f"chest_xray/{name}" for name in names))
    put(root / "chest_xray", "train/.DS_Store", "train/NORMAL/.DS_Store", "__MACOSX/train/NORMAL/._IM-0115-0001.jpeg")
    return len(names)


CHEXPERT = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"  # noqa: E501 as in the original


def chexpert_row(patient, study, *, split="train", view="frontal", none="", edema="", fracture="", devices=""):
    path = f"CheXpert-v1.0-small/{split}/patient{patient:05d}/study{study}/view1_{view}.jpg"
    projection = "AP" if view == "frontal" else ""
    return f"{path},Female,68,{view.capitalize()},{projection},{none},,,,,{edema},,,,,,,{fracture},{devices}"


def chexpert(root, *, shuffled=False):
    train = [chexpert_row(i, 1, none="1.0", devices="1.0" if i == 3 else "") for i in range(1, 11)]
    train += [chexpert_row(i, 2, none="1.0") for i in range(1, 6)]
    train += [chexpert_row(1, 1, view="lateral", none="1.0")]
    train += [chexpert_row(i, 1, edema="1.0") for i in range(20, 25)]
    train += [chexpert_row(20, 2, none="1.0"), chexpert_row(21, 2, fracture="1.0", edema="-1.0")]
    train += [chexpert_row(30, 1, edema="-1.0"), chexpert_row(31, 1), chexpert_row(32, 1, none="1.0", edema="-1.0")]
    train += [chexpert_row(33, 1, none="1.0", edema="1.0"), chexpert_row(34, 1, none="0.0", devices="1.0")]
    valid = [chexpert_row(64541, 1, split="valid", none="1.0", edema="0.0")]
    valid += [chexpert_row(64542, 1, split="valid", none="0.0", edema="1.0")]
    home = root / "archive" / "CheXpert-v1.0-small"
    table(home / "train.csv", CHEXPERT, train, shuffled=shuffled)
    table(home / "valid.csv", CHEXPERT, valid, shuffled=shuffled)
    put(root / "archive", *(row.split(",")[0] for row in train + valid))
    return len(train) + len(valid)


def unimedical(root, *, shuffled=False):
    def entry(task, split, kind, name):
        mask = f"{task}/ground_truth/Ungood/{name}" if kind == "Ungood" else ""
        put(root / "medical", f"{task}/{split}/{kind}/{name}", *([mask] if mask else []))
        path = f"{task}/{split}/{kind}/{name}"
        return {"img_path": path, "mask_path": mask, "cls_name": task, "specie_name": kind, "anomaly": int(bool(mask))}

    meta = {"train": {}, "test": {}}
    for task in ("brain", "liver", "retinal"):
        meta["train"][task] = [entry(task, "train", "good", f"{i:05d}_60.png") for i in range(4)]
        meta["test"][task] = [entry(task, "test", "good", f"{i:05d}_61.png") for i in (3, 7)]  # case 3 is in train too
        meta["test"][task] += [entry(task, "test", "Ungood", f"{i:05d}_60.png") for i in (8, 9)]
        if shuffled:
            meta["train"][task].reverse()
    (root / "medical" / "meta.json").write_text(json.dumps(meta))
    return 24


def bmad(root, *, shuffled=False):
    for folder in ("Brain", "Liver", "RESC"):
        put(root / folder, *(f"train/good/img/{i:05d}_60.png" for i in range(4)), "valid/good/img/00010_1.png")
        put(root / folder, "valid/good/label/00010_1.png", "valid/Ungood/img/00011_1.png", "test/good/img/00012_1.png")
        put(root / folder, "test/Ungood/img/00013_1.png", "test/Ungood/label/00013_1.png", "test/Ungood/img/.x.png")
    return 24


def his(root, *, shuffled=False):
    put(root / "camelyon16", "train/good/1000.png", "train/good/1001.png", "train/good/tumor_009_5_7.png")
    put(root / "camelyon16", "valid/good/1080.png", "valid/Ungood/1000.png", "valid/good/Tumor_009_5_9.png")
    put(root / "camelyon16", "test/good/1000.png", "test/Ungood/100.png", "test/Ungood/tumor_009_1_1.PNG")
    return 9


def lag(root, *, shuffled=False):
    for name, count in (("non_glaucoma", 10), ("suspicious_glaucoma", 5)):
        put(root / name, *(f"{kind}/{i}.jpg" for i in range(count) for kind in ("image", "attention_map")))
        put(root / name, *(f"label/{i:04d}.txt" for i in range(count)), content=b"0")
    return 15


def aptos(root, *, shuffled=False):
    ids = [hashlib.md5(bytes([i])).hexdigest()[:12] for i in range(20)]
    table(root / "train.csv", "\ufeffid_code,diagnosis", (f"{n},{i % 5}" for i, n in enumerate(ids)), shuffled=shuffled)
    put(root, *(f"train_images/{n}.png" for n in ids), "test_images/aaaa.png", "train_images/unlisted.png")
    table(root / "test.csv", "id_code", ["aaaa"])
    return 20


RSNA_CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")


def rsna(root, *, shuffled=False):
    ids = [f"{hashlib.md5(bytes([i])).hexdigest()[:8]}-438c-4204-a5b5-1be8f6{i:06d}" for i in range(18)]
    classes, boxes = [], []
    for number, name in enumerate(ids):
        kind = RSNA_CLASSES[number % 3]
        box = "10.0,20.0,30.0,40.0,1" if kind == "Lung Opacity" else ",,,,0"
        classes += [f"{name},{kind}"] * (1 + (kind == "Lung Opacity"))  # one row per box
        boxes += [f"{name},{box}"] * (1 + (kind == "Lung Opacity"))
        dicom(root / "stage_2_train_images" / f"{name}.dcm", number)
    table(root / "stage_2_detailed_class_info.csv", "patientId,class", classes, shuffled=shuffled)
    table(root / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", boxes, shuffled=shuffled)
    put(root, "stage_2_test_images/unlabelled.dcm")
    return 18


def braintumor(root, *, shuffled=False):
    for split, short, count in (("Training", "Tr", 3), ("Testing", "Te", 2)):
        for kind in ("glioma", "meningioma", "notumor", "pituitary"):
            put(root / split / kind, *(f"{short}-{kind[:2]}_{i:04d}.jpg" for i in range(count)))
    return 20


ORIGINALS = {
    "HeadCT": headct,
    "BrainMRI": brainmri,
    "ZhangLab": zhanglab,
    "CheXpert": chexpert,
    "Uni-Medical": unimedical,
    "HIS": his,
    "LAG": lag,
    "APTOS": aptos,
    "RSNA": rsna,
    "BrainTumor": braintumor,
}
BUILDS = [*ORIGINALS.items(), ("Uni-Medical", bmad)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(data set with the fixture's number of images, its folder) by name of the builder; read only."""
    everything = {}
    for name, build in BUILDS:
        root = tmp_path_factory.mktemp(build.__name__)
        everything[build.__name__] = replace(find_data_set(name), count=build(root)), root
    return everything


def rows(made, name):
    """(split, label, patient) by the path below the folder."""
    data_set, root = made[name]
    return {
        s.path.relative_to(root).as_posix(): (s.split, s.label, s.patient_id) for s in prepare(data_set, root).manifest
    }


def counts(made, name):
    return Counter((s.task, s.split, s.label) for s in prepare(*made[name]).manifest)


@pytest.fixture(params=[build.__name__ for _, build in BUILDS])
def prepared(request, made):
    return prepare(*made[request.param])


def test_every_data_set_has_a_fixture_here():
    assert {data_set.name for data_set in CATALOG} == set(ORIGINALS)


def test_training_sees_normal_images_only_and_every_split_rule_leaves_both_labels_to_test(prepared):
    assert {s.label for s in prepared.manifest if s.split == "train"} == {0}
    assert {s.label for s in prepared.manifest if s.split == "test"} == {0, 1}


def test_no_patient_is_in_two_splits(prepared):
    splits = defaultdict(set)
    for sample in prepared.manifest:
        if sample.patient_id:
            splits[sample.task, sample.patient_id].add(sample.split)
    assert all(len(found) == 1 for found in splits.values())


def test_the_csv_reads_back_and_is_the_same_twice(prepared, made, tmp_path):
    first = write_prepared(prepared, tmp_path / "new" / "folder")
    second = write_prepared(prepared, tmp_path / "new" / "folder" / "again.csv")
    assert first.read_bytes() == second.read_bytes()
    assert write_prepared(prepared, tmp_path / "new" / "folder").read_bytes() == first.read_bytes()  # over itself
    read = load_manifest(first)
    assert [replace(s, path=s.path.resolve()) for s in read] == [
        replace(s, path=s.path.resolve()) for s in prepared.manifest
    ]


@pytest.mark.parametrize(("name", "build"), BUILDS)
def test_the_split_depends_on_names_only(name, build, made, tmp_path, monkeypatch):
    """Rows shuffled, folders listed backwards, another place: the same images in the same splits."""
    build(tmp_path / "other", shuffled=True)
    expected = rows(made, build.__name__)
    walk, listdir = os.walk, os.listdir

    def backwards(folder):
        for parent, folders, files in walk(folder):
            folders.reverse()
            yield parent, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    monkeypatch.setattr(os, "listdir", lambda folder=".": listdir(folder)[::-1])
    found = rows({name: (made[build.__name__][0], tmp_path / "other")}, name)
    assert list(found.items()) == list(expected.items())  # in the same order too


def test_own_splits_are_the_documented_ones(made):
    """docs/datasets.md: order normal images by sha256 of the set's name, a line feed and the id; a fifth is tested."""
    order = sorted(range(10, 30), key=lambda i: hashlib.sha256(f"HeadCT\n{i}".encode()).hexdigest())
    tested = {int(Path(path).stem) for path, row in rows(made, "headct").items() if row[:2] == ("test", 0)}
    assert tested == set(order[:4])
    order = sorted([*(f"no/{i} no.jpeg" for i in range(8)), "no/No19.JPG", "no/N1.png"],
                   key=lambda n: hashlib.sha256(f"BrainMRI\n{n}".encode()).hexdigest())  # fmt: skip
    assert {path for path, row in rows(made, "brainmri").items() if row[:2] == ("test", 0)} == set(order[:2])


def test_headct_ids_without_zeros_and_blanks_in_the_header(made):
    assert counts(made, "headct") == {("headct", "train", 0): 16, ("headct", "test", 0): 4, ("headct", "test", 1): 10}
    labels = {int(Path(path).stem): row[1] for path, row in rows(made, "headct").items()}
    assert labels == {i: int(i < 10) for i in range(30)}


def test_brainmri_is_read_once_though_its_archive_holds_it_twice(made):
    assert {path.split("/")[0] for path in rows(made, "brainmri")} == {"yes", "no"}
    assert counts(made, "brainmri") == {
        ("brainmri", "train", 0): 8,
        ("brainmri", "test", 0): 2,
        ("brainmri", "test", 1): 6,
    }


def test_zhanglab_keeps_the_owners_test_set_and_leaves_out_training_images_of_its_patients(made):
    found = {Path(path).name: row for path, row in rows(made, "zhanglab").items()}
    assert {name for name, row in found.items() if row[0] == "test"} == {
        "IM-0115-0002.jpeg",
        "IM-0001-0001.jpeg",
        "person9_virus_1.jpeg",
        "BACTERIA-88-0001.JPEG",
    }
    assert "IM-0115-0001.jpeg" not in found  # the child is tested
    assert found["NORMAL2-IM-0115-0001-0002.jpeg"] == ("train", 0, "NORMAL2-IM-0115")  # another series of numbers
    assert found["NORMAL-77-0001.jpeg"] == ("train", 0, "77")
    assert {name for name, row in found.items() if row[0] == "val"} == {
        "NORMAL2-IM-1427-0001.jpeg",
        "person8_bacteria_30.jpeg",  # person 9 is tested
    }
    notes = prepare(*made["zhanglab"]).notes
    assert "left out 2: anomalous training images" in notes
    assert "left out 2: training or validation images of patients in a later split" in notes


def test_zhanglab_is_found_from_the_inner_folder_too(made):
    data_set, root = made["zhanglab"]
    for source in (root / "chest_xray", root / "chest_xray" / "chest_xray"):
        names = {s.path.name for s in prepare(data_set, source).manifest}
        assert names == {Path(path).name for path in rows(made, "zhanglab")}


def test_chexpert_takes_certain_frontal_views(made):
    found = rows(made, "chexpert")
    patients = {row[2] for row in found.values()}
    assert not patients & {f"patient{i:05d}" for i in range(30, 35)}  # uncertain, unmentioned, contradictory
    assert not [path for path in found if "lateral" in path]
    assert {row[:2] for path, row in found.items() if "/valid/" in path} == {("val", 0), ("val", 1)}
    assert {row[1] for row in found.values() if row[2] == "patient00003"} == {0}  # a device is no finding
    assert ("chexpert", "test", 1) in counts(made, "chexpert")
    notes = " ".join(prepare(*made["chexpert"]).notes)
    assert "left out 1: lateral views" in notes
    assert "left out 5: uncertain (-1)" in notes


def test_chexpert_tests_one_image_of_each_drawn_patient(made):
    found = rows(made, "chexpert")
    tested = [row for row in found.values() if row[0] == "test"]
    assert Counter(row[1] for row in tested) == {0: 2, 1: 5}  # a fifth of ten normal patients; five anomalous ones
    assert len({row[2] for row in tested}) == 7
    few = replace(made["chexpert"][0], most_tested=1)
    manifest = prepare(few, made["chexpert"][1]).manifest
    assert Counter(s.label for s in manifest if s.split == "test") == {0: 1, 1: 1}
    drawn = {s.patient_id for s in manifest if s.split == "test"}
    assert not drawn & {s.patient_id for s in manifest if s.split != "test"}


def test_unimedical_has_three_tasks_with_masks_from_both_publishers(made):
    for name in ("unimedical", "bmad"):
        manifest = prepare(*made[name]).manifest
        assert manifest.tasks == ("brain", "liver", "retinal")
        masked = [s for s in manifest if s.mask]
        assert {s.label for s in masked} == {1}
        assert {s.mask.name for s in masked} == {s.path.name for s in manifest if s.label and s.split == "test"}
    assert counts(made, "bmad")["liver", "val", 1] == 1  # Ungood
    assert counts(made, "unimedical")["liver", "train", 0] == 4  # its names state no patient
    assert counts(made, "unimedical")["brain", "train", 0] == 3  # case 00003 is tested
    assert {s.patient_id for s in prepare(*made["unimedical"]).manifest.select(task="liver")} == {None}


def test_a_meta_json_of_another_data_set(tmp_path):
    unimedical(tmp_path)
    file = tmp_path / "medical" / "meta.json"
    file.write_text(file.read_text().replace('"liver"', '"bottle"'))
    with pytest.raises(ManifestError, match="holds the class 'bottle', expected brain, liver, retinal"):
        prepare(find_data_set("Uni-Medical"), tmp_path)


def test_his_calls_ungood_anomalous_and_reads_the_slide_where_it_is_named(made):
    found = {path.removeprefix("camelyon16/"): row for path, row in rows(made, "his").items()}
    assert found == {
        "train/good/1000.png": ("train", 0, None),
        "train/good/1001.png": ("train", 0, None),
        "valid/good/1080.png": ("val", 0, None),
        "valid/Ungood/1000.png": ("val", 1, None),
        "test/good/1000.png": ("test", 0, None),
        "test/Ungood/100.png": ("test", 1, None),
        "test/Ungood/tumor_009_1_1.PNG": ("test", 1, "tumor_009"),
    }


def test_several_folders_that_fit_are_a_question(made, tmp_path):
    for name in ("Chest", "camelyon16"):
        shutil.copytree(made["his"][1] / "camelyon16", tmp_path / name)
    with pytest.raises(ManifestError, match=r"several folders in it fit, Chest, camelyon16\. Name one"):
        prepare(made["his"][0], tmp_path)


def test_lag_attention_maps_are_no_images(made):
    assert {path.split("/")[1] for path in rows(made, "lag")} == {"image"}
    assert counts(made, "lag") == {("lag", "train", 0): 8, ("lag", "test", 0): 2, ("lag", "test", 1): 5}


def test_aptos_grades_one_to_four_are_anomalous(made):
    assert counts(made, "aptos") == {("aptos", "train", 0): 3, ("aptos", "test", 0): 1, ("aptos", "test", 1): 16}
    assert "left out 1: not in train.csv" in prepare(*made["aptos"]).notes


def test_rsna_not_normal_is_anomalous_and_repeated_boxes_are_one_row(made):
    assert counts(made, "rsna") == {("rsna", "train", 0): 4, ("rsna", "test", 0): 2, ("rsna", "test", 1): 12}
    assert all(row[2] == Path(path).stem for path, row in rows(made, "rsna").items())


def test_rsna_tables_that_contradict_each_other(tmp_path):
    rsna(tmp_path)
    file = tmp_path / "stage_2_train_labels.csv"
    file.write_text(file.read_text().replace(",,,,0", "1,1,2,2,1"))
    data_set = replace(find_data_set("RSNA"), count=18)
    with pytest.raises(ManifestError, match="row 2: marks an opacity on an image that the class table calls Normal"):
        prepare(data_set, tmp_path)
    file.unlink()
    assert len(prepare(data_set, tmp_path).manifest) == 18  # the class table alone is enough


def test_braintumor_keeps_testing_whole(made):
    assert counts(made, "braintumor") == {
        ("braintumor", "train", 0): 3,
        ("braintumor", "test", 0): 2,
        ("braintumor", "test", 1): 6,
    }


def test_missing_images_are_counted_and_can_be_left_out_without_moving_the_others(tmp_path, made):
    headct(tmp_path)
    gone = [tmp_path / "head_ct" / "head_ct" / f"{i:03d}.png" for i in (4, 5, 12)]
    for file in gone:
        file.unlink()
    data_set = made["headct"][0]
    with pytest.raises(ManifestError, match=r"3 of 30 files are missing, the first is .*head_ct.004\.png"):
        prepare(data_set, tmp_path)
    prepared = prepare(data_set, tmp_path, allow_missing=True)
    assert "left out 3: missing files" in prepared.notes
    expected = {path: row for path, row in rows(made, "headct").items() if tmp_path / path not in gone}
    assert {s.path.relative_to(tmp_path).as_posix(): (s.split, s.label, None) for s in prepared.manifest} == expected


def test_a_missing_mask_is_a_missing_file_but_its_image_stays(tmp_path, made):
    unimedical(tmp_path)
    (tmp_path / "medical" / "liver" / "ground_truth" / "Ungood" / "00008_60.png").unlink()
    with pytest.raises(ManifestError, match="1 of 29 files are missing"):
        prepare(made["unimedical"][0], tmp_path)
    manifest = prepare(made["unimedical"][0], tmp_path, allow_missing=True).manifest
    assert len(manifest) == len(rows(made, "unimedical"))
    assert sum(s.mask is None for s in manifest if s.label) == 1


def test_fewer_images_than_the_original_are_refused_and_more_are_noted(made):
    data_set, root = made["brainmri"]
    with pytest.raises(ManifestError, match="holds 16 images of BrainMRI, the original 253"):
        prepare(find_data_set("BrainMRI"), root)
    note = "the original has {} images, this one 16: figures do not compare"
    assert note.format(253) in prepare(find_data_set("BrainMRI"), root, allow_missing=True).notes
    assert note.format(15) in prepare(replace(data_set, count=15), root).notes


def test_another_folder_is_told_what_was_expected_and_found(tmp_path, made):
    put(tmp_path, *(f"{letter}.txt" for letter in "abcdefgh"), ".hidden")
    for data_set in CATALOG:
        with pytest.raises(ManifestError) as caught:
            prepare(data_set, tmp_path)
        assert data_set.layout in str(caught.value)
        assert "found a.txt, b.txt, c.txt, d.txt, e.txt, f.txt and 2 more." in str(caught.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, words in (
        (empty, "found nothing"),
        (tmp_path / "no", "no such folder"),
        (tmp_path / "a.txt", "Unpack"),
    ):
        with pytest.raises(ManifestError, match=words):
            prepare(made["lag"][0], source)


def test_a_folder_of_many_folders_is_not_searched(tmp_path, made):
    for i in range(download._MANY + 1):
        (tmp_path / f"patient{i}").mkdir()
    lag(tmp_path / "patient0")
    with pytest.raises(ManifestError, match="expected the layout of LAG"):
        prepare(made["lag"][0], tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "words"),
    [
        ("HeadCT", "labels.csv", "hemorrhage", "bleeding", "has no column 'hemorrhage', got id, bleeding"),
        ("HeadCT", "labels.csv", "3, 1", "3, 2", "row 5: hemorrhage is '2', expected one of 0, 1"),
        ("HeadCT", "labels.csv", "3, 1", "12, 1", "row 14: an image is both normal and anomalous"),
        ("HeadCT", "labels.csv", "3, 1", "3", "row 5: has fewer cells than the header"),
        ("RSNA", "stage_2_detailed_class_info.csv", ",Normal", ",normalish", "row 2: class is 'normalish'"),
        ("CheXpert", "archive/CheXpert-v1.0-small/train.csv", "-1.0", "maybe", "edema is 'maybe', expected 1, 0, -1"),
        ("CheXpert", "archive/CheXpert-v1.0-small/train.csv", "patient00001/", "x/", "row 2: the path holds no folder"),
    ],
)  # fmt: skip
def test_a_table_that_is_not_the_owners(name, file, old, new, words, tmp_path):
    count = ORIGINALS[name](tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(ManifestError, match=words) as caught:
        prepare(replace(find_data_set(name), count=count), tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_to_train_on(tmp_path, made):
    put(tmp_path, "yes/a.png", "no/b.png")
    with pytest.raises(ManifestError, match="holds no normal training image of BrainMRI"):
        prepare(replace(made["brainmri"][0], count=2), tmp_path)


def test_another_table_is_never_overwritten(made, tmp_path):
    headct(tmp_path)
    before = (tmp_path / "labels.csv").read_bytes()
    prepared = prepare(made["headct"][0], tmp_path)
    with pytest.raises(OutputError, match="exists and is no manifest"):
        write_prepared(prepared, tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_bytes() == before
    with pytest.raises(OutputError, match="cannot be written"):
        write_prepared(prepared, tmp_path / "labels.csv" / "inside")


def test_names_ignore_case_and_dashes():
    assert find_data_set("uni_medical") is find_data_set("UNIMEDICAL") is find_data_set("Uni-Medical")
    with pytest.raises(ConfigError, match=r"no data set .headtc., expected one of HeadCT, .* Did you mean HeadCT"):
        find_data_set("headtc")


@pytest.mark.parametrize("data_set", CATALOG, ids=lambda data_set: data_set.name)
def test_the_documentation_has_a_section_with_the_same_facts(data_set):
    text = (DOCS / "datasets.md").read_text(encoding="utf-8")
    section = next(part for part in text.split("\n## ") if part.startswith(f"{data_set.name}\n"))
    for fact in (data_set.address, data_set.licence, data_set.owner, data_set.images):
        assert fact in " ".join(section.split())
    assert f"**{', '.join(data_set.papers)}**" in section


def test_prepare_says_whose_data_it_is_before_it_looks_at_them(tmp_path, capsys, monkeypatch):
    headct(tmp_path)

    def look(*arguments, **options):
        assert "licence  not verified" in capsys.readouterr().out
        raise ManifestError("looked")

    monkeypatch.setattr(catalog, "prepare", look)
    assert main(["data", "prepare", "HeadCT", "--source", str(tmp_path), "--out", str(tmp_path / "m")]) == 2


def test_from_the_command_line(tmp_path, capsys):
    rsna(tmp_path / "rsna")
    command = ["data", "prepare", "rsna", f"--source={tmp_path / 'rsna'}", f"--out={tmp_path / 'm.csv'}"]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out.strip() == describe(find_data_set("RSNA"))
    assert "holds 18 images of RSNA, the original 26684" in err
    assert not (tmp_path / "m.csv").exists()
    assert main([*command, "--allow_missing"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path / "m.csv")
    assert "rsna         test   anomalous       12" in out
    with (tmp_path / "m.csv").open(newline="") as stream:
        listed = list(csv.DictReader(stream))
    assert {row["path"].split("/")[0] for row in listed} == {"rsna"}  # the originals, where they were
    assert main(["data", "check", str(tmp_path / "m.csv")]) == 0
    assert "rsna  train  normal     4       0      4" in capsys.readouterr().out


def test_data_list(capsys):
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    for data_set in CATALOG:
        assert all(fact in out for fact in (data_set.name, data_set.what, data_set.licence, data_set.address))
    assert main(["data", "list", "aptos"]) == 0
    assert capsys.readouterr().out.strip() == describe(find_data_set("APTOS"))
    assert main(["data", "list", "nothing"]) == 2


@pytest.mark.realdata
def test_the_extract_of_zhanglab_is_read_as_the_folder_layouts_read_it(real_data):
    folder = real_data / "zhanglab"
    mine = prepare(find_data_set("ZhangLab"), folder, allow_missing=True).manifest
    theirs = load_manifest(folder)
    known = {s.path.resolve(): (s.split, s.label, s.patient_id) for s in theirs}
    assert {s.path.resolve(): (s.split, s.label, s.patient_id) for s in mine} == known


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "folder"), [("HeadCT", "headct"), ("BrainTumor", "brain_tumor"), ("LAG", "fundus")])
def test_extracts_in_another_layout_are_said_to_be_no_originals(name, folder, real_data):
    with pytest.raises(ManifestError, match=r"found manifest.csv, test, train\. It can be used as it is"):
        prepare(find_data_set(name), real_data / folder)
    assert len(load_manifest(real_data / folder)) > 0
