"""DICOM files: stored values -> modality transform -> (on request) VOI transform; the presentation step is only noted.

The lookup tables and windows are computed here rather than with pydicom 3.0's `apply_voi_lut`, which wraps values
around in tables of 8-bit entries, refuses 12-bit modality tables and inverts the window where RescaleSlope is negative.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.decoding import Decoded, check_size, pick_frame, usable_spacing
from anatomaly.data.dicom_source import COLOUR, open_source, stored_pixels
from anatomaly.data.origin import scanner_digest
from anatomaly.errors import AnatomalyError, ReadError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_OTHER_PHOTOMETRIC = ("HSV", "ARGB", "CMYK", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "XYB")  # names safe to print
#: What is said of a CT that does not tell how it is to be shown.
WINDOWLESS = "a CT without a window of its own: spread over all values it can hold (see --intensity brain)"
_MODALITY = re.compile(r"[A-Z]{2}")
#: Functional groups of enhanced multi-frame objects that hold, per frame, what other objects hold at the top.
_FRAME_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence")


def count_frames(path: Path) -> int:
    """NumberOfFrames, 1 where the file does not say."""
    with _no_values_in_messages():
        return open_source(path).frames


@contextmanager
def _no_values_in_messages() -> Iterator[None]:
    """Pydicom's errors quote the value they stumble over, which in a damaged header may be a patient's name."""
    try:
        yield
    except (AnatomalyError, MemoryError, OSError):
        raise
    except Exception as err:
        raise ReadError(
            f"has a header that cannot be read ({type(err).__name__}). It is corrupt or truncated: export it again."
        ) from err


def decode(path: Path, frame: int | None, apply_voi: bool) -> Decoded:
    """Decode one frame of a DICOM file.

    Padding (PixelPaddingValue, to PixelPaddingRangeLimit) takes the darkest non-padding stored value before the
    modality transform.  MONOCHROME1 and PresentationLUTShape INVERSE set `invert`; they never change the pixels.

    Args:
        path: The file, with or without preamble and file meta information.
        frame: 0-based frame, or None.
        apply_voi: Apply the file's own VOI LUT or window, where it has one.  The pixels are then in [0, 1], the range
            of what the file says should be shown; the first usable one of several alternative views is taken.  Where
            none is usable (width 0), or a CT has none, the declared range stays, and `note` says so.

    Returns:
        Grey pixels in the modality's unit (CT: Hounsfield) with the range BitsStored can express in that unit, or RGB.

    Raises:
        ReadError: No image inside, no such frame, no decoder for the transfer syntax, broken pixel data.
        NotReadyError: pydicom is not installed.
    """
    with _no_values_in_messages():
        return _decode(path, frame, apply_voi)


def _decode(path: Path, frame: int | None, apply_voi: bool) -> Decoded:
    source = open_source(path)
    header = source.header
    if not (header.get("Rows") and header.get("Columns")):
        uid = header.get("SOPClassUID")
        name = getattr(uid, "name", uid)
        kind = "unknown kind" if name == uid else name
        raise ReadError(
            f"is a DICOM object without an image ({kind}), expected one with Rows and Columns. "
            "Leave it out, or export it again if it should hold one."
        )
    palette = header.PhotometricInterpretation == "PALETTE COLOR"
    check_size(header.Rows, header.Columns, 3 if palette else header.SamplesPerPixel)
    count = source.frames
    index = pick_frame(frame, count)
    photometric, samples = header.PhotometricInterpretation, int(header.SamplesPerPixel)
    if photometric not in {"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"} | COLOUR:
        known = photometric if str(photometric) in _OTHER_PHOTOMETRIC else "of an unknown kind"
        raise ReadError(f"has PhotometricInterpretation {known}, expected a grey, RGB, YBR or palette image.")
    if samples != (3 if photometric in COLOUR else 1):
        raise ReadError(f"has {samples} samples per pixel, which does not fit {photometric}. Export it again.")
    stored = stored_pixels(path, source, index)
    header = _of_frame(header, index)
    modality = _modality_of(header)
    told: Any = {
        "frame": index if count > 1 else None,
        "spacing": _spacing(header),
        "modality": modality,
        "scanner": scanner_digest(header.get("ManufacturerModelName"), header.get("Manufacturer")),
        "thickness": _thickness(header),
    }
    if photometric == "PALETTE COLOR":
        rgb = _coloured(stored, header)
        return Decoded(np.moveaxis(rgb, -1, 0), (0.0, float(np.iinfo(rgb.dtype).max)), **told)
    if photometric in COLOUR:  # pydicom has already turned YBR into RGB
        return Decoded(np.moveaxis(stored, -1, 0), _stored_range(header), **told)
    invert = photometric == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"
    values, value_range = _modality(_fill_padding(stored, header, bright_is_low=invert), header)
    note = None
    if apply_voi:
        values, value_range, note = _voi(values, value_range, header)
        if modality == "CT" and note is None and value_range is not None and value_range[0] < 0:  # in Hounsfield units
            note = WINDOWLESS
    return Decoded(values[None], value_range, invert=invert, note=note, **told)


def _modality_of(header: Dataset) -> str | None:
    """Modality, if it is one of the standard's short words: anything else might be a name."""
    word = str(header.get("Modality") or "").strip().upper()
    return word if _MODALITY.fullmatch(word) else None


