"""Files -> `types.Image`: one table from format to decoder, the format told by the first bytes and never by the suffix.

What the pixels mean is not guessed here: they stay in the stored unit, with the range the format declares where it
declares one; `transforms` turns them into [0, 1] by a rule the user chose once per data set.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anatomaly.data import dicom, volumes
from anatomaly.data.decoding import Decoded, check_size, fill_gaps, pick_frame, reading
from anatomaly.data.dicom_source import begins_without_preamble
from anatomaly.errors import ReadError
from anatomaly.types import Image, Sample

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile
    from tifffile import TiffFile, TiffPage

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",  # BigTIFF
    b"MM\0+": "tiff",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"\0\0\0\x0cjP  \r\n\x87\n": "jpeg2000",
    b"\xff\x4f\xff\x51": "jpeg2000",  # a bare codestream
}
_BMP_HEADERS = {12, 40, 52, 56, 64, 108, 124}  # lengths there are; "BM" alone begins many a text
_NIFTI_MAGIC = {b"n+1\0", b"ni1\0", b"n+2\0", b"ni2\0"}
_PNG_GREY = 0  # colour type in the IHDR chunk


def sniff_format(path: Path) -> str | None:
    """Tell a file's format from its first bytes.

    Returns:
        "png", "jpeg", "tiff", "bmp", "gif", "webp", "jpeg2000", "dicom" (with or without preamble), "nifti" (plain or
        gzipped), or None for anything else.

    Raises:
        ReadError: The file cannot be opened.
    """
    with reading(path):
        return _sniff(path)


def count_frames(path: Path) -> int:
    """Count the images in a file: pages of a TIFF, frames of a DICOM file or an animation, slices of a NIfTI volume.

    Raises:
        ReadError: As `read_image`.
    """
    with reading(path):
        return _FORMATS[_known_format(path)].count(path)


def read_image(path: Path, *, frame: int | None = None, apply_voi: bool = False) -> Image:
    """Read one 2-D image from a PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000, DICOM or NIfTI file.

    The EXIF/TIFF orientation is applied where it is a defined one, so the pixel grid is the one every viewer shows.
    Alpha is dropped, palettes and CMYK become RGB, 1-bit images become 0 and 255.  NaN pixels, which mark what was not
    scanned, become the lowest finite value of the image (of the volume, for a slice), infinite ones the nearest.

    Args:
        path: The file; its suffix does not matter.
        frame: 0-based page, frame or slice; required where the file holds several images.
        apply_voi: DICOM only: apply the file's own VOI LUT or window (see `transforms.needs_voi`).

    Returns:
        Image with finite float32 pixels (C, H, W) in the stored unit.  `value_range` is (0, 255) or (0, 65535) for 8
        and 16-bit files, the range of BitsStored in the modality's unit for DICOM, (0, 1) after a VOI transform, and
        None for NIfTI, floating-point and 32-bit TIFF.

    Raises:
        ReadError: The file is missing, empty, of another format, corrupt or truncated; has several images and no
            `frame`; has a side under 8 pixels, more than 2**28 pixels, or no finite pixel.
        NotReadyError: pydicom or nibabel is needed and not installed.
    """
    with reading(path):
        decoded = fill_gaps(_decode(path, frame, apply_voi))
        pixels = np.ascontiguousarray(decoded.pixels, np.float32)
        status = path.stat()
        return Image(
            pixels=pixels,
            value_range=decoded.value_range,
            path=path,
            sha256=_sha256(path, status.st_mtime_ns, status.st_size),
            frame=decoded.frame,
            invert=decoded.invert,
            spacing=decoded.spacing,
            note=decoded.note,
        )


def read_mask(path: Path, *, frame: int | None = None) -> NDArray[np.bool_]:
    """Read a lesion mask from any format `read_image` knows.

    Args:
        path: The mask file.
        frame: As for `read_image`.

    Returns:
        (H, W), True where any channel is displayed as non-zero; NaN is no lesion.  In a JPEG, whose compression puts
        faint noise around every edge, True from half of white on.

    Raises:
        ReadError: As `read_image`.
    """
    with reading(path):
        decoded = _decode(path, frame, False)
        if _sniff(path) == "jpeg":
            lesion = decoded.pixels > 127
        else:
            lesion = decoded.pixels != (decoded.value_range[1] if decoded.invert and decoded.value_range else 0)
            lesion &= ~np.isnan(decoded.pixels)
        return np.asarray(lesion.any(axis=0), np.bool_)


def read_mask_of(sample: Sample) -> NDArray[np.bool_] | None:
    """Read a row's lesion mask, or None where the row names none; a mask volume is read at the row's frame.

    Raises:
        ReadError: As `read_image`.
    """
    if sample.mask is None:
        return None
    return read_mask(sample.mask, frame=sample.frame if count_frames(sample.mask) > 1 else None)


def _decode(path: Path, frame: int | None, apply_voi: bool) -> Decoded:
    """What the decoder of a file's format finds, as float32."""
    decoded = _FORMATS[_known_format(path)].decode(path, frame, apply_voi)
    if decoded.pixels.ndim != 3 or len(decoded.pixels) not in (1, 3):
        raise ReadError(f"holds pixels of shape {decoded.pixels.shape}, expected 1 or 3 channels. Convert it.")
    return decoded._replace(pixels=decoded.pixels.astype(np.float32))


