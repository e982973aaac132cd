"""Where a slice lies in the volume that it is a part of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

#: What slices may be: the voxel axis nearest to the patient's is cut along, nothing is interpolated.
Axis = Literal["axial", "coronal", "sagittal"]


@dataclass(frozen=True, slots=True)
class Cut:
    """One slice of a volume that is judged slice by slice.

    Attributes:
        axis: What kind of slice it is.
        index: Number along the axis, 0-based, from inferior, posterior or left.
        position: The same as a share of the way, 0 the first slice and 1 the last; 0.5 in a volume of one slice.
        series: Of a DICOM series all files, in the order of their places; empty for a NIfTI file.
        across: The slice is cut out of all files of a DICOM series; else it is a file's (or frame's) own image.
    """

    axis: Axis
    index: int = 0
    position: float = 0.5
    series: tuple[Path, ...] = field(default=(), compare=False)
    across: bool = False

    @property
    def own(self) -> bool:
        """Whether the slice is an image of a DICOM series as it stands in its file."""
        return bool(self.series) and not self.across
