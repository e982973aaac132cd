import os
import unicodedata

import pytest

from anatomaly.data.manifest import load_manifest, write_csv
from anatomaly.data.spreadsheet import locate, read_rows
from anatomaly.errors import ManifestError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "i").mkdir()
    for name in ("i/0.png", "i/1.png", "Müller.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def table(folder, content, name="t.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(manifest, folder):
    return [(sample.path.relative_to(folder).as_posix(), sample.label) for sample in manifest]


PLAIN = "path;label\ni/0.png;0\ni/1.png;1\n"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (PLAIN, "t.csv"),
        ("sep=;\n" + PLAIN, "t.csv"),
        ('"sep=;"\r\n' + PLAIN.replace("\n", "\r\n"), "t.csv"),
        ("SEP=;;;\n" + PLAIN, "t.csv"),
        ("sep=|\n" + PLAIN.replace(";", "|"), "t.csv"),
        ("\n;;\n" + PLAIN + ";\n;;;\n \n", "t.csv"),
        (PLAIN.replace("\n", ";;\n"), "t.csv"),
        (PLAIN.replace("path;label", "path;label;").replace("0\n", "0;\n").replace("1\n", "1;;\n"), "t.csv"),
        (PLAIN.replace(";", "\t"), "t.tsv"),
        (PLAIN.replace(";", "\t"), "t.txt"),
        (PLAIN.replace(";", "\t"), "t.csv"),
        (PLAIN.replace("i/", "i\\"), "t.csv"),
        (PLAIN.replace("i/", ".\\i\\"), "t.csv"),
        (PLAIN.replace("path;label", '"path";"label"').replace("i/0.png", '"i/0.png"'), "t.csv"),
        ('"label, 0 or 1,";path;label\n;i/0.png;0,0\n;i/1.png;1,0\n', "t.csv"),
        (PLAIN.encode("utf-8-sig"), "t.csv"),
        (PLAIN.replace(";", "\t").encode("utf-16"), "t.txt"),
        (b"\xfe\xff" + PLAIN.encode("utf-16-be"), "t.csv"),
        (PLAIN.encode("utf-16-le"), "t.csv"),
        (PLAIN.replace("\n", "\r"), "t.csv"),
    ],
)
def test_a_table_reads_the_same_however_it_was_saved(folder, content, name):
    manifest = load_manifest(table(folder, content, name))
    assert rows(manifest, folder) == [("i/0.png", 0), ("i/1.png", 1)]


def test_lines_are_counted_as_an_editor_counts_them(folder):
    path = table(folder, "sep=;\n\npath;label\ni/0.png;0\n;\ni/1.png;benign\n")
    assert [row.number for row in read_rows(path)] == [4, 6]
    with pytest.raises(ManifestError, match=r"row 6: label 'benign' could mean"):
        load_manifest(path)


def test_all_unclear_words_of_a_table_are_listed_in_one_line(folder):
    path = table(folder, "path,label\ni/0.png,benign\ni/1.png,Unknown\nMüller.png,benign\n")
    with pytest.raises(ManifestError) as caught:
        load_manifest(path)
    assert "labels 'benign' (row 2), 'Unknown' (row 3) could mean normal or anomalous. Write 0" in str(caught.value)


def test_words_of_public_tables_mean_normal(folder):
    (folder / "2.png").write_bytes(b"2")
    path = table(folder, "path,label\ni/0.png,No Finding\ni/1.png,no_tumor\n2.png,Cardiomegaly\nMüller.png,NORMALS\n")
    assert [label for _, label in rows(load_manifest(path), folder)] == [0, 0, 1, 0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"])
def test_names_with_umlauts_are_found_in_every_encoding(folder, encoding):
    path = table(folder, "path,label,patient_id\nMüller.png,0,François à\n".encode(encoding))
    (sample,) = load_manifest(path)
    assert (sample.path, sample.patient_id) == (folder / "Müller.png", "François à")


def test_names_in_the_other_unicode_form_are_found(folder):
    (folder / unicodedata.normalize("NFD", "Å.png")).write_bytes(b"x")
    assert locate(folder, unicodedata.normalize("NFC", "Å.png")).is_file()
    assert locate(folder, "gone\\x.png") == folder / "gone\\x.png"


def test_a_file_whose_name_holds_a_back_slash_comes_first(folder):
    (folder / "i\\0.png").write_bytes(b"x")
    assert locate(folder, "i\\0.png").name == "i\\0.png"


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_name_that_is_not_utf_8_is_written_and_read_back(folder, tmp_path):
    (folder / "new").mkdir()
    for raw in (b"M\xfcller.png", "Müller, J.png".encode(), b"\xff\xfe.png"):
        (folder / "new" / os.fsdecode(raw)).write_bytes(raw)
    manifest = load_manifest(folder / "new", task="é")
    write_csv(manifest, folder / "out.csv")
    assert b"new/M\xfcller.png" in (folder / "out.csv").read_bytes()
    assert load_manifest(folder / "out.csv").samples == manifest.samples


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_windows_table_finds_names_that_are_windows_bytes(folder):
    (folder / os.fsdecode(b"Gr\xf6\xdfe.png")).write_bytes(b"x")
    assert load_manifest(table(folder, "path\nGröße.png\n".encode("cp1252"))).samples[0].path.is_file()
    assert load_manifest(table(folder, "path\nGröße.png\n")).samples[0].path.is_file()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"PK\3\4\0\0binary\xd8\0", "t.csv", "is no text table. Save it as CSV in UTF-8"),
        ("sep=;\n", "t.csv", "has no column path, got an empty file"),
        ("path;label\ni/0.png;0;1\n", "t.csv", "row 2: has more or fewer cells"),
        ('path,label\n"' + "x" * 200_000 + '",0\n', "t.csv", "row 2: cannot be read as a table"),
        ("x", "t.xlsx", "got a .xlsx file.*Save the table as CSV"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(folder, content, name, message):
    with pytest.raises(ManifestError, match=message):
        load_manifest(table(folder, content, name))
