"""What every format decoder shares: the record it hands to `readers.read_image`, its checks, and the error boundary.

Decoders say only what is wrong ("is a stack of 3 frames, ..."); the boundary adds which file it is, once.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anatomaly.errors import AnatomalyError, ConfigError, ReadError

MIN_SIDE = 8
#: GiB that one image may take, or one volume that has to be unpacked as a whole, unless `limit_decoded` says otherwise.
MAX_DECODED_GIB = 1.0
_BYTES_PER_VALUE = 8  # as read and as shown, both float32

_max_decoded = int(MAX_DECODED_GIB * 2**30)
_CHATTY_LOGGERS = ("PIL", "tifffile", "pydicom", "nibabel.global", "imagecodecs")
_SPACINGS = 1e-6, 1e4  # mm; beyond lies no pixel, only a damaged header


class Decoded(NamedTuple):
    """One image as a decoder found it.

    Attributes:
        pixels: (C, H, W) of any real dtype, C in {1, 3}, in the stored unit.
        value_range: Lowest and highest value the format can express, or None where it does not say.
        frame: 0-based frame, or None where the file holds one image only.
        invert: Whether low values are displayed bright.
        spacing: mm per pixel, (row, column), or None.
        note: What to know about the pixels, such as a window that could not be used, or None.
        limits: Lowest and highest finite value of the volume this is a slice of, where the slice has NaN or infinite
            pixels; None for the image's own.
        modality: As in `types.Image`.
        scanner: As in `types.Origin`.
        thickness: Likewise.
    """

    pixels: NDArray[Any]
    value_range: tuple[float, float] | None
    frame: int | None = None
    invert: bool = False
    spacing: tuple[float, float] | None = None
    note: str | None = None
    limits: tuple[float, float] | None = None
    modality: str | None = None
    scanner: str | None = None
    thickness: float | None = None


def limit_decoded(gib: float) -> None:
    """Set what one image or volume may take from now on, in this process and its workers.

    Args:
        gib: GiB, more than 0.

    Raises:
        ConfigError: It is not.
    """
    global _max_decoded
    if not 0 < gib < 2**20:
        raise ConfigError(f"max_decoded_gib: got {gib:g}, expected more than 0, such as {MAX_DECODED_GIB:g}.")
    _max_decoded = max(1, int(gib * 2**30))


def decoded_limit() -> float:
    """The limit in force, in GiB."""
    return _max_decoded / 2**30


def check_size(height: int, width: int, channels: int = 1) -> None:
    """Refuse images no method can use, from the header, before anything is decoded.

    Raises:
        ReadError: A side is shorter than 8 pixels, or the image takes more memory than `limit_decoded` allows.
    """
    if min(height, width) < MIN_SIDE:
        raise ReadError(
            f"is {height}x{width} pixels (height x width), expected at least {MIN_SIDE} on each side. "
            "Check that it is the image and not an icon or an empty export."
        )
    check_bytes(
        _BYTES_PER_VALUE * int(height) * int(width) * channels,
        f"is {height}x{width} pixels (height x width)" + (f" of {channels} channels" if channels > 1 else ""),
        "Tile or downsample it first",
    )


def check_bytes(decoded: int, what: str, remedy: str) -> None:
    """Refuse what does not fit into memory, from what the file declares, before anything is decoded.

    Args:
        decoded: Bytes that have to be held at once.
        what: What the file declares, such as "is 9x9 pixels".
        remedy: What to do instead of raising the limit.

    Raises:
        ReadError: It takes more than `limit_decoded` allows.
    """
    if decoded > _max_decoded:
        raise ReadError(
            f"{what}, which takes {decoded / 2**30:.3g} GiB decoded, expected at most {decoded_limit():.3g}. "
            f"{remedy}, or raise --max_decoded_gib if the machine has the memory."
        )


def pick_frame(frame: int | None, count: int) -> int:
    """Index of the wanted image among the `count` images of a file.

    Raises:
        ReadError: The file holds several images and none was asked for, or there is no such frame.
    """
    if frame is None and count != 1:
        raise ReadError(
            f"holds {count} images, expected one. Pass frame=0..{count - 1} or list frames in the manifest."
        )
    index = frame or 0
    if not 0 <= index < count:
        raise ReadError(f"has no frame {index}: it holds {count} image(s). Pass frame=0..{count - 1}.")
    return index


def upright(pixels: NDArray[Any], orientation: Any) -> NDArray[Any]:
    """Turn (C, H, W) pixels the way EXIF/TIFF tag 274 says they are shown; anything but 2 to 8 is as stored."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels


