import os
import random
import re

import numpy as np
import PIL.Image
import pytest

from anatomaly.data.listing import describe, list_files, sort_naturally, subfolders
from anatomaly.data.manifest import load_manifest
from anatomaly.errors import ManifestError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
        else:
            path.write_bytes(b"text" if path.suffix else b"")


def names(listing, folder):
    return [path.relative_to(folder).as_posix() for path in listing.images]


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    make(tmp_path, "10.png", "2.png", "a/1.jpg", "a/notes.txt", "b.xml", "empty", ".hidden.png", "2_mask.png")
    make(tmp_path, "masks/2.png", ".git/x.png", "Thumbs.db", "DICOMDIR")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    listing = list_files(tmp_path)
    assert names(listing, tmp_path) == ["2.png", "10.png", "a/1.jpg"]
    assert listing.left_out == {
        ("file", "not an image"): 2,
        ("file", "hidden"): 2,
        ("file", "empty"): 1,
        ("file", "a mask"): 1,
        ("file", "an index (DICOMDIR)"): 1,
        ("file", "a broken link"): 1,
        ("file", "a device or pipe"): 1,
        ("folder", "of masks"): 1,
        ("folder", "hidden"): 1,
    }


def test_the_line_names_the_most_frequent_reason_first():
    counts = {
        ("file", "hidden"): 1,
        ("file", "not an image"): 2,
        ("folder", "cannot be opened"): 1,
        ("file", "empty"): 0,
    }
    assert describe(counts) == "3 files left out: 2 not an image, 1 hidden; 1 folder left out: 1 cannot be opened"
    assert describe({}) == ""


def test_folders_behind_links_are_entered_once_and_circles_are_refused(tmp_path):
    make(tmp_path, "store/p0/a.png", "store/p1/a.png", "in/x.png", "in/real/b.png")
    for number in (0, 1):
        (tmp_path / f"in/p{number}").symlink_to(tmp_path / f"store/p{number}")
    (tmp_path / "in/again").symlink_to(tmp_path / "in/real")
    (tmp_path / "in/p0_again").symlink_to(tmp_path / "store/p0")
    (tmp_path / "in/real/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/above").symlink_to(tmp_path)
    (tmp_path / "in/self").symlink_to(tmp_path / "in/self")
    listing = list_files(tmp_path / "in")
    assert names(listing, tmp_path / "in") == ["p0/a.png", "p1/a.png", "real/b.png", "x.png"]
    assert listing.left_out == {
        ("folder", "a link in a circle"): 2,
        ("folder", "read already under another name"): 2,
        ("file", "a broken link"): 1,
    }


def test_a_link_between_two_folders_that_point_at_each_other_ends(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to_a").symlink_to(tmp_path / "a")
    assert names(list_files(tmp_path / "a"), tmp_path / "a") == ["1.png", "to_b/2.png"]


def test_whatever_the_reader_recognises_is_listed_whatever_its_suffix(tmp_path, monkeypatch):
    make(tmp_path, "a.bmp", "b.webp", "c.xyz", "c_mask.bmp")
    monkeypatch.setattr("anatomaly.data.listing.sniff_format", lambda path: None if path.suffix == ".xyz" else "bmp")
    listing = list_files(tmp_path)
    assert names(listing, tmp_path) == ["a.bmp", "b.webp"]
    assert listing.left_out == {("file", "not an image"): 1, ("file", "a mask"): 1}


def test_a_known_suffix_is_listed_unopened(tmp_path, monkeypatch):
    make(tmp_path, "a.png")
    (tmp_path / "b.TIFF").write_bytes(b"broken")
    monkeypatch.setattr("anatomaly.data.listing.sniff_format", lambda path: pytest.fail(f"{path} was opened"))
    assert names(list_files(tmp_path), tmp_path) == ["a.png", "b.TIFF"]


def test_a_locked_folder_or_file_is_left_out_and_ends_nothing(tmp_path, monkeypatch):
    make(tmp_path, "p0/a.png", "p1/a.png", "locked")
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("p1"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the suite may run as root, who is let in everywhere
    monkeypatch.setattr(
        "anatomaly.data.listing.sniff_format", lambda path: (_ for _ in ()).throw(PermissionError(13, "locked"))
    )
    manifest = load_manifest(tmp_path)
    assert [sample.path.parent.name for sample in manifest] == ["p0"]
    assert manifest.left_out == {("file", "cannot be opened"): 1, ("folder", "cannot be opened"): 1}
    with pytest.raises(ManifestError, match=r"p1: cannot be opened \(Permission denied\)"):
        load_manifest(tmp_path / "p1")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root is let in everywhere")
def test_a_folder_without_permission_is_left_out(tmp_path):
    make(tmp_path, "p0/a.png", "p1/a.png")
    (tmp_path / "p1").chmod(0)
    try:
        assert load_manifest(tmp_path).left_out == {("folder", "cannot be opened"): 1}
    finally:
        (tmp_path / "p1").chmod(0o755)


def test_natural_order_is_by_value_and_stable():
    def by_parts(path):  # digits at odd places
        return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+)", path))], path

    drawn = random.Random(0)
    paths = ["".join(drawn.choices("ab./_019", k=drawn.randint(1, 9))) for _ in range(2000)]
    assert sort_naturally(paths) == sorted(paths, key=by_parts)
    assert sort_naturally(["10.png", "2.png", "02.png"]) == ["02.png", "2.png", "10.png"]


def test_subfolders_are_the_visible_ones_also_behind_links(tmp_path):
    make(tmp_path, "f10/a.png", "f2/a.png", ".git/a", "__MACOSX/a", "file.png")
    (tmp_path / "link").symlink_to(tmp_path / "f2")
    assert [folder.name for folder in subfolders(tmp_path)] == ["f2", "f10", "link"]
    assert subfolders(tmp_path / "nowhere") == []
