"""Decoders for compressed DICOM frames, chosen so that a damaged frame is an error and never the end of the process.

They plug into pydicom's own machinery, which finds the frames, the sign and the colour space.  GDCM, the plugin that
pydicom tries first, aborts the process on some damaged frames and knows no 12-bit JPEG; it is not used.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_END, _TAIL = b"\xff\xd9", 64  # a JPEG's end marker, and how much padding may follow it

#: What pydicom asks a plugin for: the syntaxes it decodes and the packages it needs.
DECODER_DEPENDENCIES = dict.fromkeys((*_JPEG, *_JPEG_LS), ("imagecodecs>=2024.1",))


def is_available(uid: str) -> bool:
    """Whether frames of a transfer syntax can be decoded here; pydicom asks every plugin."""
    return uid in DECODER_DEPENDENCIES


@cache
def decoder_of(syntax: Any) -> Any:
    """Pydicom's decoder of a transfer syntax, with the decoders of this module where there are any.

    A decoder of our own, because plugins added to pydicom's would change it for the whole process.

    Args:
        syntax: pydicom UID.

    Raises:
        NotImplementedError: pydicom does not know the transfer syntax as one of images.
    """
    from pydicom.pixels.decoders.base import Decoder, get_decoder

    known = get_decoder(syntax)
    if not is_available(syntax):
        return known
    decoder = Decoder(known.UID)
    decoder.add_plugin("imagecodecs", (__name__, "decode_frame"))
    return decoder


def plugin_of(decoder: Any) -> str:
    """Name of the plugin to use: never GDCM where there is another one."""
    return next((name for name in ("pydicom", "pylibjpeg") if name in decoder.available_plugins), "")


def decode_frame(src: bytes, runner: Any) -> bytes:
    """Decode one JPEG or JPEG-LS frame; the signature is pydicom's.

    Args:
        src: The compressed frame.
        runner: pydicom's DecodeRunner, with what the header says of the frame.

    Returns:
        The stored values, one pixel after the other, in the colour space of the frame.

    Raises:
        ValueError: The frame is broken, or is not of the size, depth or channels the header says.
    """
    import imagecodecs

    samples = runner.samples_per_pixel
    if _END not in src[-_TAIL:]:  # libjpeg would fill the rest with grey, CharLS search on in memory that is not ours
        raise ValueError("the frame has no end marker")
    if runner.transfer_syntax in _JPEG_LS:
        frame = imagecodecs.jpegls_decode(src)
    else:  # the same colour space in and out: pydicom converts
        colours = "RGB" if samples > 1 else "GRAYSCALE"
        frame = imagecodecs.jpeg8_decode(src, colorspace=colours, outcolorspace=colours)
    expected = (runner.rows, runner.columns, *((samples,) if samples > 1 else ()))
    if frame.shape != expected or frame.itemsize * 8 > runner.bits_allocated:
        raise ValueError(f"the frame is {frame.shape} {frame.dtype}, the header says {expected}")
    if samples > 1:
        runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", frame.itemsize * 8)  # of this frame; pydicom takes the header's afterwards
    return bytes(np.ascontiguousarray(frame).data)
