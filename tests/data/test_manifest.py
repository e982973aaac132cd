from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from anatomaly.data.manifest import Manifest, load_manifest, write_csv
from anatomaly.errors import ManifestError, OutputError
from anatomaly.types import Sample


@pytest.fixture
def folder(tmp_path):
    """A folder named `brain` with five files a.png ... e.png of different content (nothing here decodes them)."""
    brain = tmp_path / "brain"
    brain.mkdir()
    for name in "abcde":
        (brain / f"{name}.png").write_bytes(name.encode())
    return brain


def write(folder, text, name="cases.csv", encoding="utf-8"):
    path = folder / name
    path.write_text(text, encoding=encoding)
    return path


def test_csv_reads_every_column(folder):
    digest = "AB" * 32
    path = write(
        folder,
        "Path,label,mask,task,split,patient_id,frame,sha256,comment\n"
        f"a.png,normal,,liver,train,p1,,{digest},x\n"
        "b.png,Ungood,c.png,,validation,,3,,\n"
        "d.png,,,,,,,,\n",
    )
    assert load_manifest(path).samples == (
        Sample(folder / "a.png", "liver", "train", 0, patient_id="p1", sha256=digest.lower()),
        Sample(folder / "b.png", "brain", "val", 1, frame=3, mask=folder / "c.png"),
        Sample(folder / "d.png", "brain", "test", None),
    )


def test_csv_accepts_byte_order_mark_semicolons_and_mask_path(folder):
    path = write(folder, "path;label;mask_path\r\na.png;glioma;b.png\r\n\r\nc.png;0;\r\n", encoding="utf-8-sig")
    samples = load_manifest(path, task="head").samples
    assert [(s.path.name, s.label, s.mask, s.task) for s in samples] == [
        ("a.png", 1, folder / "b.png", "head"),
        ("c.png", 0, None, "head"),
    ]


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("path,lable", ["column lable is not read. Is it meant to be label?"]),
        ("path,Labels", ["column labels is not read. Is it meant to be label?"]),
        ("path,patient id", ["column patient id is not read. Is it meant to be patient_id?"]),
        ("path,label,labels", []),
        ("path,mask_path,masks", []),
        ("path,source,age,diagnosis,name", []),
    ],
)
def test_a_column_that_is_nearly_one_of_ours_is_told(folder, header, told, caplog):
    line = ",".join(["a.png", *[""] * header.count(",")])
    (folder / "t.csv").write_text(f"{header}\n{line}\n")
    (folder / "a.png").write_bytes(b"x")
    load_manifest(folder / "t.csv")
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == told


def test_csv_reads_what_pandas_writes_for_columns_with_gaps(folder):
    path = write(folder, "path,label,frame\na.png,1.0,2.0\nb.png,0.0,\nc.png,,0.0\n")
    assert [(s.label, s.frame) for s in load_manifest(path)] == [(1, 2), (0, None), (None, 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column path, got an empty file"),
        ("file,label\na.png,0\n", "has no column path, got file, label"),
        ("path\n", "has no rows"),
        ("path,split\na.png,train\nb.png,holdout\n", "row 3: unknown split 'holdout'"),
        ("path,label\na.png,2\n", "row 2: label '2' could mean"),
        ("path,frame\na.png,-1\n", "row 2: frame is '-1'"),
        ("path,frame\na.png,1.5\n", "row 2: frame is '1.5'"),
        ("path,sha256\na.png,abc\n", "row 2: sha256 is not 64"),
        ("path,label\n,0\n", "row 2: path is empty"),
        ("path,label\na, b.png,0\n", "row 2: has more or fewer cells"),
        ("path,label\na.png\n", "row 2: has more or fewer cells"),
        ("path\na.png\nx.png\ny.png\n", "2 of 3 files do not exist, the first is .*x.png"),
        ("path,mask\na.png,m.png\n", "1 of 2 files do not exist, the first is .*m.png"),
        ("path\na.png\nb.png\n../brain/a.png\n", "a.png is listed twice"),
        ("path,frame\na.png,1\na.png,1\n", "a.png#1 is listed twice"),
        ("path,split,label\na.png,train,0\nb.png,train,1\n", "1 training images are anomalous, the first is b.png"),
    ],
)
def test_csv_faults_name_the_place(folder, text, message):
    with pytest.raises(ManifestError, match=message):
        load_manifest(write(folder, text))


