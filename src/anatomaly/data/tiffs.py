"""TIFF files: 8, 16 and 32 bit, integer and floating point, grey, RGB, palette; a page is a frame."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.decoding import MIN_SIDE, Decoded, check_size, pick_frame, upright
from anatomaly.errors import ReadError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage


def count_pages(path: Path) -> int:
    """Number of pages of a TIFF.

    Raises:
        ReadError: Its images lie behind a single page.
    """
    return _pages(_open(path))


def decode(path: Path, frame: int | None, _apply_voi: bool) -> Decoded:
    """Decode one page.

    Raises:
        ReadError: No such page, no decoder for its compression, or not an image of 1 or 3 channels.
    """
    import tifffile

    tiff = _open(path)
    count = _pages(tiff)
    index = pick_frame(frame, count)
    page = tiff.pages[index].aspage()
    _check_page(page)
    pixels, value_range = _page_pixels(page, path.stat().st_size)
    orientation = page.tags.valueof(274, default=1)
    invert = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    return Decoded(upright(pixels, orientation), value_range, index if count > 1 else None, invert)


def _open(path: Path) -> TiffFile:
    status = path.stat()
    return _open_once(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1)
def _open_once(path: Path, _modified_ns: int, _size: int) -> TiffFile:
    """The file, whose list of pages is walked through once: frames are read one after the other."""
    import tifffile

    return tifffile.TiffFile(path)


def _pages(tiff: TiffFile) -> int:
    count = len(tiff.pages)
    if count == 1 and tiff.series[0].size != tiff.pages[0].size:
        raise ReadError("is a stack stored behind a single TIFF page. Save it as a multi-page TIFF.")
    return count


def _check_page(page: TiffPage) -> None:
    """Refuse a page that is too large, as a whole or in one of its tiles, which are decoded as a whole."""
    height, width = int(page.imagelength), int(page.imagewidth)
    values = prod(int(length) for length in page.shape) * (1 if page.colormap is None else 3)
    check_size(height, width, max(1, values // max(1, height * width)))
    if page.is_tiled:
        check_size(max(MIN_SIDE, int(page.tilelength)), max(MIN_SIDE, int(page.tilewidth)), int(page.samplesperpixel))


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
