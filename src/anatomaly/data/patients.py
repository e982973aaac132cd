"""Which images are of one patient: numbers that say nothing else, so they may be kept and shown."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from pathlib import Path

from anatomaly.data.dicom_source import patient_of
from anatomaly.data.readers import sniff_format
from anatomaly.types import Sample


def patient_groups(samples: Sequence[Sample]) -> tuple[int, ...]:
    """Number patients in the order of their first image.

    A patient is what the manifest's `patient_id` says, else the PatientID of a DICOM file, else the file.

    Args:
        samples: Rows, K of them, whose files were read before.

    Returns:
        K numbers from 0, equal for images of one patient.  Where all are of one patient (or all files bear one and the
        same id, as files without identifiers do) every image has its own: there is nothing else to tell them apart by.
    """
    keys = [_patient(sample) for sample in samples]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return tuple(range(len(keys))) if len(numbers) == 1 else tuple(numbers[key] for key in keys)


def _patient(sample: Sample) -> Hashable:
    if sample.patient_id is not None:
        return "manifest", sample.patient_id
    found = patient_of(Path(sample.path)) if sniff_format(sample.path) == "dicom" else None
    return ("file", os.path.realpath(sample.path)) if found is None else ("dicom", found)