def test_csv_in_the_code_page_of_windows_is_read(folder):
    path = write(folder, "path,patient_id\na.png,Müller\n", encoding="latin-1")
    assert load_manifest(path).samples[0].patient_id == "Müller"


@pytest.mark.parametrize(("name", "message"), [("gone", "no such file"), ("a.png", "got a .png file, expected")])
def test_a_source_that_is_no_data_set_is_refused(folder, name, message):
    with pytest.raises(ManifestError, match=message):
        load_manifest(folder / name)


def test_manifest_csv_in_a_folder_comes_before_its_images(folder):
    write(folder, "path,label\nc.png,0\n", name="manifest.csv")
    assert [(s.path.name, s.label) for s in load_manifest(folder)] == [("c.png", 0)]


def test_written_csv_reads_back_equal_and_moves_with_its_folder(folder, tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"o")
    rows = (
        Sample(folder / "a.png", "liver", "train", 0, patient_id="p;1, é", sha256="0" * 64),
        Sample(folder / "b.png", "brain", "val", 1, frame=3, mask=folder / "c.png"),
        Sample(outside, "brain", "test"),
    )
    write_csv(Manifest(rows, folder), folder / "table.csv")
    assert load_manifest(folder / "table.csv").samples == rows
    moved = folder.rename(tmp_path / "moved")
    assert load_manifest(moved / "table.csv").samples[0].path == moved / "a.png"


def test_csv_that_cannot_be_written_is_an_output_error(folder):
    with pytest.raises(OutputError, match="cannot be written"):
        write_csv(Manifest((), folder), folder / "missing" / "table.csv")


def test_select_combines_conditions_and_keeps_the_order():
    rows = tuple(
        Sample(Path(f"{task}{split}{label}"), task, split, label)
        for task in ("b", "a", "c")
        for split in ("train", "test")
        for label in (0, 1, None)
        if (split, label) != ("train", 1)
    )
    manifest = Manifest(rows, Path("source"))
    assert manifest.tasks == ("a", "b", "c")
    assert list(manifest.select()) == list(rows)
    assert [s.path.name for s in manifest.select(task=("a", "b"), split="test", label=0)] == ["btest0", "atest0"]
    assert [s.path.name for s in manifest.select(task="c", label=1)] == ["ctest1"]
    assert len(manifest.select(split="val")) == 0
    with pytest.raises(ManifestError, match="no task 'd', the tasks are a, b, c"):
        manifest.select(task=["a", "d"])


def test_hashes_are_those_of_the_files_and_given_ones_stay(folder):
    rows = (Sample(folder / "a.png", "brain"), Sample(folder / "b.png", "brain", sha256="0" * 64))
    hashed = Manifest(rows, folder).with_hashes()
    assert [s.sha256 for s in hashed] == [sha256(b"a").hexdigest(), "0" * 64]
    with pytest.raises(ManifestError, match=r"gone\.png: cannot be read"):
        Manifest((Sample(folder / "gone.png", "brain"),), folder).with_hashes()


def test_fingerprint_ignores_place_name_and_order_of_the_files(folder, tmp_path):
    path = write(folder, "path,label\na.png,0\nb.png,1\n")
    before = load_manifest(path, task="brain").fingerprint()
    moved = folder.rename(tmp_path / "elsewhere")
    (moved / "a.png").rename(moved / "z.png")
    write(moved, "path,label\nb.png,1\nz.png,0\n")
    assert load_manifest(moved / "cases.csv", task="brain").fingerprint() == before


@pytest.mark.parametrize(
    "change",
    [
        {"task": "x"},
        {"split": "val"},
        {"label": 1},
        {"label": None},
        {"frame": 0},
        {"patient_id": "p"},
        {"sha256": "1"},
    ],
)
def test_fingerprint_changes_with_everything_else(change):
    row = Sample(Path("a.png"), "brain", "test", 0, sha256="0")
    assert Manifest((replace(row, **change),), Path()).fingerprint() != Manifest((row,), Path()).fingerprint()