def _coloured(stored: NDArray[Any], header: Dataset) -> NDArray[Any]:
    """(H, W) indices -> (H, W, 3) through the palette, which may be stored in segments."""
    from pydicom.pixels.processing import apply_color_lut

    rgb: NDArray[Any] = apply_color_lut(stored, header)
    return rgb


def _of_frame(header: Dataset, index: int) -> Dataset:
    """`header` with the functional groups of frame `index` (shared first, then its own) lifted to the top."""
    lifted = header.copy()
    shared = header.get("SharedFunctionalGroupsSequence") or []
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    for groups in [*shared[:1], *per_frame[index : index + 1]]:
        for name in _FRAME_GROUPS:
            for item in (groups.get(name) or [])[:1]:
                lifted.update(item)
    return lifted


def _stored_range(header: Dataset) -> tuple[float, float]:
    bits = int(header.BitsStored)
    if header.get("PixelRepresentation", 0):
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1


def _fill_padding(stored: NDArray[Any], header: Dataset, *, bright_is_low: bool) -> NDArray[Any]:
    """Replace padding by the stored value displayed darkest, so that it neither stretches ranges nor glares."""
    ends = [*_numbers(header, "PixelPaddingValue")[:1], *_numbers(header, "PixelPaddingRangeLimit")[:1]]
    if not (header.get("PixelPaddingValue") is not None and ends and np.isfinite(ends).all()):
        return stored
    # the cast wraps: writers often store -2000 of a signed image as the unsigned 63536
    limits = np.array(ends, np.int64).astype(stored.dtype)
    padding = (stored >= limits.min()) & (stored <= limits.max())
    image = stored[~padding]
    if image.size == 0:
        return stored
    return np.where(padding, image.max() if bright_is_low else image.min(), stored)


def _modality(stored: NDArray[Any], header: Dataset) -> tuple[NDArray[Any], tuple[float, float] | None]:
    """Stored values -> the modality's unit, and the range they can take (PS3.3 C.11.1)."""
    if header.get("ModalityLUTSequence"):
        values, top = _lookup(stored, header.ModalityLUTSequence[0], signed=_stored_range(header)[0] < 0)
        return values, (0.0, top)
    slope, intercept = _number(header, "RescaleSlope", 1.0), _number(header, "RescaleIntercept", 0.0)
    if slope == 0:
        raise ReadError("has RescaleSlope 0, which makes every pixel equal. Export it again.")
    values = (stored * np.float64(slope) + intercept).astype(np.float32)
    if stored.dtype.kind == "f":
        return values, None
    low, high = sorted(slope * limit + intercept for limit in _stored_range(header))
    if max(-low, high) > np.finfo(np.float32).max:
        raise ReadError(f"has RescaleSlope {slope:g} and RescaleIntercept {intercept:g}: no pixel can be so.")
    return values, (low, high)