def _sniff(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(352)
    if head[128:132] == b"DICM":  # first: a DICOM preamble may look like a TIFF
        return "dicom"
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if begins_without_preamble(head):
        return "dicom"
    if head.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(path) as file:
                head = file.read(352)
        except (OSError, EOFError, zlib.error):
            return None
    return "nifti" if head[344:348] in _NIFTI_MAGIC or head[4:8] in _NIFTI_MAGIC else None


def _known_format(path: Path) -> str:
    name = _sniff(path)
    if name is None:
        if path.stat().st_size == 0:
            raise ReadError("is empty (0 bytes). Copy or export it again.")
        raise ReadError(
            "is not a PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000, DICOM or NIfTI file by its first bytes, whatever its "
            "name says. Convert it, or leave it out."
        )
    return name


@lru_cache(maxsize=4)
def _sha256(path: Path, _modified_ns: int, _size: int) -> str:
    """Digest of the file; remembered, because the slices of a volume are read one after the other."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _upright(pixels: NDArray[Any], orientation: Any) -> NDArray[Any]:
    """Turn (C, H, W) pixels the way EXIF/TIFF tag 274 says they are shown; anything but 2 to 8 is as stored."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels


def _open_picture(path: Path) -> ImageFile:
    """Open with Pillow's plugin itself: `PIL.Image.open` would add its own, smaller pixel limit."""
    from PIL import BmpImagePlugin, GifImagePlugin, Jpeg2KImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    plugins: dict[str, Callable[[Path], ImageFile]] = {
        "png": PngImagePlugin.PngImageFile,
        "jpeg": JpegImagePlugin.JpegImageFile,
        "bmp": BmpImagePlugin.BmpImageFile,
        "gif": GifImagePlugin.GifImageFile,
        "webp": WebPImagePlugin.WebPImageFile,
        "jpeg2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    }
    return plugins[_known_format(path)](path)


def _orientation(picture: ImageFile) -> Any:
    """EXIF tag 274; 1 where there is none or the EXIF data, which is not the image, is damaged."""
    try:
        return picture.getexif().get(274, 1)
    except Exception:  # Pillow's parsers raise almost anything
        return 1


def _count_pictures(path: Path) -> int:
    with _open_picture(path) as picture:
        return int(getattr(picture, "n_frames", 1))


def _decode_picture(path: Path, frame: int | None, _apply_voi: bool) -> Decoded:
    """PNG (8 and 16 bit, grey, colour, palette, animated), JPEG, BMP, GIF, WebP and JPEG 2000 of at most 8 bits."""
    with _open_picture(path) as picture:
        check_size(picture.height, picture.width)
        count = int(getattr(picture, "n_frames", 1))
        index = pick_frame(frame, count)
        if index:
            picture.seek(index)
        bits, colour = _png_depth(path) if picture.format == "PNG" else (8, None)
        if bits == 16:
            stored = np.asarray(picture) if colour == _PNG_GREY else _decode_deep_png(path, index)
        else:
            stored = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
        orientation = _orientation(picture)
    pixels = stored[None] if stored.ndim == 2 else np.moveaxis(stored, -1, 0)
    return Decoded(_upright(pixels, orientation), (0.0, 2.0 ** max(bits, 8) - 1), index if count > 1 else None)


def _png_depth(path: Path) -> tuple[int, int]:
    """Bits per sample and colour type: bytes 24 and 25 of every PNG file."""
    with path.open("rb") as file:
        bits, colour = file.read(26)[24:]
    return bits, colour


def _decode_deep_png(path: Path, index: int) -> NDArray[Any]:
    """(H, W) or (H, W, 3) of a 16-bit colour PNG without alpha; Pillow would cut it down to 8 bits."""
    import imagecodecs

    if index:
        raise ReadError("is an animation of 16-bit colour, of which only frame 0 can be read. Export it as images.")
    try:
        channels: NDArray[Any] = imagecodecs.png_decode(path.read_bytes())
    except RuntimeError as err:
        raise ReadError("cannot be decoded as a 16-bit PNG. It is corrupt or truncated: export it again.") from err
    return channels[..., :3] if channels.shape[-1] >= 3 else channels[..., 0]


def _decode_jpeg_2000(path: Path, frame: int | None, apply_voi: bool) -> Decoded:
    """JPEG 2000; Pillow would stretch 12 bits to 16 and cut 16-bit colour down to 8, so deep ones are decoded here."""
    data = path.read_bytes()
    begin = data.find(b"\xff\x4f\xff\x51")  # the codestream, and in it its SIZ segment
    if begin < 0 or len(data) < begin + 43:
        raise ReadError("has no JPEG 2000 codestream. It is corrupt or truncated: export it again.")
    width, height, left, top = struct.unpack(">4I", data[begin + 8 : begin + 24])
    check_size(height - top, width - left)
    bits, signed = (data[begin + 42] & 127) + 1, data[begin + 42] >= 128
    if bits <= 8 and not signed:
        return _decode_picture(path, frame, apply_voi)
    import imagecodecs

    pick_frame(frame, 1)
    stored = imagecodecs.jpeg2k_decode(data)
    pixels = stored[None] if stored.ndim == 2 else np.moveaxis(stored, -1, 0)
    low = -(2.0 ** (bits - 1)) if signed else 0.0
    return Decoded(pixels[: 3 if len(pixels) >= 3 else 1], (low, low + 2.0**bits - 1))


def _count_pages(path: Path) -> int:
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        return _pages(tiff)


def _pages(tiff: TiffFile) -> int:
    count = len(tiff.pages)
    if count == 1 and tiff.series[0].size != tiff.pages[0].size:
        raise ReadError("is a stack stored behind a single TIFF page. Save it as a multi-page TIFF.")
    return count


def _decode_tiff(path: Path, frame: int | None, _apply_voi: bool) -> Decoded:
    """One page of a TIFF: 8, 16 and 32 bit, integer and floating point, grey, RGB, palette."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        count = _pages(tiff)
        index = pick_frame(frame, count)
        page = tiff.pages[index].aspage()
        check_size(page.imagelength, page.imagewidth)
        pixels, value_range = _page_pixels(page, path.stat().st_size)
        orientation = page.tags.valueof(274, default=1)
        invert = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    return Decoded(_upright(pixels, orientation), value_range, index if count > 1 else None, invert)


def _page_pixels(page: TiffPage, file_size: int) -> tuple[NDArray[Any], tuple[float, float] | None]:
    """(C, H, W) of a TIFF page and its value range."""
    from tifffile import COMPRESSION, PHOTOMETRIC

    if any(start + length > file_size for start, length in zip(page.dataoffsets, page.databytecounts, strict=False)):
        raise ReadError("ends before its pixel data does. It is truncated: copy or export it again.")
    kind = page.photometric
    channels = 3 if kind in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR) else 1
    decodable = kind == PHOTOMETRIC.YCBCR and page.compression == COMPRESSION.JPEG
    if not decodable and kind not in (
        PHOTOMETRIC.MINISWHITE,
        PHOTOMETRIC.MINISBLACK,
        PHOTOMETRIC.RGB,
        PHOTOMETRIC.PALETTE,
    ):
        raise ReadError(
            f"has TIFF photometric {getattr(kind, 'name', kind)}, expected grey, RGB or palette. Convert it."
        )
    try:
        stored = page.asarray()
    except ValueError as err:
        if "imagecodecs" not in str(err):
            raise
        codec = getattr(page.compression, "name", page.compression)
        raise ReadError(f"uses TIFF compression {codec}, its decoder is missing. Run: pip install imagecodecs") from err
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ReadError(
            f"has a page with axes {page.axes}, expected one 2-D image a page. Save it as a multi-page TIFF."
        )
    pixels = stored[None] if page.axes == "YX" else np.moveaxis(stored, page.axes.index("S"), 0)
    if len(pixels) not in (channels, channels + 1):  # one more is alpha
        raise ReadError(f"has {len(pixels)} channels, expected 1 or 3. Save the channel you want on its own.")
    pixels = pixels[:channels]
    if kind == PHOTOMETRIC.PALETTE and page.colormap is not None:
        return page.colormap[:, pixels[0]], (0.0, 65535.0)
    if pixels.dtype == np.bool_:
        return pixels * np.uint8(255), (0.0, 255.0)
    if pixels.dtype.kind not in "uif":
        raise ReadError(f"has pixels of type {pixels.dtype}, expected real numbers.")
    bits = int(page.bitspersample)
    if pixels.dtype.kind == "f" or bits > 16:
        return pixels, None
    signed = pixels.dtype.kind == "i"
    return pixels, (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)


class _Format(NamedTuple):
    decode: Callable[[Path, int | None, bool], Decoded]
    count: Callable[[Path], int]


_FORMATS = {
    "png": _Format(_decode_picture, _count_pictures),
    "jpeg": _Format(_decode_picture, _count_pictures),
    "bmp": _Format(_decode_picture, _count_pictures),
    "gif": _Format(_decode_picture, _count_pictures),
    "webp": _Format(_decode_picture, _count_pictures),
    "jpeg2000": _Format(_decode_jpeg_2000, lambda _path: 1),
    "tiff": _Format(_decode_tiff, _count_pages),
    "dicom": _Format(dicom.decode, dicom.count_frames),
    "nifti": _Format(volumes.decode, volumes.count_slices),
}
