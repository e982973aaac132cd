"""Images of one patient get one number, from the manifest, else from DICOM, else from the file; no name is kept."""

from pathlib import Path

import pytest

from anatomaly.data.patients import patient_groups
from anatomaly.synthetic.dicom_files import dicom_bytes
from anatomaly.synthetic.phantom import draw
from anatomaly.types import Sample

pytest.importorskip("pydicom")


@pytest.fixture
def dicom(tmp_path):
    def write(patient, number):
        path = tmp_path / f"{patient or 'none'}{number}.dcm"
        image = draw("head_ct", seed=1, size=32)
        path.write_bytes(dicom_bytes(image.pixels, task="head_ct", patient=patient, number=number, position=(0, 0, 0)))
        return Sample(path, "head_ct")

    return write


def test_the_manifest_says_whose_images_they_are(tmp_path):
    rows = [Sample(Path("absent"), "t", patient_id=name, frame=k) for k, name in enumerate("bbac")]
    assert patient_groups(rows) == (0, 0, 1, 2)


def test_dicom_files_say_it_themselves(dicom):
    assert patient_groups([dicom("a", 0), dicom("b", 0), dicom("a", 1)]) == (0, 1, 0)
    assert patient_groups([dicom("a", 0), dicom("a", 1), dicom("a", 2)]) == (0, 1, 2)  # nothing to tell them apart by
    assert patient_groups([dicom("", 0), dicom("", 1), dicom("a", 2)]) == (0, 1, 2)


def test_slices_of_a_file_belong_together(tmp_path):
    volume, other = tmp_path / "volume.nii", tmp_path / "other.nii"
    for path in (volume, other):
        path.write_bytes(b"sniffed, not read")
    assert patient_groups([Sample(volume, "t", frame=1), Sample(other, "t"), Sample(volume, "t", frame=4)]) == (0, 1, 0)
