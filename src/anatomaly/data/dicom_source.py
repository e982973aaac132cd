"""What a DICOM file says of its pixel data, parsed once, and the stored values of one frame.

Only the elements that say how to decode and display the pixels, and which scanner made them, are read, so no message
can hold patient data; `patient_of`, which says which files belong together, returns a digest.
"""

from __future__ import annotations

import hashlib
import re
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from anatomaly.data.dicom_codecs import decoder_of, plugin_of
from anatomaly.errors import NotReadyError, ReadError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

COLOUR = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
_PALETTE_TAGS = [
    name
    for colour in ("Red", "Green", "Blue")
    for name in (
        f"{colour}PaletteColorLookupTableDescriptor",
        f"{colour}PaletteColorLookupTableData",
        f"Segmented{colour}PaletteColorLookupTableData",
    )
]
_TAGS = [
    "SOPClassUID",
    "Modality",
    "Manufacturer",
    "ManufacturerModelName",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PresentationLUTShape",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "PlanarConfiguration",
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
    "SliceThickness",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    *_PALETTE_TAGS,
]
#: What the decoders ask for, and the element that says it.
_LAYOUT = {
    "rows": "Rows",
    "columns": "Columns",
    "samples_per_pixel": "SamplesPerPixel",
    "photometric_interpretation": "PhotometricInterpretation",
    "planar_configuration": "PlanarConfiguration",
    "bits_allocated": "BitsAllocated",
    "bits_stored": "BitsStored",
    "pixel_representation": "PixelRepresentation",
}
_PIXEL_ELEMENTS = {0x0010: "PixelData", 0x0008: "FloatPixelData", 0x0009: "DoubleFloatPixelData"}  # of group 7FE0
_LONG_VRS = (b"OB", b"OW", b"OF", b"OD", b"UN")
_UNDEFINED = 2**32 - 1
#: Values by which a file without preamble is recognised: group lengths, character set, image type, UIDs.
_UID = re.compile(rb"[012](\.\d+)+")
_TELLING = {
    0x00020000: re.compile(rb".{1,4}", re.DOTALL),
    0x00020010: _UID,
    0x00080000: re.compile(rb".{1,4}", re.DOTALL),
    0x00080005: re.compile(rb"(ISO|GB|\\).*|"),
    0x00080008: re.compile(rb"(ORIGINAL|DERIVED)\\.*"),
    0x00080016: _UID,
    0x00080018: _UID,
}


