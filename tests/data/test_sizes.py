"""What a file declares is held against the memory there is before anything is decoded."""

import gzip
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from anatomaly.cli import main
from anatomaly.data import decoding
from anatomaly.data.decoding import decoded_limit, limit_decoded
from anatomaly.data.readers import count_frames, read_image
from anatomaly.errors import ConfigError, ReadError

nibabel = pytest.importorskip("nibabel")


@pytest.fixture(autouse=True)
def usual_limit():
    yield
    limit_decoded(decoding.MAX_DECODED_GIB)


def png_that_declares(path, height, width, colour=0):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )
    return path


def test_a_png_larger_than_the_limit_is_refused_in_one_line(tmp_path):
    path = png_that_declares(tmp_path / "a.png", 16384, 16384)
    with pytest.raises(ReadError) as excinfo:
        read_image(path)
    assert str(excinfo.value) == (
        f"{path}: is 16384x16384 pixels (height x width), which takes 2 GiB decoded, expected at most 1. "
        "Tile or downsample it first, or raise --max_decoded_gib if the machine has the memory."
    )
    limit_decoded(2)
    with pytest.raises(ReadError, match="truncated"):
        read_image(path)


def test_colour_counts_threefold(tmp_path):
    with pytest.raises(ReadError, match=r"is 8192x8192 pixels \(height x width\) of 3 channels, which takes 1.5 GiB"):
        read_image(png_that_declares(tmp_path / "a.png", 8192, 8192, colour=2))
    with pytest.raises(ReadError, match="truncated"):
        read_image(png_that_declares(tmp_path / "b.png", 8192, 8192))


def test_the_limit_counts_for_the_workers_of_later_calls(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    read_image(path)
    limit_decoded(64 * 64 * 8 / 2**30)
    read_image(path)
    limit_decoded((64 * 64 * 8 - 1) / 2**30)
    with pytest.raises(ReadError, match=r"takes 3\.05e-05 GiB decoded"):
        read_image(path)


@pytest.mark.parametrize("gib", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(gib):
    with pytest.raises(ConfigError, match="max_decoded_gib: got"):
        limit_decoded(gib)
    assert decoded_limit() == decoding.MAX_DECODED_GIB


def test_the_limit_is_an_option(tmp_path, capsys):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "a.png")
    assert main(["data", "check", str(tmp_path)]) == 0
    assert main(["data", "check", str(tmp_path), "--max_decoded_gib", "1e-5"]) == 1
    assert "is 64x64 pixels (height x width), which takes 3.05e-05 GiB decoded" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path), "--max_decoded_gib", "0"]) == 2
    assert "max_decoded_gib: got 0, expected more than 0" in capsys.readouterr().err


def test_a_tile_larger_than_its_tiff_page(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for tag in ("TileWidth", "TileLength"):
            tiff.pages[0].tags[tag].overwrite(32000)
    with pytest.raises(ReadError, match="is 32000x32000 pixels"):
        read_image(path)


def test_the_pages_of_a_tiff_are_listed_once(tmp_path, monkeypatch, decoding_here):
    path = tmp_path / "a.tif"
    stack = np.random.default_rng(0).integers(0, 255, (50, 16, 12)).astype(np.uint8)
    tifffile.imwrite(path, stack, photometric="minisblack", metadata=None)
    opened, real = [], tifffile.TiffFile
    monkeypatch.setattr(tifffile, "TiffFile", lambda *args, **options: opened.append(args) or real(*args, **options))
    assert count_frames(path) == 50
    for index in (49, 0, 17):
        np.testing.assert_array_equal(read_image(path, frame=index).pixels[0], stack[index])
    assert len(opened) == 1


def nifti(shape, path, *, declared=None):
    """A volume of int16, whose header may declare another shape."""
    voxels = np.random.default_rng(0).integers(-99, 99, shape).astype(np.int16)
    content = bytearray(nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes())
    if declared is not None:
        struct.pack_into("<3h", content, 42, *declared)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return voxels


def test_a_packed_volume_larger_than_the_limit_is_refused(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):  # the first stays unpacked
        nifti((40, 30, 20), tmp_path / name)
    limit_decoded(40 * 30 * 20 * 2 / 2**30)
    assert read_image(tmp_path / "a.nii.gz", frame=3).size == (30, 40)
    limit_decoded((40 * 30 * 20 * 2 - 1) / 2**30)
    for read in (count_frames, lambda path: read_image(path, frame=3)):
        with pytest.raises(
            ReadError, match=r"is a packed volume of 40x30x20 voxels, which takes .* Unpack it \(gunzip\)"
        ):
            read(tmp_path / "b.nii.gz")


def test_an_unpacked_volume_larger_than_the_limit_is_read_slice_by_slice(tmp_path):
    voxels = nifti((40, 30, 20), tmp_path / "a.nii")
    limit_decoded(40 * 30 * 8 / 2**30)
    for index in (0, 19):
        shown = read_image(tmp_path / "a.nii", frame=index).pixels[0]
        np.testing.assert_array_equal(shown, voxels[:, ::-1, index].T)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_volume_whose_file_cannot_hold_what_it_declares(tmp_path, name):
    nifti((40, 30, 20), tmp_path / name, declared=(30000, 30000, 30000))
    for read in (count_frames, lambda path: read_image(path, frame=0)):
        with pytest.raises(ReadError, match="ends before its voxels do"):
            read(tmp_path / name)
