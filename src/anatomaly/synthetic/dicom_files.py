"""Drawn images as DICOM files, for tests and demonstrations that need no patient data."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.errors import NotReadyError

#: What kind of object a task's images are: SOP class (keyword of pydicom.uid) and modality. Others are photographs.
_KINDS = {
    "head_ct": ("CTImageStorage", "CT"),
    "brain_mr": ("MRImageStorage", "MR"),
    "chest_xray": ("ComputedRadiographyImageStorage", "CR"),
}
#: Elements that the kind of object must have, empty where nothing is known.
_OF_KIND: dict[str, dict[str, str | int]] = {
    "CT": {"RescaleIntercept": 0, "RescaleSlope": 1, "KVP": "", "AcquisitionNumber": 1},
    "MR": {
        "ScanningSequence": "SE",
        "SequenceVariant": "NONE",
        "ScanOptions": "",
        "MRAcquisitionType": "2D",
        "EchoTime": "",
        "EchoTrainLength": "",
        "RepetitionTime": "",
    },
    "CR": {"BodyPartExamined": "CHEST", "ViewPosition": "", "PatientOrientation": ""},
    "OT": {"ConversionType": "SYN", "PatientOrientation": ""},
}
_AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def dicom_bytes(
    pixels: NDArray[np.float32],
    *,
    task: str,
    patient: str,
    number: int = 0,
    position: Sequence[float] = (0.0, 0.0, 0.0),
    axes: Sequence[float] = _AXIAL,
    spacing: float = 2.0,
) -> bytes:
    """An image as a DICOM file: one study, series and frame of reference a patient, the same bytes at every call.

    Args:
        pixels: (C, H, W) in [0, 1], C in {1, 3}; grey is stored in 12 bits, colour in 8 a channel.
        task: Name out of `phantom.TASKS`; head CT and brain MR have a place in space, the others have none.
        patient: PatientID; the name is "Phantom".
        number: InstanceNumber.
        position: ImagePositionPatient, mm.
        axes: ImageOrientationPatient.
        spacing: mm a pixel.

    Raises:
        NotReadyError: pydicom is not installed.
    """
    try:
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import UID, ExplicitVRLittleEndian
    except ModuleNotFoundError as err:
        raise NotReadyError('DICOM: pydicom is not installed. Run: pip install "anatomaly[dicom]"') from err
    import pydicom.uid

    def uid(*facts: object) -> UID:
        return UID(f"2.25.{int(hashlib.sha256(repr(facts).encode()).hexdigest()[:30], 16)}")

    sop_class, modality = _KINDS.get(task, ("SecondaryCaptureImageStorage", "OT"))
    made = Dataset()
    made.SOPClassUID = getattr(pydicom.uid, sop_class)
    made.SOPInstanceUID = uid(task, patient, number, tuple(position), tuple(axes))
    made.StudyInstanceUID, made.SeriesInstanceUID = uid(task, patient, "study"), uid(task, patient, "series")
    made.PatientName, made.PatientID, made.PatientBirthDate, made.PatientSex = "Phantom", patient, "", "O"
    made.StudyDate, made.StudyTime, made.StudyID, made.AccessionNumber = "20260101", "120000", "1", ""
    made.ReferringPhysicianName, made.Manufacturer, made.Modality = "", "anatomaly phantom", modality
    made.SeriesNumber, made.InstanceNumber, made.ImageType = 1, number + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
    made.ContentDate, made.ContentTime, made.Laterality, made.PatientPosition = "20260101", "120000", "", "HFS"
    if modality in ("CT", "MR"):
        made.FrameOfReferenceUID, made.PositionReferenceIndicator = uid(task, patient, "frame of reference"), ""
        made.ImagePositionPatient, made.ImageOrientationPatient = list(position), list(axes)
        made.PixelSpacing, made.SliceThickness = [spacing, spacing], 5.0
    _fill(made, pixels)
    for name, value in _OF_KIND[modality].items():
        setattr(made, name, value)
    file_meta = FileMetaDataset()
    file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file_meta.MediaStorageSOPClassUID, file_meta.MediaStorageSOPInstanceUID = made.SOPClassUID, made.SOPInstanceUID
    made.file_meta = file_meta
    content = io.BytesIO()
    made.save_as(content, enforce_file_format=True)
    return content.getvalue()


def _fill(made: Any, pixels: NDArray[np.float32]) -> None:
    """The pixels, and what says how they are stored."""
    grey = len(pixels) == 1
    levels = np.rint(pixels * (4095.0 if grey else 255.0)).astype("<u2" if grey else np.uint8)
    made.SamplesPerPixel, made.Rows, made.Columns = levels.shape
    made.PhotometricInterpretation = "MONOCHROME2" if grey else "RGB"
    if not grey:
        made.PlanarConfiguration = 0
    made.BitsAllocated, made.BitsStored = (16, 12) if grey else (8, 8)
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, 0
    stored = np.moveaxis(levels, 0, -1).tobytes()
    made.PixelData = stored + b"\0" * (len(stored) % 2)
