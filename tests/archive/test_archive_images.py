"""The list of images: what a source names, in chunks on disk."""

import zipfile

import pytest

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq

from anatomaly.archive import images
from anatomaly.archive.images import write_images
from anatomaly.archive.remote import fetch
from anatomaly.errors import ManifestError, NotReadyError, ReadError


def rows_of(listed):
    return [row for number in range(listed.chunks) for row in listed.read(number)]


def listed(source, tmp_path, **options):
    return write_images(str(source), tmp_path / "list", **{"task": "ct", "chunk": 3, **options})


def test_a_folder_is_listed_in_natural_order_without_opening_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("anatomaly.data.layouts.count_frames", lambda _: pytest.fail("was opened"))
    for name in ("10.dcm", "9.dcm", "a_mask.png", "note.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    told = []
    found = listed(tmp_path / "in", tmp_path, tell=told.append)
    assert [(row["path"], row["task"], row["whole"]) for row in rows_of(found)] == [
        (str(tmp_path / "in" / name), "ct", True) for name in ("9.dcm", "10.dcm")
    ]
    assert told == [f"{tmp_path}/in: 2 files left out: 1 a mask, 1 not an image"]


def test_chunks_hold_so_many_rows_and_the_digest_does_not_ask_how_they_came(tmp_path, monkeypatch):
    pq.write_table(pa.table({"path": [f"{n}.png" for n in range(10)]}), tmp_path / "table.parquet")
    found = listed(tmp_path / "table.parquet", tmp_path)
    assert (found.rows, found.chunks) == (10, 4)
    assert [len(found.read(number)) for number in range(4)] == [3, 3, 3, 1]
    rows = rows_of(found)
    monkeypatch.setattr(images, "_PIECE", 4)
    monkeypatch.setattr(images, "_CHUNKS_PER_FILE", 2)
    again = listed(tmp_path / "table.parquet", tmp_path / "again")
    assert rows_of(again) == rows
    assert len(list(again.folder.iterdir())) == 2
    assert again.digest == found.digest
    assert listed(tmp_path / "table.parquet", tmp_path / "other", task="mr").digest != found.digest


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_column_that_is_misspelt_is_told(kind, tmp_path, caplog):
    pq.write_table(pa.table({"path": ["a"], "lable": ["1"]}), tmp_path / "table.parquet")
    (tmp_path / "table.csv").write_text("path,lable\na,1\nb,0\n")
    listed(tmp_path / f"table.{kind}", tmp_path)
    assert caplog.text.count("column lable is not read. Is it meant to be label?") == 1


def test_a_parquet_table_says_what_a_csv_table_says(tmp_path):
    columns = {
        "Path": ["a.png", "/b.nii", "s3://c/d.dcm"],
        "frame": [None, 3.0, None],
        "task": ["mr", "", None],
        "label": ["normal", "1", None],
        "patient_id": ["007", None, ""],
        "more": [1, 2, 3],
    }
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    lines = ["path;frame;task;label;patient_id;more", "a.png;;mr;normal;007;1", "/b.nii;3;;1;;2", "s3://c/d.dcm;;;;;3"]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    expected = [
        {"path": f"{tmp_path}/a.png", "frame": None, "task": "mr", "label": 0, "patient_id": "007", "whole": False},
        {"path": "/b.nii", "frame": 3, "task": "ct", "label": 1, "patient_id": None, "whole": False},
        {"path": "s3://c/d.dcm", "frame": None, "task": "ct", "label": None, "patient_id": None, "whole": False},
    ]
    assert rows_of(listed(tmp_path / "table.parquet", tmp_path)) == expected
    assert rows_of(listed(tmp_path / "table.csv", tmp_path / "csv")) == expected


def test_a_data_set_keeps_its_labels(phantom, tmp_path):
    rows = phantom.select(task="head_ct").samples
    found = rows_of(listed(rows[0].path.parents[2], tmp_path))
    assert {(row["path"], row["label"]) for row in found} == {(str(row.path), row.label) for row in rows}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"file": ["a"]}, "has no column path, got file"),
        ({"path": ["a", ""]}, "a path is empty"),
        ({"path": ["a"], "frame": [0.5]}, "a frame is no whole number"),
        ({"path": ["a"], "label": ["maybe?"]}, "label 'maybe"),
        ({"path": pa.array([], pa.string())}, "holds no images"),
    ],
)
def test_a_table_that_says_nothing_is_refused_in_a_line(columns, told, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    with pytest.raises(ManifestError, match=told) as caught:
        listed(tmp_path / "table.parquet", tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_table_or_not_there(tmp_path):
    (tmp_path / "bad.parquet").write_text("xx")
    for name, told in (
        ("bad.parquet", "cannot be read as a table"),
        ("none.parquet", "no such file"),
        ("no", "no such"),
    ):
        with pytest.raises(ManifestError, match=told):
            listed(tmp_path / name, tmp_path)


def test_files_in_an_archive_elsewhere(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as stream:
        for name in ("b/2.dcm", "b/10.dcm", "readme.txt"):
            stream.writestr(name, name)
    told = []
    found = rows_of(listed(f"zip://::file://{tmp_path}/all.zip", tmp_path, tell=told.append))
    assert [row["path"] for row in found] == [f"zip://b/{n}.dcm::file://{tmp_path}/all.zip" for n in (2, 10)]
    assert told == [f"zip://::file://{tmp_path}/all.zip: 1 files left out: not named as an image."]
    copy = fetch(found[0]["path"], tmp_path, 7)
    assert (copy.name, copy.read_text()) == ("7_2.dcm", "b/2.dcm")
    with pytest.raises(ReadError, match="cannot be fetched"):
        fetch(f"zip://no.dcm::file://{tmp_path}/all.zip", tmp_path, 8)


def test_addresses_nobody_knows(tmp_path):
    with pytest.raises(ManifestError, match="Protocol not known: foo"):
        listed("foo://bar", tmp_path)


def test_a_file_system_that_is_not_installed(tmp_path, monkeypatch):
    import fsspec

    def missing(_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(NotReadyError, match=r"s3://bucket: Install s3fs to access S3\.$"):
        listed("s3://bucket", tmp_path)


def test_a_list_that_is_not_seen_says_so(tmp_path):
    found = images.ImageList(tmp_path / "nowhere", 5, 3, "")
    with pytest.raises(ManifestError, match="must be a folder that all of them see"):
        found.read(0)
