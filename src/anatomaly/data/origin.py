"""Where images come from, and which queries come from elsewhere than the supports they are compared with.

What is kept of a file is cheap, lies in the header that is open already, and identifies nobody: of the scanner's name
there is a digest only, since any text of a damaged header may be a patient's.  The rules are slow to speak: unknown is
never a difference, and `benchmarks/origins.py` counts how often normal images of the same sets would be told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.decoding import Decoded
from anatomaly.errors import check
from anatomaly.types import Image, Origin

#: How every line ends that tells a difference.
MISLEAD = "so scores may mislead"
#: How far beyond the supports' own range a length in mm, and a number of pixels, has to be.
FAR_MM, FAR_PIXELS = 2.0, 4.0

_KINDS = {"dicom": "DICOM", "nifti": "NIfTI"}  # what else there is are pictures
_SAYS_NOTHING = ("OT", "SC")  # modalities: other, and secondary capture
_SAME = {"DX": "CR"}  # two words for a radiograph
_GREY, _COLOUR = 0.01, 0.03  # mean distance of the channels, as a share of the range; between them nothing is said
_PIXELS = 10_000  # of an image that are looked at


def origin_of(decoded: Decoded, name: str) -> Origin:
    """What is kept of a file.

    Args:
        decoded: The image as its decoder found it.
        name: The file's format as `readers.sniff_format` calls it.
    """
    modality = None if decoded.modality in _SAYS_NOTHING else decoded.modality
    return Origin(
        kind=_KINDS.get(name, "picture"),
        pixels=decoded.pixels.shape[1] * decoded.pixels.shape[2],
        colour=_colour(decoded.pixels, decoded.value_range),
        modality=_SAME.get(modality or "", modality),
        scanner=decoded.scanner,
        spacing=None if decoded.spacing is None else sqrt(decoded.spacing[0] * decoded.spacing[1]),
        thickness=decoded.thickness,
    )


def scanner_digest(*names: object) -> str | None:
    """A digest of the first name that is not empty, whatever its case and spaces: the model's, else its maker's."""
    for name in names:
        if words := " ".join(str(name or "").upper().split()):
            return hashlib.sha256(words.encode()).hexdigest()[:12]
    return None


def note_beside(image: Image, supports: Sequence[Origin]) -> str | None:
    """The note of a query: what it has, and in what it differs from all supports."""
    found = None if image.origin is None else difference(image.origin, supports)
    return "; ".join(filter(None, [image.note, found])) or None


def difference(origin: Origin, supports: Sequence[Origin]) -> str | None:
    """In what a query differs from all supports, the gravest thing only, in words of a note.

    Args:
        origin: Of the query.
        supports: Of every support; none where a bank is too old to say.

    Example:
        >>> ct, mr = (Origin("DICOM", 512**2, modality=name) for name in ("CT", "MR"))
        >>> difference(mr, [ct, ct])
        'modality MR where the support images are CT, so scores may mislead'
    """
    if not supports:
        return None
    for found in (_other_kind(origin, supports), _other_scanner(origin, supports), _far(origin, supports)):
        if found is not None:
            return f"{found}, {MISLEAD}"
    return None


def read_origins(facts: Any) -> tuple[Origin, ...]:
    """Rebuild what `Origin._asdict` made of origins, as a saved bank holds them.

    Raises:
        ConfigError: A value is of another type.
        TypeError: It is no list of such facts.
    """
    found = tuple(Origin(**each) for each in facts)
    for each in found:
        numbers = all(type(value) in (int, float, type(None)) for value in (each.spacing, each.thickness))
        texts = all(isinstance(value, str | None) for value in (each.modality, each.scanner))
        plain = isinstance(each.kind, str) and type(each.pixels) is int and isinstance(each.colour, bool | None)
        printable = all(value.isprintable() for value in each if isinstance(value, str))
        check("origins", "other values", numbers and texts and plain and printable, "what a bank's images are")
    return found


def _other_kind(origin: Origin, supports: Sequence[Origin]) -> str | None:
    """Another kind of file, modality or colour than any support."""
    if origin.kind not in (kinds := {each.kind for each in supports}):
        return f"of a {origin.kind} file where the support images are of {_all(kinds)} files"
    modalities = {each.modality for each in supports}
    if None not in {origin.modality, *modalities} and origin.modality not in modalities:
        return f"modality {origin.modality} where the support images are {_all(modalities)}"
    colours = {each.colour for each in supports}
    if origin.colour is not None and colours == {not origin.colour}:
        return f"{_COLOURS[origin.colour]} where the support images are {_COLOURS[not origin.colour]}"
    return None


_COLOURS = {True: "in colour", False: "grey"}


def _other_scanner(origin: Origin, supports: Sequence[Origin]) -> str | None:
    """Another scanner than the one that all supports are from; supports of several are ready for any."""
    scanners = {each.scanner for each in supports}
    if len(scanners) > 1 or None in {origin.scanner, *scanners} or origin.scanner in scanners:
        return None
    return "of another scanner than the support images"


def _far(origin: Origin, supports: Sequence[Origin]) -> str | None:
    """Pixels or slices of another size in mm, or where that is unknown another number of pixels."""
    known = origin.spacing is not None and all(each.spacing is not None for each in supports)
    for what, far, own, theirs in (
        ("pixel size in mm", FAR_MM, origin.spacing, [each.spacing for each in supports]),
        ("slice thickness", FAR_MM, origin.thickness, [each.thickness for each in supports]),
        ("number of pixels", FAR_PIXELS, None if known else origin.pixels, [each.pixels for each in supports]),
    ):
        values = [value for value in theirs if value is not None]
        if own is None or len(values) < len(supports):
            continue
        if own > far * max(values):
            return f"{what} over {far:g} times that of any support image"
        if far * own < min(values):
            return f"{what} under 1/{far:g} of that of any support image"
    return None


def _colour(pixels: NDArray[Any], value_range: tuple[float, float] | None) -> bool | None:
    """Whether the channels differ, as they do not in a grey picture saved in colour; None where one cannot say."""
    if len(pixels) == 1:
        return False
    if value_range is None:
        return None
    step = max(1, int(sqrt(pixels.shape[1] * pixels.shape[2] / _PIXELS)))
    thinned = pixels[:, ::step, ::step].astype(np.float32)
    apart = float(np.ptp(thinned, axis=0).mean()) / (value_range[1] - value_range[0])
    return None if _GREY <= apart <= _COLOUR else apart > _COLOUR


def _all(words: set[Any]) -> str:
    return " and ".join(sorted(words))
