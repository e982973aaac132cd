"""PNG files of 16 bits a channel, which Pillow would cut down to 8 where they are in colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from anatomaly.errors import ReadError

GREY = 0  # colour type in the IHDR chunk


def depth_of(path: Path) -> tuple[int, int]:
    """Bits per sample and colour type: bytes 24 and 25 of every PNG file."""
    with path.open("rb") as file:
        bits, colour = file.read(26)[24:]
    return bits, colour


def decode_deep(path: Path, index: int) -> NDArray[Any]:
    """(H, W) or (H, W, 3) of a 16-bit colour PNG without alpha; Pillow would cut it down to 8 bits."""
    import imagecodecs

    if index:
        raise ReadError("is an animation of 16-bit colour, of which only frame 0 can be read. Export it as images.")
    try:
        channels: NDArray[Any] = imagecodecs.png_decode(path.read_bytes())
    except RuntimeError as err:
        raise ReadError("cannot be decoded as a 16-bit PNG. It is corrupt or truncated: export it again.") from err
    return channels[..., :3] if channels.shape[-1] >= 3 else channels[..., 0]
