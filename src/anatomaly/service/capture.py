"""A result as a DICOM file that any viewer shows: the overlay as a Secondary Capture in the study it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from anatomaly._version import __version__
from anatomaly.service.pictures import painted
from anatomaly.service.uploads import new_file

if TYPE_CHECKING:
    from anatomaly.types import Prediction, SupportBank

_COPIED = (
    *("SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
_SERIES_NUMBER = 9100


def secondary_capture(
    source: Path, prediction: Prediction, bank: SupportBank, folder: Path, earlier: Sequence[Path]
) -> Path:
    """Write a verdict as a Secondary Capture; one function, so that a better one can take its place.

    Args:
        source: The judged DICOM file; patient and study are copied from it.
        prediction: One without an error.
        bank: The normals, whose colour scale is used.
        folder: Where to write.
        earlier: Captures of the same series, in order.

    Returns:
        The file written.
    """
    found = dcmread(source, stop_before_pixels=True, specific_tags=[*_COPIED, "SOPClassUID", "SOPInstanceUID"])
    capture = Dataset()
    for name in _COPIED:
        if name in found:
            capture[name] = found[name]
    first = dcmread(earlier[0], specific_tags=["SeriesInstanceUID"]) if earlier else None
    pixels, now = painted(prediction, bank, "overlay"), datetime.now()
    capture.SOPClassUID, capture.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    capture.SeriesInstanceUID = first.SeriesInstanceUID if first is not None else generate_uid()
    capture.Modality, capture.ConversionType = "OT", "WSD"
    capture.SeriesNumber, capture.InstanceNumber = _SERIES_NUMBER, len(earlier) + 1
    capture.SeriesDescription = "anatomaly overlay, RESEARCH ONLY"
    capture.ImageComments = f"anomaly score {prediction.score:.6g}. Research only. Not a medical device."
    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.Manufacturer, capture.SoftwareVersions = "anatomaly", __version__
    capture.ContentDate = capture.SeriesDate = now.strftime("%Y%m%d")
    capture.ContentTime = capture.SeriesTime = now.strftime("%H%M%S")
    judged = Dataset()
    judged.ReferencedSOPClassUID, judged.ReferencedSOPInstanceUID = found.SOPClassUID, found.SOPInstanceUID
    if prediction.sample.frame is not None:
        judged.ReferencedFrameNumber = prediction.sample.frame + 1
    capture.SourceImageSequence = [judged]
    capture.Rows, capture.Columns, capture.SamplesPerPixel = *pixels.shape[:2], 3
    capture.PhotometricInterpretation, capture.PlanarConfiguration = "RGB", 0
    capture.BitsAllocated, capture.BitsStored, capture.HighBit, capture.PixelRepresentation = 8, 8, 7, 0
    content = pixels.tobytes()
    capture.PixelData = content + b"\0" * (len(content) % 2)
    capture.file_meta = FileMetaDataset()
    capture.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path = new_file(folder)
    capture.save_as(path, enforce_file_format=True)
    return path