def begins_without_preamble(head: bytes) -> bool:
    """Whether a file begins with DICOM elements straight away, as files from old or careless writers do.

    Told by several elements in order, not by one: the first bytes must be elements of group 2 or 8 in ascending order,
    among them one whose value is the one the standard asks for.

    Args:
        head: The first bytes of the file, 352 are enough.
    """
    if head[:2] not in (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08"):
        return False
    return any(_are_elements(head, order, explicit) for order, explicit in (("<", True), ("<", False), (">", True)))


def _are_elements(head: bytes, order: str, explicit: bool) -> bool:
    at, previous, elements, proofs = 0, -1, 0, 0
    while at + 12 <= len(head):
        group, element = struct.unpack(f"{order}HH", head[at : at + 4])
        tag = group << 16 | element
        if previous >> 16 != group and proofs:  # group 2 may be encoded in another way than what follows
            break
        if group not in (2, 8) or tag <= previous or (explicit and not head[at + 4 : at + 6].isalpha()):
            return False
        if not explicit:
            start, length = at + 8, struct.unpack(f"{order}I", head[at + 4 : at + 8])[0]
        elif head[at + 4 : at + 6] in (*_LONG_VRS, b"SQ", b"UT", b"UC", b"UR"):
            start, length = at + 12, struct.unpack(f"{order}I", head[at + 8 : at + 12])[0]
        else:
            start, length = at + 8, struct.unpack(f"{order}H", head[at + 6 : at + 8])[0]
        value = head[start : start + length]
        if tag in _TELLING:
            if not _TELLING[tag].fullmatch(value.strip(b"\0 ")):
                return False
            proofs += 1
        at, previous, elements = start + length, tag, elements + 1
    return proofs > 1 or (proofs == 1 and elements > 2)


class Source(NamedTuple):
    """Everything about a file that does not depend on the frame: parsed once, then kept while its frames are read."""

    header: Dataset
    syntax: Any  # pydicom UID, inferred where the file does not say
    keyword: str | None  # of the pixel data, None where there is none
    vr: str
    start: int  # of the pixel data's value in the file
    length: int  # in bytes; 2**32 - 1 for compressed frames
    offsets: tuple[list[int], list[int]] | None  # of compressed frames, where no table in the file says
    file_size: int

    @property
    def frames(self) -> int:
        """NumberOfFrames, 1 where the file does not say.

        Raises:
            ReadError: More than the file can hold.
        """
        count = max(1, int(self.header.get("NumberOfFrames") or 1))
        # a frame has at least 64 pixels of a bit, deflate packs at most 1032 times
        if 8 * count > self.file_size * (1032 if self.syntax.is_deflated else 1):
            raise ReadError(
                f"declares {count} frames, which a file of {self.file_size} bytes cannot hold. Export it again."
            )
        return count


def open_source(path: Path) -> Source:
    """Parse a file's header, or recall it: a few are kept, because frames are read one after the other.

    Raises:
        ReadError: It declares more frames than it can hold.
        NotReadyError: pydicom is not installed.
    """
    status = path.stat()
    return _parse(path, status.st_mtime_ns, status.st_size)


def patient_of(path: Path) -> str | None:
    """A digest of a file's PatientID, to group files by and not to be kept; None where it has none that can be read."""
    try:
        found = _pydicom().dcmread(path, force=True, stop_before_pixels=True, specific_tags=["PatientID"])
        name = str(found.get("PatientID") or "").strip()
    except Exception:  # one of its many ways to refuse a header
        return None
    return hashlib.sha256(name.encode()).hexdigest() if name else None


@lru_cache(maxsize=4)
def _parse(path: Path, _modified_ns: int, size: int) -> Source:
    """Read the header and find the pixel data; a few are kept, because frames are read one after the other."""
    pydicom = _pydicom()
    with path.open("rb") as file:
        header: Dataset = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=_TAGS)
        implicit, little = header.original_encoding
        syntax = header.file_meta.get("TransferSyntaxUID")
        if not syntax:
            big = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
            syntax = pydicom.uid.ImplicitVRLittleEndian if implicit else big
        syntax = pydicom.uid.UID(str(syntax))
        if not syntax.is_valid:
            raise ReadError("has a TransferSyntaxUID that is no UID. It is corrupt: export it again.")
        if syntax.is_deflated:  # pydicom has inflated it into memory of its own
            _take_defaults(header, "PixelData", _UNDEFINED)
            return Source(header, syntax, "PixelData", "OW", 0, _UNDEFINED, None, size)
        keyword, vr, length = _pixel_element(file.read(12), little=bool(little))
        start = file.tell() if vr else file.tell() - 4
        _take_defaults(header, keyword, length)
        source = Source(header, syntax, keyword, vr or "OW", start, length, None, size)
        if syntax.is_encapsulated and source.frames > 1 and header.get("ExtendedOffsetTable") is None:
            file.seek(start)
            source = source._replace(offsets=_frame_offsets(file, source.frames))
    return source


def _pixel_element(head: bytes, *, little: bool) -> tuple[str | None, str, int]:
    """Keyword, VR ("" if implicit) and length of the element that begins with these 12 bytes."""
    order = "<" if little else ">"
    if len(head) < 12:
        return None, "", 0
    group, element = struct.unpack(f"{order}HH", head[:4])
    keyword = _PIXEL_ELEMENTS.get(element) if group == 0x7FE0 else None
    if head[4:6] in _LONG_VRS:  # no implicit length can look like one of them: it would be odd
        return keyword, head[4:6].decode(), struct.unpack(f"{order}I", head[8:])[0]
    return keyword, "", struct.unpack(f"{order}I", head[4:8])[0]


def _frame_offsets(file: Any, count: int) -> tuple[list[int], list[int]] | None:
    """Where the compressed frames lie, if no table says so and each is one fragment; pydicom would look every time."""
    from pydicom.encaps import parse_basic_offsets, parse_fragments

    if parse_basic_offsets(file):
        return None
    first = file.tell()
    fragments, offsets = parse_fragments(file)
    if fragments != count:
        return None
    lengths = []
    for offset in offsets:
        file.seek(offset + 4)
        lengths.append(struct.unpack("<I", file.read(4))[0])
    return [offset - first for offset in offsets], lengths


