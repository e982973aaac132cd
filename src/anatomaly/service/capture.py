"""A result as a DICOM file that any viewer shows: the overlay as a Secondary Capture in the study it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.results.dicom_objects import caption, picture
from anatomaly.results.dicom_picture import framed_picture
from anatomaly.results.dicom_planes import quiet, read_planes
from anatomaly.results.pictures import encode_picture
from anatomaly.service.pictures import painted
from anatomaly.service.uploads import new_file

if TYPE_CHECKING:
    from anatomaly.results.dicom_objects import Maker
    from anatomaly.types import Prediction, SupportBank


def secondary_capture(prediction: Prediction, bank: SupportBank, maker: Maker, series: str, number: int) -> Path:
    """Write a verdict as `anatomaly predict --dicom` does, beside the judged file.

    Args:
        prediction: Of a DICOM file, without an error; patient and study are copied from that file.
        bank: The normals, whose colour scale is used.
        maker: What made the verdict.
        series: UID of the new series.
        number: InstanceNumber in it, from 1.

    Returns:
        The file written.

    Raises:
        ReadError: The judged file lacks what makes it part of a study.
    """
    sample = prediction.sample
    row = {
        "path": str(sample.path),
        "frame": sample.frame,
        "spacing": prediction.spacing,
        "score": prediction.score,
        "p_value": prediction.p_value,
    }
    overlay, path = new_file(sample.path.parent), new_file(sample.path.parent)
    overlay.write_bytes(encode_picture(painted(prediction, bank, "overlay"), kind="PNG"))
    with quiet():
        (plane,) = read_planes([row])
        pixels, zoom = framed_picture(overlay, scale=bank.map_range, caption=caption(row))
        made = picture(plane, pixels, maker, series=series, number=number, zoom=zoom)
        made.save_as(path, enforce_file_format=True)
    return path
