"""DICOM files: stored values -> modality transform -> (on request) VOI transform; the presentation step is only noted.

The lookup tables and windows are computed here rather than with pydicom 3.0's `apply_voi_lut`, which wraps values
around in tables of 8-bit entries, refuses 12-bit modality tables and inverts the window where RescaleSlope is negative.
Only the elements that say how to decode and display the pixels are ever read, so no message can hold patient data.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.decoding import Decoded, check_size, pick_frame
from anatomaly.errors import NotReadyError, ReadError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_COLOUR = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
_PALETTE_TAGS = [
    f"{colour}PaletteColorLookupTable{part}" for colour in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")
]
_TAGS = [
    "SOPClassUID",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PresentationLUTShape",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "VOILUTSequence",
    "VOILUTFunction",
    "WindowCenter",
    "WindowWidth",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    *_PALETTE_TAGS,
]
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
#: Functional groups of enhanced multi-frame objects that hold, per frame, what other objects hold at the top.
_FRAME_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence")


def count_frames(path: Path) -> int:
    """NumberOfFrames, 1 where the file does not say."""
    return _frames(_read_header(path))


def decode(path: Path, frame: int | None, apply_voi: bool) -> Decoded:
    """Decode one frame of a DICOM file.

    Padding (PixelPaddingValue, to PixelPaddingRangeLimit) takes the darkest non-padding stored value before the
    modality transform.  MONOCHROME1 and PresentationLUTShape INVERSE set `invert`; they never change the pixels.

    Args:
        path: The file; its 'DICM' marker has been seen.
        frame: 0-based frame, or None.
        apply_voi: Apply the file's own VOI LUT or window, where it has one.  The pixels are then in [0, 1], the range
            of what the file says should be shown; the first of several alternative views is taken.

    Returns:
        Grey pixels in the modality's unit (CT: Hounsfield) with the range BitsStored can express in that unit, or RGB.

    Raises:
        ReadError: No image inside, no such frame, no decoder for the transfer syntax, broken pixel data.
        NotReadyError: pydicom is not installed.
    """
    header = _read_header(path)
    if not (header.get("Rows") and header.get("Columns")):
        kind = getattr(header.get("SOPClassUID"), "name", "unknown kind")
        raise ReadError(
            f"is a DICOM object without an image ({kind}), expected one with Rows and Columns. "
            "Leave it out, or export it again if it should hold one."
        )
    check_size(header.Rows, header.Columns)
    count = _frames(header)
    index = pick_frame(frame, count)
    header = _of_frame(header, index)
    stored = _stored_pixels(path, header, index)
    spacing, wanted_frame = _spacing(header), index if count > 1 else None

    photometric = header.get("PhotometricInterpretation", "")
    if photometric == "PALETTE COLOR":
        rgb = _pydicom().pixels.apply_color_lut(stored, header)
        return Decoded(np.moveaxis(rgb, -1, 0), (0.0, float(np.iinfo(rgb.dtype).max)), wanted_frame, spacing=spacing)
    if photometric in _COLOUR:  # pydicom has already turned YBR into RGB
        return Decoded(np.moveaxis(stored, -1, 0), _stored_range(header), wanted_frame, spacing=spacing)
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ReadError(f"has PhotometricInterpretation {photometric!r}, expected a grey, RGB, YBR or palette image.")

    invert = photometric == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"
    values, value_range = _modality(_fill_padding(stored, header, bright_is_low=invert), header)
    if apply_voi:
        values, value_range = _voi(values, value_range, header)
    return Decoded(values[None], value_range, wanted_frame, invert, spacing)


def _pydicom() -> Any:
    """The optional library, imported on first use."""
    try:
        import pydicom.pixels
    except ModuleNotFoundError as err:
        raise NotReadyError('is a DICOM file, pydicom is not installed. Run: pip install "anatomaly[dicom]"') from err
    return pydicom


def _read_header(path: Path) -> Dataset:
    header: Dataset = _pydicom().dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
    return header


def _frames(header: Dataset) -> int:
    return max(1, int(header.get("NumberOfFrames") or 1))


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


def _stored_pixels(path: Path, header: Dataset, index: int) -> NDArray[Any]:
    """(H, W) or (H, W, 3) stored values of one frame; YBR already turned into RGB."""
    pydicom = _pydicom()
    syntax = header.file_meta.TransferSyntaxUID
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError as err:
        raise ReadError(
            f"has transfer syntax {syntax.name} ({syntax}), which cannot be decoded. Export it uncompressed."
        ) from err
    if not decoder.is_available:
        raise ReadError(
            f"has transfer syntax {syntax.name} ({syntax}), for which no decoder is installed. "
            'Run: pip install "anatomaly[dicom]"'
        )
    # gdcm, otherwise tried first, writes to the console when a JPEG 2000 stream is broken
    openjpeg = syntax.startswith(_JPEG_2000) and "pylibjpeg" in decoder.available_plugins
    # by path pydicom decodes one frame without loading the others, but takes fewer kinds of files
    by_path = _frames(header) > 1 and not syntax.is_deflated
    try:
        source = path if by_path else pydicom.dcmread(path)
        stored: NDArray[Any] = pydicom.pixels.pixel_array(
            source, index=index, decoding_plugin="pylibjpeg" if openjpeg else ""
        )
    except MemoryError:
        raise
    except Exception as err:  # every codec has its own way to fail
        if "does not support" in str(err):
            raise ReadError(
                f"has transfer syntax {syntax.name} ({syntax}) in a form the installed decoders do not support. "
                "Export it uncompressed, or install pylibjpeg-libjpeg (GPL)."
            ) from err
        raise ReadError(
            f"pixel data of frame {index} cannot be decoded (transfer syntax {syntax.name}, {syntax}). "
            "The data is missing, corrupt or truncated: export it again."
        ) from err
    return stored


def _stored_range(header: Dataset) -> tuple[float, float]:
    bits = int(header.BitsStored)
    if header.get("PixelRepresentation", 0):
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1


def _fill_padding(stored: NDArray[Any], header: Dataset, *, bright_is_low: bool) -> NDArray[Any]:
    """Replace padding by the stored value displayed darkest, so that it neither stretches ranges nor glares."""
    first = header.get("PixelPaddingValue")
    if first is None:
        return stored
    last = header.get("PixelPaddingRangeLimit")
    # the cast wraps: writers often store -2000 of a signed image as the unsigned 63536
    limits = np.array([first, first if last is None else last], np.int64).astype(stored.dtype)
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
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    slope, intercept = (1.0, 0.0) if slope is None or intercept is None else (float(slope), float(intercept))
    if slope == 0:
        raise ReadError("has RescaleSlope 0, which makes every pixel equal. Export it again.")
    values = (stored * np.float64(slope) + intercept).astype(np.float32)
    if stored.dtype.kind == "f":
        return values, None
    low, high = sorted(slope * limit + intercept for limit in _stored_range(header))
    return values, (low, high)


def _voi(
    values: NDArray[Any], value_range: tuple[float, float] | None, header: Dataset
) -> tuple[NDArray[Any], tuple[float, float] | None]:
    """Modality values -> [0, 1] by the file's VOI LUT, else its window, else unchanged (PS3.3 C.11.2)."""
    if header.get("VOILUTSequence"):
        shown, top = _lookup(values, header.VOILUTSequence[0], signed=value_range is not None and value_range[0] < 0)
        return shown / np.float32(top), (0.0, 1.0)
    centre, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    if centre is None or width is None:
        return values, value_range
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    if width <= 0 or (function == "LINEAR" and width < 1):
        raise ReadError(
            f"has its own window of width {width:g}, which is not usable. Set intensity to a window or range."
        )
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width)), (0.0, 1.0)
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise ReadError(f"has VOILUTFunction {function!r}, expected LINEAR, LINEAR_EXACT or SIGMOID.")
    if width == 0:  # LINEAR of width 1 is a threshold
        return np.where(values > centre, np.float32(1), np.float32(0)), (0.0, 1.0)
    return np.clip((values - centre) / width + 0.5, 0, 1), (0.0, 1.0)


def _lookup(values: NDArray[Any], item: Dataset, *, signed: bool) -> tuple[NDArray[np.float32], float]:
    """`values` through the table of a LUT sequence item, and the highest value its entries can take."""
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = entries % 2**16 or 2**16
    if signed and first >= 2**15:  # written as unsigned although the input is signed
        first -= 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * entries else "<u2")
    table = np.asarray(data, np.float32)[:entries]
    return table[np.clip(np.rint(values.astype(np.float64) - first), 0, len(table) - 1).astype(np.intp)], 2.0**bits - 1


def _first(value: Any) -> float | None:
    """First of one or several numbers; None where the element is absent or empty."""
    if value is None or value == "":
        return None
    numbers = np.atleast_1d(np.asarray(value, np.float64))
    return float(numbers[0]) if numbers.size else None


def _spacing(header: Dataset) -> tuple[float, float] | None:
    values = header.get("PixelSpacing") or header.get("ImagerPixelSpacing")
    if not values or len(values) != 2 or not all(np.isfinite(float(value)) and value > 0 for value in values):
        return None
    return float(values[0]), float(values[1])
