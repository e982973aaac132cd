"""Where a DICOM image lies in space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

#: Direction cosines this close are one orientation: 0.002 mm over 200 mm.
_SAME_DIRECTION = 1e-5


@dataclass(frozen=True)
class Geometry:
    """The plane of an image in its frame of reference.

    Attributes:
        frame_of_reference: UID.
        position: (3,) mm, centre of the first pixel.
        axes: (6,) direction cosines of a row, then of a column.
        spacing: (2,) mm between rows, between columns.
    """

    frame_of_reference: str
    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    spacing: NDArray[np.float64]

    @property
    def along(self) -> float:
        """Position along the normal of the plane, in mm."""
        return float(np.cross(self.axes[:3], self.axes[3:]) @ self.position)

    def fits(self, other: Geometry) -> bool:
        """Whether both can be in one stack."""
        return (
            self.frame_of_reference == other.frame_of_reference
            and np.allclose(self.axes, other.axes, rtol=0, atol=_SAME_DIRECTION)
            and np.allclose(self.spacing, other.spacing, rtol=1e-6, atol=0)
        )


def geometry_of(header: Dataset, frame: int) -> Geometry | None:
    """Where a frame of a DICOM file lies; None where its header does not say."""
    try:
        frame_of_reference = header.get("FrameOfReferenceUID")
        position = _value(header, frame, "PlanePositionSequence", "ImagePositionPatient", 3)
        axes = _value(header, frame, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
        spacing = _value(header, frame, "PixelMeasuresSequence", "PixelSpacing", 2)
    except Exception:  # a damaged header has no geometry
        return None
    if not frame_of_reference or position is None or axes is None or spacing is None:
        return None
    return Geometry(str(frame_of_reference), position, axes, spacing)


def _value(header: Dataset, frame: int, group: str, name: str, length: int) -> NDArray[np.float64] | None:
    """Numbers of one frame: from its functional groups, else those of all frames, else the top (one frame only)."""
    shared = header.get("SharedFunctionalGroupsSequence") or []
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    places = [item for groups in (*own[frame : frame + 1], *shared[:1]) for item in (groups.get(group) or [])[:1]]
    if int(header.get("NumberOfFrames") or 1) == 1:
        places.append(header)
    for place in places:
        if place.get(name):
            found = np.asarray([float(number) for number in place[name].value], np.float64)
            return found if len(found) == length and np.isfinite(found).all() else None
    return None
