"""Files -> `types.Image`: one table from format to decoder, the format told by the first bytes and never by the suffix.

What the pixels mean is not guessed here: they stay in the stored unit, with the range the format declares where it
declares one; `transforms` turns them into [0, 1] by a rule the user chose once per data set.  Nothing is decoded in the
caller's process: the public functions ask one of the `workers`, which runs `answer`.
"""

from __future__ import annotations

import gzip
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anatomaly.data import dicom, series, tiffs, volumes, workers
from anatomaly.data.decoding import (
    Decoded,
    check_size,
    decoded_limit,
    fill_gaps,
    limit_decoded,
    naming,
    pick_frame,
    reading,
    upright,
)
from anatomaly.data.deep_png import GREY, decode_deep, depth_of
from anatomaly.data.dicom_source import begins_without_preamble
from anatomaly.data.origin import origin_of
from anatomaly.errors import AnatomalyError, ReadError
from anatomaly.files import file_digest
from anatomaly.types import Image, Origin, Sample

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

    from anatomaly.types.cuts import Axis

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
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")  # of Pillow
#: What is said of a picture where a volume is expected.
NO_VOLUME = "is no volume, expected a NIfTI file or a DICOM series. Leave it out, or leave out --axis."
#: Memory a worker may take: so many times what it may decode, and so much for libraries; the file itself comes on top.
_MEMORY_FACTOR, _MEMORY_MARGIN = 4, 2**30


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
    with naming(path):
        return int(_ask("count", path)[0]["count"])


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
            `frame`; has a side under 8 pixels, takes more memory than `decoding.limit_decoded` allows, or has no
            finite pixel; its decoder died or took too long.
        NotReadyError: pydicom or nibabel is needed and not installed, or no worker can be started.
    """
    return read_sample(Sample(path, "", frame=frame), apply_voi=apply_voi)


def read_sample(sample: Sample, *, apply_voi: bool = False) -> Image:
    """Read the image of a row, also where it is a slice of a volume.

    Args:
        sample: The row.
        apply_voi: As for `read_image`.

    Returns:
        As `read_image`; `sha256` is that of all files that the image was made of.

    Raises:
        ReadError: As `read_image`; or the volume cannot be cut along the axis, or is none.
        NotReadyError: As `read_image`.
    """
    path, cut = sample.path, sample.cut
    axis = None if cut is None or cut.own else cut.axis
    files = [] if cut is None or cut.own else [str(file.absolute()) for file in cut.series]
    with naming(path):
        found, pixels = _ask("read", path, frame=sample.frame, apply_voi=apply_voi, axis=axis, series=files)
        assert pixels is not None
        return Image(
            pixels=pixels,
            value_range=_pair(found["value_range"]),
            path=path,
            sha256=found["sha256"],
            frame=found["frame"],
            invert=found["invert"],
            spacing=_pair(found["spacing"]),
            note=found["note"],
            modality=found["modality"],
            origin=Origin(*found["origin"]),
        )


def answer(request: workers.Request) -> workers.Answer:
    """What a worker does: decode here, in this process, and say what was found or what is wrong, without the path.

    Args:
        request: "verb" ("read" or "count"), "path", "limit" (GiB decoded); to read also "frame", "apply_voi", and of a
            volume "axis" and the files of its "series", if it has any.

    Returns:
        "count"; or the fields of an `Image`, and its pixels; or the name of an "error" and its "message".
    """
    path = Path(request["path"])
    try:
        limit_decoded(request["limit"])
        if request["verb"] == "count":
            return {"count": _count_here(path)}, None
        how: Any = {name: request[name] for name in ("frame", "apply_voi", "axis")}
        image = _read_here(path, **how, files=[Path(each) for each in request["series"]])
    except AnatomalyError as err:
        return {"error": type(err).__name__, "message": str(err).removeprefix(f"{path}: ")}, None
    fields = ("value_range", "sha256", "frame", "invert", "spacing", "note", "modality", "origin")
    return {name: getattr(image, name) for name in fields}, image.pixels


def _ask(verb: str, path: Path, **how: object) -> workers.Answer:
    limit = decoded_limit()
    memory = int(_MEMORY_FACTOR * limit * 2**30) + _MEMORY_MARGIN + (path.stat().st_size if path.is_file() else 0)
    return workers.ask({"verb": verb, "path": str(path.absolute()), "limit": limit, "memory": memory, **how})


def _pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    return None if values is None else (float(values[0]), float(values[1]))


def _count_here(path: Path) -> int:
    with reading(path):
        count = _FORMATS[_known_format(path)].count(path)
        if count < 1:
            raise ReadError("holds no image. It is corrupt or truncated: export it again.")
        return count


def _read_here(path: Path, *, frame: int | None, apply_voi: bool, axis: Axis | None, files: Sequence[Path]) -> Image:
    with reading(path):
        name = _known_format(path)
        if files:
            assert axis is not None
            decoded = fill_gaps(series.decode(files, axis, frame, apply_voi))
        elif axis is None:
            decoded = fill_gaps(_decode(name, path, frame, apply_voi))
        elif name == "nifti":
            decoded = fill_gaps(volumes.decode(path, frame, apply_voi, axis))
        else:
            raise ReadError(NO_VOLUME)
        pixels = np.ascontiguousarray(decoded.pixels, np.float32)
        status = path.stat()
        return Image(
            pixels=pixels,
            value_range=_pair(decoded.value_range),
            path=path,
            sha256=series.digest(files) if files else _sha256(path, status.st_mtime_ns, status.st_size),
            frame=decoded.frame,
            invert=decoded.invert,
            spacing=_pair(decoded.spacing),
            note=decoded.note,
            modality=decoded.modality,
            origin=origin_of(decoded, name),
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
        name = _known_format(path)
        decoded = _decode(name, path, frame, False)
        if name == "jpeg":
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


def _decode(name: str, path: Path, frame: int | None, apply_voi: bool) -> Decoded:
    """What the decoder of a format finds, as float32."""
    decoded = _FORMATS[name].decode(path, frame, apply_voi)
    if decoded.pixels.ndim != 3 or len(decoded.pixels) not in (1, 3):
        raise ReadError(f"holds pixels of shape {decoded.pixels.shape}, expected 1 or 3 channels. Convert it.")
    return decoded._replace(pixels=decoded.pixels.astype(np.float32))


def _sniff(path: Path) -> str | None:
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe would wait for somebody to write to it
        raise ReadError("is a pipe or a device, expected a file. Leave it out.")
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
    return file_digest(path)


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
        check_size(picture.height, picture.width, 1 if picture.mode in _GREY_MODES else 3)
        count = int(getattr(picture, "n_frames", 1))
        index = pick_frame(frame, count)
        if index:
            picture.seek(index)
        bits, colour = depth_of(path) if picture.format == "PNG" else (8, None)
        if bits == 16:
            stored = np.asarray(picture) if colour == GREY else decode_deep(path, index)
        else:
            stored = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
        orientation = _orientation(picture)
    pixels = stored[None] if stored.ndim == 2 else np.moveaxis(stored, -1, 0)
    return Decoded(upright(pixels, orientation), (0.0, 2.0 ** max(bits, 8) - 1), index if count > 1 else None)


def _decode_jpeg_2000(path: Path, frame: int | None, apply_voi: bool) -> Decoded:
    """JPEG 2000; Pillow would stretch 12 bits to 16 and cut 16-bit colour down to 8, so deep ones are decoded here."""
    data = path.read_bytes()
    begin = data.find(b"\xff\x4f\xff\x51")  # the codestream, and in it its SIZ segment
    if begin < 0 or len(data) < begin + 43:
        raise ReadError("has no JPEG 2000 codestream. It is corrupt or truncated: export it again.")
    width, height, left, top = struct.unpack(">4I", data[begin + 8 : begin + 24])
    check_size(height - top, width - left, min(3, int.from_bytes(data[begin + 40 : begin + 42], "big")))
    bits, signed = (data[begin + 42] & 127) + 1, data[begin + 42] >= 128
    if bits <= 8 and not signed:
        return _decode_picture(path, frame, apply_voi)
    import imagecodecs

    pick_frame(frame, 1)
    stored = imagecodecs.jpeg2k_decode(data)
    pixels = stored[None] if stored.ndim == 2 else np.moveaxis(stored, -1, 0)
    low = -(2.0 ** (bits - 1)) if signed else 0.0
    return Decoded(pixels[: 3 if len(pixels) >= 3 else 1], (low, low + 2.0**bits - 1))


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
    "tiff": _Format(tiffs.decode, tiffs.count_pages),
    "dicom": _Format(dicom.decode, dicom.count_frames),
    "nifti": _Format(volumes.decode, volumes.count_slices),
}
