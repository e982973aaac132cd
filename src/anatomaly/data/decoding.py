"""What every format decoder shares: the record it hands to `readers.read_image`, the checks, and the error boundary.

Decoders say only what is wrong ("is a stack of 3 frames, ..."); the boundary adds which file it is, once.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from anatomaly.errors import AnatomalyError, ConfigError, ReadError

MIN_SIDE = 8
#: GiB that one image may take, or one volume that has to be unpacked as a whole, unless `limit_decoded` says otherwise.
MAX_DECODED_GIB = 1.0
_BYTES_PER_VALUE = 8  # as read and as shown, both float32

_max_decoded = int(MAX_DECODED_GIB * 2**30)
_CHATTY_LOGGERS = ("PIL", "tifffile", "pydicom", "nibabel.global")


class Decoded(NamedTuple):
    """One image as a decoder found it.

    Attributes:
        pixels: (C, H, W) of any real dtype, C in {1, 3}, in the stored unit.
        value_range: Lowest and highest value the format can express, or None where it does not say.
        frame: 0-based frame, or None where the file holds one image only.
        invert: Whether low values are displayed bright.
        spacing: mm per pixel, (row, column), or None.
    """

    pixels: NDArray[Any]
    value_range: tuple[float, float] | None
    frame: int | None = None
    invert: bool = False
    spacing: tuple[float, float] | None = None


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
    loggers = [logging.getLogger(name) for name in _CHATTY_LOGGERS]
    were_disabled = [logger.disabled for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.disabled = True
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
        for logger, was_disabled in zip(loggers, were_disabled, strict=True):
            logger.disabled = was_disabled