def _take_defaults(header: Dataset, keyword: str | None, length: int) -> None:
    """Fill in what a writer may leave out: the value every other element implies, or the one the standard assumes."""
    samples, photometric = header.get("SamplesPerPixel"), header.get("PhotometricInterpretation")
    header.SamplesPerPixel = samples or (3 if photometric in COLOUR else 1)
    header.PhotometricInterpretation = photometric or ("RGB" if samples == 3 else "MONOCHROME2")
    if not header.get("BitsAllocated"):
        pixels = prod(int(header.get(name) or 0) for name in ("Rows", "Columns", "SamplesPerPixel"))
        per_pixel = 0 if length == _UNDEFINED else 8 * length // max(1, pixels * int(header.get("NumberOfFrames") or 1))
        stored = int(header.get("BitsStored") or 0) or per_pixel
        of_floats = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}
        header.BitsAllocated = of_floats.get(keyword or "") or next((n for n in (1, 8, 16, 32) if stored <= n), 64)
    header.BitsStored = header.get("BitsStored") or header.BitsAllocated
    header.PixelRepresentation = header.get("PixelRepresentation") or 0
    header.PlanarConfiguration = header.get("PlanarConfiguration") or 0


def stored_pixels(path: Path, source: Source, index: int) -> NDArray[Any]:
    """Decode one frame, and no other.

    Args:
        path: The file.
        source: Its header.
        index: 0-based frame.

    Returns:
        (H, W) or (H, W, 3) stored values; YBR already turned into RGB.

    Raises:
        ReadError: No decoder for the transfer syntax, or the pixel data is missing, corrupt or truncated.
    """
    syntax = source.syntax
    try:
        decoder = decoder_of(syntax)
    except NotImplementedError as err:
        raise ReadError(
            f"has transfer syntax {syntax.name} ({syntax}), which cannot be decoded. Export it uncompressed."
        ) from err
    if not decoder.is_available:
        raise ReadError(
            f"has transfer syntax {syntax.name} ({syntax}), for which no decoder is installed. "
            'Run: pip install "anatomaly[dicom]"'
        )
    if not syntax.is_encapsulated and source.length == _UNDEFINED and not syntax.is_deflated:
        raise ReadError(
            f"has compressed pixel data where transfer syntax {syntax.name} has none. Export it uncompressed."
        )
    try:
        with path.open("rb") as file:
            stored: NDArray[Any] = decoder.as_array(
                _pixel_source(file, source),
                index=index,
                decoding_plugin=plugin_of(decoder),
                **_decoding_options(source),
            )[0]
    except MemoryError:
        raise
    except Exception as err:  # every codec has its own way to fail
        if "does not support" in str(err):
            raise ReadError(
                f"has transfer syntax {syntax.name} ({syntax}) in a form the installed decoders do not support. "
                "Export it uncompressed."
            ) from err
        raise ReadError(
            f"pixel data of frame {index} cannot be decoded (transfer syntax {syntax.name}, {syntax}). "
            "The data is missing, corrupt or truncated: export it again."
        ) from err
    return stored


def _pixel_source(file: Any, source: Source) -> Any:
    """What pydicom reads a frame from: the open file where it holds several, whose others are then not loaded."""
    if source.syntax.is_deflated:
        return _pydicom().dcmread(file, force=True)
    if source.keyword is None:
        raise ReadError("has no pixel data.")
    file.seek(source.start)
    if source.syntax.is_encapsulated or source.frames > 1:
        return file
    return file.read(min(source.length, source.file_size))  # bytes, whose length pydicom then checks


def _decoding_options(source: Source) -> dict[str, Any]:
    header = source.header
    options = {name: header[keyword].value for name, keyword in _LAYOUT.items()}
    options |= {"number_of_frames": source.frames, "pixel_keyword": source.keyword, "pixel_vr": source.vr}
    if header.get("ExtendedOffsetTable") is not None and header.get("ExtendedOffsetTableLengths") is not None:
        options["extended_offsets"] = header.ExtendedOffsetTable, header.ExtendedOffsetTableLengths
    elif source.offsets is not None:
        options["extended_offsets"] = source.offsets
    return options


def _pydicom() -> Any:
    """The optional library, imported on first use."""
    try:
        import pydicom.pixels
    except ModuleNotFoundError as err:
        raise NotReadyError('is a DICOM file, pydicom is not installed. Run: pip install "anatomaly[dicom]"') from err
    return pydicom
