"""Every file is written here by Pillow, tifffile, pydicom or nibabel and read back against the array that went in."""

import hashlib
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow
from PIL import ImageOps

from anatomaly.data import readers
from anatomaly.data.layouts import samples_of
from anatomaly.data.readers import count_frames, read_image, read_mask, sniff_format
from anatomaly.errors import NotReadyError, ReadError

RNG = np.random.default_rng(7)
GREY8 = RNG.integers(0, 256, (20, 31), dtype=np.uint8)
RGB8 = RNG.integers(0, 256, (20, 31, 3), dtype=np.uint8)
DEEP = np.linspace(0, 65535, 20 * 31).astype(np.uint16).reshape(20, 31)


def save(path, pixels, **options):
    Pillow.fromarray(pixels).save(path, **options)
    return path


def write_deep_png(path, pixels, *, size=None):
    """A 16-bit PNG of (H, W, C); Pillow cannot write colour ones.  `size` lies about (width, height)."""
    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *(size or (width, height)), 16, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def one_line(excinfo, path):
    """The message, after checking the form all messages share."""
    message = str(excinfo.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert message.count(str(path)) == 1
    return message


# PNG and JPEG


def test_8_bit_grey_png(tmp_path):
    path = save(tmp_path / "a.png", GREY8)
    image = read_image(path)
    assert image.pixels.dtype == np.float32
    np.testing.assert_array_equal(image.pixels, GREY8[None])
    assert image.value_range == (0, 255)
    assert (image.frame, image.invert, image.spacing, image.path) == (None, False, None, path)
    assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert image.size == (20, 31)


def test_the_suffix_does_not_matter(tmp_path):
    path = save(tmp_path / "a.dcm", RGB8, format="PNG")
    assert sniff_format(path) == "png"
    np.testing.assert_array_equal(read_image(path).pixels, RGB8.transpose(2, 0, 1))


def test_16_bit_grey_png_is_not_clipped(tmp_path):
    image = read_image(save(tmp_path / "a.png", DEEP))
    np.testing.assert_array_equal(image.pixels[0], DEEP)
    assert image.value_range == (0, 65535)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_png_with_colour_or_alpha_keeps_all_bits(tmp_path, channels):
    pixels = np.stack([DEEP, DEEP[::-1], DEEP // 3, DEEP[:, ::-1]], -1)[..., :channels]
    image = read_image(write_deep_png(tmp_path / "a.png", pixels))
    kept = {2: 1, 3: 3, 4: 3}[channels]
    np.testing.assert_array_equal(image.pixels, pixels.transpose(2, 0, 1)[:kept])
    assert image.value_range == (0, 65535)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA"])
def test_other_png_modes(tmp_path, mode):
    picture = Pillow.fromarray(RGB8).convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Pillow.fromarray(GREY8))
    picture.save(tmp_path / "a.png")
    expected = {"1": "L", "P": "RGB", "LA": "L", "RGBA": "RGB"}[mode]
    wanted = np.atleast_3d(np.asarray(picture.convert(expected))).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, wanted)
    if mode == "1":
        assert set(np.unique(wanted)) == {0, 255}


def test_jpeg_grey_colour_and_cmyk(tmp_path):
    grey = read_image(save(tmp_path / "g.jpg", GREY8))
    assert grey.pixels.shape == (1, 20, 31)
    smooth = np.broadcast_to(np.array([200, 90, 40], np.uint8), (24, 24, 3))
    for mode in ("RGB", "CMYK"):
        Pillow.fromarray(smooth).convert(mode).save(tmp_path / "c.jpg", quality=100)
        image = read_image(tmp_path / "c.jpg")
        assert image.value_range == (0, 255)
        np.testing.assert_allclose(image.pixels.mean((1, 2)), [200, 90, 40], atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_orientation_is_applied_as_pillow_shows_it(tmp_path, suffix, orientation):
    exif = Pillow.Exif()
    exif[274] = orientation
    path = save(tmp_path / ("a.jpg" if suffix == "jpg" else "a.png"), GREY8, exif=exif)
    with Pillow.open(path) as picture:
        shown = np.asarray(ImageOps.exif_transpose(picture))
    if suffix == "tif":  # compared with the PNG: Pillow 13 garbles turned TIFFs
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, GREY8, extratags=[(274, 3, 1, orientation, True)])
    np.testing.assert_array_equal(read_image(path).pixels[0], shown)


@pytest.mark.parametrize("orientation", [0, 9, 255])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_an_undefined_orientation_is_as_stored(tmp_path, suffix, orientation):
    exif = Pillow.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, GREY8, extratags=[(274, 3, 1, orientation, True)])
    else:
        Pillow.fromarray(GREY8).save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {"lossless": True}))
    shown = read_image(path).pixels[0]
    assert shown.shape == GREY8.shape
    np.testing.assert_allclose(shown, GREY8, atol=4 if suffix == "jpg" else 0)