def usable_spacing(row: float, column: float) -> tuple[float, float] | None:
    """(row, column) in mm, or None where they cannot be lengths of a pixel: no score needs them."""
    shortest, longest = _SPACINGS
    return (float(row), float(column)) if all(shortest <= length <= longest for length in (row, column)) else None


def finite_limits(pixels: NDArray[Any]) -> tuple[float, float] | None:
    """Lowest and highest finite value, or None where there is none."""
    finite = pixels[np.isfinite(pixels)]
    return (float(finite.min()), float(finite.max())) if finite.size else None


def fill_gaps(decoded: Decoded) -> Decoded:
    """Give NaN and infinite pixels a value: NaN and -inf the lowest finite one, +inf the highest.

    NaN marks what was not scanned (SPM, resampling), which every viewer shows as black; an infinite pixel lies beyond
    all others, so any intensity rule clips it to the end where it now is.

    Raises:
        ReadError: No pixel is finite.
    """
    bad = ~np.isfinite(decoded.pixels)
    count = int(np.count_nonzero(bad))
    if not count:
        return decoded
    limits = decoded.limits or finite_limits(decoded.pixels)
    if limits is None or count == bad.size:
        raise ReadError(
            f"{count} of {bad.size} pixels are NaN or infinite, so there is nothing to judge. "
            "Leave this image out, or export it again if it should show something."
        )
    filled = np.where(bad, np.where(decoded.pixels > 0, limits[1], limits[0]), decoded.pixels)
    what = "its NaN pixels were taken as the lowest value, infinite ones as the nearest"
    return decoded._replace(pixels=filled, note=what if decoded.note is None else f"{decoded.note}; {what}")


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Neither the logger nor the loggers below it, which `disabled` does not reach, say anything."""
    was, silence = (logger.disabled, logger.propagate), logging.NullHandler()
    logger.addHandler(silence)
    logger.disabled, logger.propagate = True, False
    try:
        yield
    finally:
        logger.disabled, logger.propagate = was
        logger.removeHandler(silence)


class _Quiet:
    """Silences library chatter while at least one thread reads: the switches are global, so they are counted."""

    def __init__(self) -> None:
        self.lock, self.readers, self.undo = threading.Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self.lock:
            self.readers += 1
            if self.readers == 1:
                self.undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                for logger in map(logging.getLogger, _CHATTY_LOGGERS):
                    self.undo.enter_context(_silent(logger))

    def leave(self) -> None:
        with self.lock:
            self.readers -= 1
            if self.readers == 0:
                self.undo.close()


_quiet = _Quiet()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` in front of what goes wrong inside.

    Raises:
        AnatomalyError: The one raised inside.
    """
    try:
        yield
    except AnatomalyError as err:
        raise type(err)(f"{path}: {err}") from err


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Everything that goes wrong inside becomes one line that starts with `path`; library chatter is silenced.

    Decoders are third-party code that raises almost any exception on a broken file, hence the broad `except`.

    Raises:
        AnatomalyError: The one raised inside, with `path` in front.
        ReadError: Anything else: the file is missing, a folder, corrupt or truncated.
    """
    _quiet.enter()
    try:
        yield
    except AnatomalyError as err:
        raise type(err)(f"{path}: {err}") from err
    except FileNotFoundError as err:
        raise ReadError(f"{path}: no such file. Check the path.") from err
    except IsADirectoryError as err:
        raise ReadError(f"{path}: is a folder, expected an image file.") from err
    except PermissionError as err:
        raise ReadError(f"{path}: may not be read by this user. Change its permissions.") from err
    except MemoryError as err:
        raise ReadError(f"{path}: does not fit into memory. Tile or downsample it first.") from err
    except Exception as err:
        words = " ".join(str(err).replace(str(path), path.name).split())[:160]
        reason = "".join(letter if letter.isprintable() else "?" for letter in words) or type(err).__name__
        raise ReadError(f"{path}: cannot be decoded ({reason}). It is corrupt or truncated: export it again.") from err
    finally:
        _quiet.leave()