def _voi(
    values: NDArray[Any], value_range: tuple[float, float] | None, header: Dataset
) -> tuple[NDArray[Any], tuple[float, float] | None, str | None]:
    """Modality values -> [0, 1] by the file's VOI LUT, else its window, else unchanged (PS3.3 C.11.2).

    Returns:
        Values, their range, and a note where the file has a transform that cannot be used.
    """
    note = None
    if header.get("VOILUTSequence"):
        try:
            signed = value_range is not None and value_range[0] < 0
            shown, top = _lookup(values, header.VOILUTSequence[0], signed=signed)
            return shown / np.float32(top), (0.0, 1.0), None
        except ReadError:
            note = "its own display table cannot be used"
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    windows = list(zip(_numbers(header, "WindowCenter"), _numbers(header, "WindowWidth"), strict=False))
    if windows and function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        windows, note = [], "its own window has an unknown shape"
    narrowest = 1.0 if function == "LINEAR" else np.nextafter(0.0, 1.0)
    for centre, width in windows:
        if np.isfinite(centre) and np.isfinite(width) and width >= narrowest:
            return _windowed(values, centre, width, function), (0.0, 1.0), None
        note = note or f"its own window of width {width:g} cannot be used"
    return values, value_range, note and f"{note}: shown in the range the file declares"


def _windowed(values: NDArray[Any], centre: float, width: float, function: str) -> NDArray[Any]:
    if function == "SIGMOID":
        shown: NDArray[Any] = 1 / (1 + np.exp(-4 * (values - centre) / width))
        return shown
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width == 0:  # LINEAR of width 1 is a threshold
        return np.where(values > centre, np.float32(1), np.float32(0))
    return np.clip((values - centre) / width + 0.5, 0, 1)


def _lookup(values: NDArray[Any], item: Dataset, *, signed: bool) -> tuple[NDArray[np.float32], float]:
    """`values` through the table of a LUT sequence item, and the highest value its entries can take.

    Raises:
        ReadError: The item describes no table.
    """
    try:
        entries, first, bits = (int(number) for number in item.LUTDescriptor)
        entries = entries % 2**16 or 2**16
        data = item.LUTData
        if isinstance(data, bytes):
            data = np.frombuffer(data, np.uint8 if len(data) < 2 * entries else "<u2")
        table = np.atleast_1d(np.asarray(data, np.float32))[:entries]
    except (AttributeError, TypeError, ValueError) as err:
        raise ReadError("has a lookup table that cannot be read. Export it again.") from err
    if not (table.size and 1 <= bits <= 16):
        raise ReadError(f"has a lookup table of {table.size} entries of {bits} bits. Export it again.")
    if signed and first >= 2**15:  # written as unsigned although the input is signed
        first -= 2**16
    return table[np.clip(np.rint(values.astype(np.float64) - first), 0, len(table) - 1).astype(np.intp)], 2.0**bits - 1


def _numbers(header: Dataset, keyword: str) -> list[float]:
    """Numbers of an element: NaN for each that is none, such as "0,5", and nothing where it is absent or empty."""
    try:
        value = header.get(keyword)
        if value is None or value == "":
            return []
        return [float(number) for number in np.atleast_1d(np.asarray(value, np.float64))]
    except (ValueError, TypeError, OverflowError):
        return [np.nan]


def _number(header: Dataset, keyword: str, default: float) -> float:
    """One number; the default where the element is absent or empty.

    Raises:
        ReadError: It is no number, so the pixels have no meaning.
    """
    value = (_numbers(header, keyword) or [default])[0]
    if not np.isfinite(value):
        raise ReadError(f"has a {keyword} that is not a number. Export it again.")
    return value


def _spacing(header: Dataset) -> tuple[float, float] | None:
    """Read mm per pixel; None where the file has none that can be read: no score needs it."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        values = _numbers(header, keyword)
        if len(values) == 2 and (spacing := usable_spacing(*values)) is not None:
            return spacing
    return None


def _thickness(header: Dataset) -> float | None:
    """Slice thickness in mm; None where the file has none that can be read."""
    values = _numbers(header, "SliceThickness")[:1]
    return values[0] if values and usable_spacing(values[0], values[0]) is not None else None