def test_a_damaged_exif_block_does_not_cost_the_image(tmp_path):
    path = save(tmp_path / "a.png", GREY8, exif=b"Exif\0\0XX*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(read_image(path).pixels[0], GREY8)


# BMP, GIF, WebP and JPEG 2000


@pytest.mark.parametrize("suffix", ["bmp", "gif", "webp", "jp2", "j2k"])
def test_other_formats_of_8_bits(tmp_path, suffix):
    lossless = {"webp": {"lossless": True}}.get(suffix, {})
    path = save(tmp_path / f"a.{suffix}", RGB8 if suffix != "gif" else GREY8, **lossless).rename(tmp_path / "image")
    assert sniff_format(path) == {"jp2": "jpeg2000", "j2k": "jpeg2000"}.get(suffix, suffix)
    image = read_image(path)
    np.testing.assert_array_equal(
        image.pixels, GREY8[None].repeat(3, 0) if suffix == "gif" else RGB8.transpose(2, 0, 1)
    )
    assert (image.value_range, image.frame, count_frames(path)) == ((0, 255), None, 1)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ReadError) as excinfo:
        read_image(path)
    one_line(excinfo, path)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_frames_of_an_animation(tmp_path, suffix):
    pictures = [Pillow.fromarray(GREY8 // n) for n in (1, 2, 3)]
    pictures[0].save(tmp_path / "a", suffix, save_all=True, append_images=pictures[1:], lossless=True)
    assert count_frames(tmp_path / "a") == 3
    np.testing.assert_array_equal(read_image(tmp_path / "a", frame=2).pixels[0], GREY8 // 3)
    with pytest.raises(ReadError, match="holds 3 images, expected one"):
        read_image(tmp_path / "a")


@pytest.mark.parametrize("container", ["jp2", "j2k"])
@pytest.mark.parametrize(("bits", "channels"), [(12, 1), (16, 1), (16, 3)])
def test_deep_jpeg_2000_keeps_its_bits_and_their_range(tmp_path, container, bits, channels):
    imagecodecs = pytest.importorskip("imagecodecs")
    pixels = RNG.integers(0, 2**bits, (20, 31, channels)).astype(np.uint16)
    stored = pixels if channels > 1 else pixels[..., 0]
    encoded = imagecodecs.jpeg2k_encode(
        stored, level=0, reversible=True, bitspersample=bits, codecformat=container, mct=False
    )
    (tmp_path / "a").write_bytes(encoded)
    image = read_image(tmp_path / "a")
    np.testing.assert_array_equal(image.pixels, pixels.transpose(2, 0, 1))
    assert image.value_range == (0, 2**bits - 1)
    (tmp_path / "a").write_bytes(encoded[: len(encoded) // 2])
    with pytest.raises(ReadError):
        read_image(tmp_path / "a")


def test_a_text_that_begins_with_bm_is_no_bmp(tmp_path):
    (tmp_path / "a").write_text("BMI of all patients, by year and ward\n" * 9)
    assert sniff_format(tmp_path / "a") is None


def test_a_plain_picture_has_frame_0_only(tmp_path):
    path = save(tmp_path / "a.png", GREY8)
    assert count_frames(path) == 1
    assert read_image(path, frame=0).frame is None
    with pytest.raises(ReadError, match=r"has no frame 1: it holds 1 image"):
        read_image(path, frame=1)


def test_animated_png_is_several_images(tmp_path):
    pictures = [Pillow.fromarray(GREY8 // n) for n in (1, 2, 3)]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:])
    assert count_frames(tmp_path / "a.png") == 3
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", frame=2).pixels[0], GREY8 // 3)


# TIFF


@pytest.mark.parametrize(
    ("pixels", "value_range"),
    [
        (GREY8, (0, 255)),
        (DEEP, (0, 65535)),
        (DEEP.astype(np.int32).astype(np.int16), (-32768, 32767)),
        (DEEP.astype(np.float32) / 7 - 100, None),
        (DEEP.astype(np.uint32), None),
        (RGB8, (0, 255)),
        (np.stack([DEEP, DEEP[::-1], DEEP], -1), (0, 65535)),
    ],
)
def test_tiff(tmp_path, pixels, value_range):
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.pixels, np.atleast_3d(pixels).transpose(2, 0, 1).astype(np.float32))
    assert image.value_range == value_range
    assert not image.invert


def test_tiff_variants(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB8.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", compression="zlib")
    np.testing.assert_array_equal(read_image(path).pixels, RGB8.transpose(2, 0, 1))
    tifffile.imwrite(path, np.dstack([RGB8, GREY8]), photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(path).pixels, RGB8.transpose(2, 0, 1))
    tifffile.imwrite(path, GREY8, photometric="miniswhite", bigtiff=True)
    image = read_image(path)
    assert image.invert
    np.testing.assert_array_equal(image.pixels[0], GREY8)
    Pillow.fromarray(RGB8).convert("P").save(path)
    with Pillow.open(path) as picture:
        shown = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_allclose(read_image(path).pixels / 65535, shown / 255, atol=1 / 255)
    Pillow.fromarray(GREY8 > 99).save(path)
    np.testing.assert_array_equal(read_image(path).pixels[0], (GREY8 > 99) * 255)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg"])
def test_tiff_compressions_that_need_imagecodecs(tmp_path, compression):
    pytest.importorskip("imagecodecs")
    smooth = np.broadcast_to(np.array([200, 90, 40], np.uint8), (32, 32, 3))
    Pillow.fromarray(smooth).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_allclose(read_image(tmp_path / "a.tif").pixels.mean((1, 2)), [200, 90, 40], atol=3)


def test_pages_of_a_tiff_are_frames(tmp_path):
    path = tmp_path / "a.tif"
    stack = np.stack([DEEP, DEEP // 2, DEEP // 3])
    tifffile.imwrite(path, stack, photometric="minisblack")
    assert count_frames(path) == 3
    image = read_image(path, frame=2)
    assert image.frame == 2
    np.testing.assert_array_equal(image.pixels[0], stack[2])
    with pytest.raises(ReadError) as excinfo:
        read_image(path)
    assert "holds 3 images, expected one. Pass frame=0..2" in one_line(excinfo, path)
    with pytest.raises(ReadError, match="has no frame 3"):
        read_image(path, frame=3)
    with pytest.raises(ReadError, match="has no frame -1"):
        read_image(path, frame=-1)


@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (np.zeros((20, 20, 5), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}, "has 5 channels"),
        (np.zeros((20, 20, 4), np.uint8), {"photometric": "separated"}, "photometric SEPARATED"),
        (np.zeros((20, 20), np.complex64), {}, "pixels of type complex64"),
        (
            np.zeros((4, 20, 30), np.uint8),
            {"photometric": "minisblack", "volumetric": True, "tile": (4, 16, 16)},
            "axes ZYX",
        ),
    ],
)
def test_tiffs_that_are_not_images(tmp_path, pixels, options, reason):
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(ReadError, match=reason):
        read_image(tmp_path / "a.tif")


# files that are not usable


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.dcm", b"", "is empty (0 bytes)"),
        (
            "note.png",
            b"not an image\n" * 50,
            "is not a PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000, DICOM or NIfTI file by its first bytes",
        ),
        ("short.png", b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
        ("short.jpg", b"\xff\xd8\xff", "cannot be decoded"),
        ("short.tif", b"II*\0", "cannot be decoded"),
        ("noise.dcm", bytes(128) + b"DICM" + bytes(range(256)), "is a DICOM object without an image"),
        ("short.nii.gz", b"\x1f\x8b\x08\x00", "is not a PNG"),
    ],
)
def test_nonsense_is_one_clear_line(tmp_path, capfd, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ReadError) as excinfo:
        read_image(path)
    assert reason in one_line(excinfo, path)
    if name != "noise.dcm":  # its header says nothing, which means one frame
        with pytest.raises(ReadError) as excinfo:
            count_frames(path)
        assert reason in one_line(excinfo, path)
    assert capfd.readouterr() == ("", "")


def test_missing_files_and_folders(tmp_path):
    for function in (read_image, count_frames, sniff_format, read_mask):
        with pytest.raises(ReadError, match="no such file"):
            function(tmp_path / "absent.png")
        with pytest.raises(ReadError, match="is a folder"):
            function(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "deflate.tif"])
@pytest.mark.parametrize("kept", [0.4, 0.9])
def test_truncated_files(tmp_path, capfd, suffix, kept):
    path = tmp_path / f"a.{suffix}"
    big = RNG.integers(0, 256, (200, 200), dtype=np.uint8)
    if suffix.endswith("tif"):
        tifffile.imwrite(path, big, rowsperstrip=50, compression="zlib" if suffix.startswith("deflate") else None)
    else:
        save(path, big)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ReadError, match="truncated") as excinfo:
        read_image(path)
    one_line(excinfo, path)
    assert capfd.readouterr() == ("", "")


def test_a_tiff_cut_between_two_strips(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RNG.integers(0, 256, (200, 200), dtype=np.uint8), rowsperstrip=50, compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        third = tiff.pages[0].dataoffsets[2]
    path.write_bytes(path.read_bytes()[:third])
    with pytest.raises(ReadError, match="ends before its pixel data does"):
        read_image(path)


def test_an_imagej_stack_behind_one_page_is_not_read_as_one_image(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DEEP, byteorder=">", description="ImageJ=1.11a\nimages=3\nslices=3\n", metadata=None)
    path.write_bytes(path.read_bytes() + 2 * DEEP.astype(">u2").tobytes())
    for function in (read_image, count_frames):
        with pytest.raises(ReadError, match="a stack stored behind a single TIFF page"):
            function(path)


def test_huge_images_are_refused_before_decoding(tmp_path):
    huge = write_deep_png(tmp_path / "a.png", np.zeros((1, 1, 1), np.uint16), size=(30000, 30000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ReadError, match=r"is 30000x30000 pixels .* Tile or downsample it first"):
            read_image(huge)
    tifffile.imwrite(tmp_path / "a.tif", GREY8)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        for tag in ("ImageWidth", "ImageLength"):
            tiff.pages[0].tags[tag].overwrite(30000)
    with pytest.raises(ReadError, match="is 30000x30000 pixels"):
        read_image(tmp_path / "a.tif")


def test_an_image_beyond_pillows_own_limit_is_read_if_it_is_within_ours(tmp_path, monkeypatch, decoding_here):
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 100)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", GREY8)).pixels[0], GREY8)


@pytest.mark.parametrize("shape", [(1, 1), (7, 100), (100, 7)])
def test_tiny_images_are_refused(tmp_path, shape):
    with pytest.raises(ReadError, match=f"is {shape[0]}x{shape[1]} pixels .* at least 8"):
        read_image(save(tmp_path / "a.png", np.zeros(shape, np.uint8)))


def test_pixels_that_are_no_numbers_get_a_value(tmp_path):
    pixels = np.linspace(-3, 5, 100).reshape(10, 10)
    pixels[0, :5] = np.nan, np.inf, -np.inf, 1e300, np.nan
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    image = read_image(tmp_path / "a.tif")
    lowest, highest = np.float32(pixels[0, 5]), np.float32(5)
    np.testing.assert_array_equal(image.pixels[0, 0, :5], [lowest, highest, lowest, highest, lowest])
    np.testing.assert_array_equal(image.pixels[0, 1:], pixels[1:].astype(np.float32))
    assert "NaN pixels were taken as the lowest value" in image.note
    tifffile.imwrite(tmp_path / "a.tif", np.where(np.isfinite(pixels), np.nan, pixels))
    with pytest.raises(ReadError) as excinfo:
        read_image(tmp_path / "a.tif")
    assert "100 of 100 pixels are NaN or infinite" in one_line(excinfo, tmp_path / "a.tif")


def test_nan_in_a_mask_is_no_lesion(tmp_path):
    mask = np.full((10, 10), np.nan, np.float32)
    mask[2:4, 2:5] = 1
    tifffile.imwrite(tmp_path / "a.tif", mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), mask == 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for function in (read_image, count_frames, sniff_format):
        with pytest.raises(ReadError, match=r"a\.png: is a pipe or a device, expected a file"):
            function(tmp_path / "a.png")


def test_a_tiff_without_pages_is_refused_and_does_not_vanish(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0" + bytes(60))
    with pytest.raises(ReadError, match=r"a\.tif: holds no image"):
        count_frames(tmp_path / "a.tif")
    assert len(samples_of(tmp_path / "a.tif", task="t")) == 1
    with pytest.raises(ReadError, match=r"a\.tif: "):
        read_image(tmp_path / "a.tif")


def test_a_constant_image_is_fine(tmp_path):
    assert (read_image(save(tmp_path / "a.png", np.full((9, 9), 5, np.uint8))).pixels == 5).all()


def test_the_digest_follows_the_file(tmp_path):
    path = save(tmp_path / "a.png", GREY8)
    before = read_image(path).sha256
    save(path, RGB8)
    assert read_image(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != before


# masks


def test_masks(tmp_path):
    lesion = np.zeros((20, 31), bool)
    lesion[5:9, 6:20] = True
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.png", lesion.astype(np.uint8))), lesion)
    coloured = np.zeros((20, 31, 3), np.uint8)
    coloured[lesion, 2] = 1
    mask = read_mask(save(tmp_path / "b.png", coloured))
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, lesion)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "c.jpg", lesion.astype(np.uint8) * 255)), lesion)
    tifffile.imwrite(tmp_path / "d.tif", ~lesion, photometric="miniswhite")
    np.testing.assert_array_equal(read_mask(tmp_path / "d.tif"), lesion)
    tifffile.imwrite(tmp_path / "e.tif", np.stack([lesion, ~lesion]).astype(np.uint8), photometric="minisblack")
    np.testing.assert_array_equal(read_mask(tmp_path / "e.tif", frame=0), lesion)


# NIfTI


def save_nifti(path, voxels, affine=None, kind="Nifti1Image"):
    nibabel = pytest.importorskip("nibabel")
    getattr(nibabel, kind)(voxels, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine).to_filename(path)
    return path


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
def test_a_nifti_slice_shows_front_up_and_left_to_right(tmp_path, name, kind):
    voxels = RNG.integers(-1000, 1000, (9, 11, 5)).astype(np.int16)
    path = save_nifti(tmp_path / name, voxels, kind=kind)
    assert sniff_format(path) == "nifti"
    assert count_frames(path) == 5
    image = read_image(path, frame=3)
    assert image.pixels.shape == (1, 11, 9)
    for x, y in [(0, 0), (8, 10), (2, 7)]:
        assert image.pixels[0, 10 - y, x] == voxels[x, y, 3]
    assert image.value_range is None
    assert image.spacing == (3.0, 2.0)
    assert image.frame == 3
    with pytest.raises(ReadError, match="holds 5 images"):
        read_image(path)


def test_a_nifti_is_recognised_without_its_suffix(tmp_path):
    path = save_nifti(tmp_path / "v.nii.gz", np.ones((9, 9, 9), np.float32))
    renamed = path.rename(tmp_path / "volume")
    assert count_frames(renamed) == 9
    assert read_image(renamed, frame=8).pixels.shape == (1, 9, 9)


def test_nifti_scaling_and_units(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(np.full((9, 9, 2), 10, np.int16), np.diag([0.002, 0.003, 0.004, 1]))
    image.header.set_slope_inter(2.0, -1024.0)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "v.nii.gz")
    # nibabel divides by the slope when it writes, so compare with what it reads back
    read = read_image(tmp_path / "v.nii.gz", frame=1)
    np.testing.assert_allclose(read.pixels, nibabel.load(tmp_path / "v.nii.gz").get_fdata()[0, 0, 1])
    assert nibabel.load(tmp_path / "v.nii.gz").dataobj.slope == 2.0
    np.testing.assert_allclose(read.spacing, (3.0, 2.0), rtol=1e-6)


@pytest.mark.parametrize("codes", ["LPS", "SAR", "PIR", "ASL"])
def test_nifti_slices_do_not_depend_on_the_stored_axes(tmp_path, codes):
    nibabel = pytest.importorskip("nibabel")
    voxels = RNG.normal(size=(9, 11, 10)).astype(np.float32)
    reference = nibabel.Nifti1Image(voxels, np.diag([2.0, 3.0, 4.0, 1.0]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(reference.affine), nibabel.orientations.axcodes2ornt(codes)
    )
    nibabel.save(reference.as_reoriented(turn), tmp_path / "v.nii.gz")
    assert "".join(nibabel.aff2axcodes(nibabel.load(tmp_path / "v.nii.gz").affine)) == codes
    image = read_image(tmp_path / "v.nii.gz", frame=6)
    np.testing.assert_array_equal(image.pixels[0], voxels[:, :, 6].T[::-1])
    assert image.spacing == (3.0, 2.0)


@pytest.mark.parametrize(("slope", "inter", "expected"), [(0, 7, 10), (np.nan, 7, 10), (2, np.nan, 20), (2, 5, 25)])
def test_nifti_scaling_that_is_not_set_is_none(tmp_path, slope, inter, expected):
    path = save_nifti(tmp_path / "v.nii", np.full((9, 9, 2), 10, np.int16))
    raw = bytearray(path.read_bytes())
    raw[112:120] = struct.pack("<2f", slope, inter)
    path.write_bytes(raw)
    np.testing.assert_array_equal(read_image(path, frame=1).pixels, np.full((1, 9, 9), expected))


@pytest.mark.parametrize(
    ("size", "spacing"), [(np.nan, None), (np.inf, None), (1e30, None), (0, (3.0, 1.0)), (-2, (3.0, 2.0))]
)
def test_a_voxel_size_that_is_no_length_is_unknown(tmp_path, size, spacing):
    path = save_nifti(tmp_path / "v.nii", np.zeros((9, 9, 2), np.int16))
    raw = bytearray(path.read_bytes())
    raw[80:84] = struct.pack("<f", size)
    path.write_bytes(raw)
    assert read_image(path, frame=0).spacing == spacing


def test_nan_voxels_take_the_lowest_value_of_the_volume(tmp_path):
    voxels = RNG.uniform(5, 9, (10, 12, 3)).astype(np.float32)
    voxels[1, 2, 2] = 4  # the lowest, in another slice
    voxels[:3, :, 1] = np.nan
    voxels[4, 4, 1] = np.inf
    voxels[:, :, 0] = np.nan
    path = save_nifti(tmp_path / "v.nii.gz", voxels)
    image = read_image(path, frame=1)
    expected = voxels[:, :, 1].copy()
    expected[:3], expected[4, 4] = 4, voxels[np.isfinite(voxels)].max()
    np.testing.assert_array_equal(image.pixels[0], expected.T[::-1])
    assert "NaN" in image.note
    assert read_image(path, frame=2).note is None
    with pytest.raises(ReadError, match="120 of 120 pixels are NaN or infinite, so there is nothing to judge"):
        read_image(path, frame=0)


@pytest.mark.parametrize("thick", [1, 3])
@pytest.mark.parametrize("plane", ["sagittal", "coronal"])
@pytest.mark.parametrize("codes", ["RAS", "ASR", "LPI"])
def test_a_thin_volume_is_cut_where_it_is_thin(tmp_path, plane, thick, codes):
    nibabel = pytest.importorskip("nibabel")
    from anatomaly.data.volumes import write_volume

    shape = (thick, 11, 10) if plane == "sagittal" else (11, thick, 10)
    voxels = RNG.normal(size=shape).astype(np.float32)
    reference = nibabel.Nifti1Image(voxels, np.diag([2.0, 3.0, 4.0, 1.0]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(reference.affine), nibabel.orientations.axcodes2ornt(codes)
    )
    stored = reference.as_reoriented(turn)
    nibabel.save(stored, tmp_path / "v.nii.gz")
    path = tmp_path / "v.nii.gz"
    assert count_frames(path) == thick
    last = read_image(path, frame=thick - 1)
    expected = voxels[-1] if plane == "sagittal" else voxels[:, -1]  # (columns, z)
    np.testing.assert_array_equal(last.pixels[0], expected.T[::-1])
    assert last.spacing == ((4.0, 3.0) if plane == "sagittal" else (4.0, 2.0))
    maps = {k: read_image(path, frame=k).pixels[0] for k in range(thick)}
    write_volume(maps, path, tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(nibabel.load(tmp_path / "out.nii.gz").get_fdata(), stored.get_fdata())


def test_niftis_that_are_not_one_grey_volume(tmp_path):
    path = save_nifti(tmp_path / "v.nii.gz", np.zeros((9, 9, 9, 3), np.float32))
    for function in (read_image, count_frames):
        with pytest.raises(ReadError, match=r"has shape \(9, 9, 9, 3\), expected one 3-D volume"):
            function(path)
    assert count_frames(save_nifti(path, np.zeros((9, 9, 4, 1), np.float32))) == 4
    flat = read_image(save_nifti(path, np.zeros((9, 10), np.float32)))
    assert (flat.pixels.shape, flat.frame) == ((1, 10, 9), None)
    with pytest.raises(ReadError, match="expected real numbers"):
        read_image(save_nifti(path, np.zeros((9, 9, 9), np.complex64)), frame=0)
    with pytest.raises(ReadError, match="81 of 81 pixels are NaN"):
        read_image(save_nifti(path, np.full((9, 9, 2), np.nan, np.float32)), frame=0)
    save_nifti(path := tmp_path / "v.nii", np.zeros((9, 9, 9), np.float32))
    header = bytearray(path.read_bytes())
    header[312:328] = bytes(16)  # srow_z, the last row of the affine
    path.write_bytes(header)
    with pytest.raises(ReadError, match="singular affine"):
        read_image(path, frame=0)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_truncated_nifti(tmp_path, name, capfd):
    path = save_nifti(tmp_path / name, RNG.normal(size=(20, 20, 20)).astype(np.float32))
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ReadError, match="corrupt or truncated") as excinfo:
        read_image(path, frame=0)
    one_line(excinfo, path)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_gzip_stream_is_noticed(tmp_path):
    path = save_nifti(tmp_path / "v.nii.gz", RNG.normal(size=(20, 20, 20)).astype(np.float32))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(ReadError, match="corrupt or truncated"):
        read_image(path, frame=0)


def test_missing_extras_are_named(tmp_path, monkeypatch, decoding_here):
    volume = save_nifti(tmp_path / "v.nii", np.zeros((9, 9, 9), np.float32))
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM")
    for module in ("nibabel", "pydicom", "pydicom.pixels"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotReadyError, match=r'pip install "anatomaly\[nifti\]"'):
        read_image(volume, frame=0)
    with pytest.raises(NotReadyError, match=r'pip install "anatomaly\[dicom\]"'):
        count_frames(tmp_path / "a.dcm")


def test_every_sniffed_format_has_a_decoder():
    assert set(readers._MAGIC.values()) | {"bmp", "webp", "dicom", "nifti"} == set(readers._FORMATS)


def test_a_thread_that_is_done_does_not_make_the_others_loud(capfd):
    import logging
    import threading

    from anatomaly.data.decoding import reading

    entered, leave = threading.Event(), threading.Event()

    def other():
        with reading("b"):
            entered.set()
            leave.wait(10)

    chatty = [logging.getLogger(name) for name in ("pydicom", "pydicom.pixels.decoders.base", "PIL.Image")]
    before = [(logger.disabled, logger.propagate, list(logger.handlers)) for logger in chatty]
    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    with reading("a"):
        pass
    for logger in chatty:
        logger.error("a word nobody asked for")
    warnings.warn("nor this", stacklevel=1)
    leave.set()
    thread.join()
    assert capfd.readouterr() == ("", "")
    assert before == [(logger.disabled, logger.propagate, list(logger.handlers)) for logger in chatty]


def test_importing_the_readers_imports_no_library():
    libraries = {"pydicom", "nibabel", "PIL", "torch", "tifffile"}
    code = f"import sys, anatomaly.data.transforms\nprint({libraries} & {{*sys.modules}} or 'none')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "none"
